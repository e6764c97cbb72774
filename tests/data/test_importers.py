"""Foreign formats: one record of each, written after its published description, and what becomes of it."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from north_lightning.data import SampleReader
from north_lightning.data.importers import (
    ATIFTrajectories,
    OpenAIMessages,
    OpenHandsTraces,
    OpenSWETraces,
    ShareGPT,
    SWESmithTraces,
    repository_of,
)
from north_lightning.errors import ConfigError, DataError
from north_lightning.types import Message, ToolCall, ToolSpec

BASH = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
    },
}
TOOLS = (ToolSpec("bash", "Run.", BASH["function"]["parameters"]),)
LS = ToolCall("call_1", "bash", {"command": "ls"})


def call(arguments='{"command": "ls"}', id="call_1"):
    return {"id": id, "type": "function", "function": {"name": "bash", "arguments": arguments}}


OPENHANDS = {
    "instance_id": "PyPSA__linopy-79",
    "repo": "PyPSA/linopy",
    "license": "mit",
    "trajectory_id": "chatcmpl-1",
    "trajectory": [
        {"content": "You are an agent.", "name": None, "role": "system", "tool_call_id": None, "tool_calls": None},
        {"content": "Fix it.", "name": None, "role": "user", "tool_call_id": None, "tool_calls": None},
        {"content": "I look.", "name": None, "role": "assistant", "tool_call_id": None, "tool_calls": [call()]},
        {"content": "a.py", "name": "bash", "role": "tool", "tool_call_id": "call_1", "tool_calls": None},
        {"content": "Done.", "name": None, "role": "assistant", "tool_call_id": None, "tool_calls": None},
    ],
    "model_patch": "diff --git a/a.py b/a.py",
    "dataset": "SWE-rebench",
}
OPENHANDS_MESSAGES = (
    Message("system", "You are an agent."),
    Message("user", "Fix it."),
    Message("assistant", "", "I look.", (LS,)),
    Message("tool", "a.py", tool_call_id="call_1"),
    Message("assistant", "Done."),
)


def test_openhands_traces_are_read_from_parquet_with_the_tools_of_a_file(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([BASH]))
    parquet.write_table(pyarrow.Table.from_pylist([OPENHANDS]), tmp_path / "a.parquet")
    (sample,) = SampleReader([tmp_path / "a.parquet"], OpenHandsTraces(tools=tmp_path / "tools.json"))
    assert sample.messages == OPENHANDS_MESSAGES
    assert sample.tools == TOOLS
    assert (sample.source, sample.harness, sample.repo) == ("SWE-rebench", "openhands", "PyPSA/linopy")
    assert (sample.task_id, sample.verified) == ("PyPSA__linopy-79", None)


def test_open_swe_traces_name_their_harness_in_every_row():
    record = {**OPENHANDS, "agent": "swe_agent", "tools": json.dumps([BASH]), "resolved": 1}
    sample = OpenSWETraces(source="open_swe_traces").convert(record)
    assert (sample.messages, sample.tools, sample.harness) == (OPENHANDS_MESSAGES, TOOLS, "swe_agent")
    assert sample.verified is True


def test_swe_smith_traces_are_strings_of_json_with_lists_of_answered_calls():
    messages = [
        {"role": "system", "content": "You are an agent.", "agent": "main", "message_type": "system_prompt"},
        {"role": "user", "content": [{"type": "text", "text": "Fix it."}], "agent": "main"},
        {"role": "assistant", "content": "I look.", "thought": "I look.", "action": "ls", "tool_calls": [call()]},
        {"role": "tool", "content": [{"type": "text", "text": "a.py"}], "tool_call_ids": ["call_1"]},
        {"role": "assistant", "content": "Done."},
    ]
    record = {
        "messages": json.dumps(messages),
        "instance_id": "oauthlib__oauthlib.1fd52536.combine_file__09vlzwgc",
        "resolved": False,
        "model": "m",
        "traj_id": "oauthlib__oauthlib.1fd52536.combine_file__09vlzwgc.1",
        "patch": "",
    }
    sample = SWESmithTraces().convert(record)
    assert sample.messages == OPENHANDS_MESSAGES
    assert (sample.harness, sample.repo, sample.verified) == ("swe_agent", "oauthlib/oauthlib", False)


def test_atif_steps_become_turns_and_observations_follow_their_calls(tmp_path):
    record = {
        "schema_version": "ATIF-v1.6",
        "session_id": "s",
        "agent": {"name": "mini-swe-agent", "version": "2", "model_name": "m", "tool_definitions": [BASH]},
        "steps": [
            {"step_id": 1, "source": "system", "message": "You are an agent."},
            {"step_id": 2, "source": "user", "message": "Fix it."},
            {
                "step_id": 3,
                "source": "agent",
                "message": "",
                "reasoning_content": "I look.",
                "tool_calls": [{"tool_call_id": "call_1", "function_name": "bash", "arguments": {"command": "ls"}}],
                "observation": {"results": [{"source_call_id": "call_1", "content": "a.py"}]},
                "metrics": {"prompt_tokens": 10},
            },
            {"step_id": 4, "source": "agent", "message": "Done."},
        ],
    }
    (tmp_path / "trajectory.json").write_text(json.dumps(record, indent=2))
    (sample,) = SampleReader([tmp_path / "trajectory.json"], ATIFTrajectories())
    assert (sample.messages, sample.tools, sample.harness) == (OPENHANDS_MESSAGES, TOOLS, "mini-swe-agent")
    del record["steps"][2]["observation"]["results"][0]["source_call_id"]
    assert ATIFTrajectories().convert(record).messages == OPENHANDS_MESSAGES
    del record["steps"][2]["tool_calls"]
    assert ATIFTrajectories().convert(record).messages[3] == Message("user", "a.py")


def test_sharegpt_turns_and_its_function_calls_become_messages():
    record = {
        "system": "You are an agent.",
        "conversations": [
            {"from": "human", "value": "Fix it."},
            {"from": "function_call", "value": '{"name": "bash", "arguments": {"command": "ls"}}'},
            {"from": "observation", "value": "a.py"},
            {"from": "gpt", "value": "Done."},
        ],
        "tools": json.dumps([BASH["function"]]),
    }
    sample = ShareGPT(source="sharegpt").convert(record)
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert sample.messages[2].tool_calls[0].arguments == {"command": "ls"}
    assert sample.messages[3].tool_call_id == sample.messages[2].tool_calls[0].id
    assert (sample.tools, sample.source) == (TOOLS, "sharegpt")


def test_plain_messages_keep_their_labels_and_ignore_other_columns():
    record = {"messages": [{"role": "user", "content": "hi"}], "task_id": "t", "source": "s", "score": 3}
    sample = OpenAIMessages(source="other").convert(record)
    assert (sample.messages, sample.source, sample.task_id) == ((Message("user", "hi"),), "s", "t")


@pytest.mark.parametrize(
    ("importer", "record", "message"),
    [
        (OpenHandsTraces(), {}, r"\$.trajectory: expected a list of messages, got None"),
        (OpenHandsTraces(), {"trajectory": [{"role": "robot"}]}, r"\$.trajectory\[0\].role: expected one of"),
        (
            OpenAIMessages(),
            {"messages": [{"role": "assistant", "tool_calls": [call("{")]}]},
            r"\$.messages\[0\].tool_calls\[0\].function.arguments: expected JSON",
        ),
        (
            OpenAIMessages(),
            {"messages": [{"role": "assistant", "tool_calls": [call(id=None)]}]},
            r"\$.messages\[0\].tool_calls\[0\].id: expected a string, got None",
        ),
        (OpenAIMessages(), {"messages": ["hi"]}, r"\$.messages\[0\]: expected an object, got 'hi'"),
        (OpenAIMessages(), {"messages": "["}, r"\$.messages: expected JSON"),
        (OpenAIMessages(), {"messages": [{"role": "tool", "content": "x"}]}, r"\$.messages\[0\].tool_call_id"),
        (
            SWESmithTraces(),
            {"messages": [{"role": "tool", "content": "x", "tool_call_ids": ["a", "b"]}]},
            r"\$.messages\[0\].tool_call_ids: expected one",
        ),
        (ATIFTrajectories(), {"steps": []}, r"\$.schema_version: expected ATIF-v1.x, got None"),
        (
            ATIFTrajectories(),
            {"schema_version": "ATIF-v1.4", "steps": [{"source": "tool"}]},
            r"\$.steps\[0\].source: expected system, user or agent",
        ),
        (ShareGPT(), {"conversations": [{"from": "x", "value": ""}]}, r"\$.conversations\[0\].from: expected one of"),
        (ShareGPT(), {"conversations": [{"from": "human"}]}, r"\$.conversations\[0\].value: expected a string"),
    ],
)
def test_a_broken_record_names_the_json_path_and_what_was_expected(importer, record, message):
    with pytest.raises(DataError, match=message):
        importer.convert(record)


def test_a_missing_tools_file_is_a_mistake_of_the_config(tmp_path):
    with pytest.raises(ConfigError, match="tools: expected a JSON list of tools"):
        OpenHandsTraces(tools=tmp_path / "none.json").convert(OPENHANDS)


@pytest.mark.parametrize(
    ("task_id", "repository"),
    [
        ("django__django-12345", "django/django"),
        ("scikit-learn__scikit-learn-9", "scikit-learn/scikit-learn"),
        ("oauthlib__oauthlib.1fd52536.combine_file__09vlzwgc", "oauthlib/oauthlib"),
        (f"instance_NodeBB__NodeBB-{'0' * 40}-vnan", "NodeBB/NodeBB"),
        ("terminal-train-00001", ""),
        ("", ""),
    ],
)
def test_repositories_are_read_from_instance_ids(task_id, repository):
    assert repository_of(task_id) == repository
