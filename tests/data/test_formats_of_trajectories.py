"""Foreign formats: one record of each, written after its published description, and what becomes of it."""

import json
from dataclasses import replace

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from north_lightning.data import SampleFilter, SampleReader
from north_lightning.data.formats import FORMATS, ATIFTrajectories, OpenAIMessages, ShareGPT, Trajectories
from north_lightning.data.instances import repository_of
from north_lightning.data.sources import sample_from_json, sample_to_json
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
INFERRED = (
    ToolSpec("bash", "", {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]}),
)
LS = ToolCall("call_1", "bash", {"command": "ls"})
EXPECTED = (
    Message("system", "You are an agent."),
    Message("user", "Fix it."),
    Message("assistant", "", "I look.", (LS,)),
    Message("tool", "a.py", tool_call_id="call_1"),
    Message("assistant", "Done."),
)


def call(arguments='{"command": "ls"}', id="call_1"):
    return {"id": id, "type": "function", "function": {"name": "bash", "arguments": arguments}}


SYSTEM = {"role": "system", "content": "You are an agent."}
USER = {"role": "user", "content": "Fix it."}
LOOKS = {"role": "assistant", "content": "I look.", "tool_calls": [call()]}
SEES = {"role": "tool", "content": "a.py", "tool_call_id": "call_1"}
DONE = {"role": "assistant", "content": "Done."}
CALL = {"tool_call_id": "call_1", "function_name": "bash", "arguments": {"command": "ls"}}
MODEL_RESPONSE = {"id": "r1", "choices": [{"message": LOOKS}]}
METADATA = {"tool_call_id": "call_1", "function_name": "bash", "model_response": MODEL_RESPONSE}
SAID = [SYSTEM, USER, LOOKS, SEES, DONE]


def atif(*steps, **more):
    steps = [{"step_id": number, **step} for number, step in enumerate(steps, 1)]
    return {"schema_version": "ATIF-v1.7", "agent": {"name": "a", "version": "1"}, "steps": steps, **more}


RECORDS = {
    "openai": {"messages": SAID, "tools": [BASH]},
    "as text": {"messages": json.dumps(SAID), "tools": json.dumps([BASH])},
    "role and content under conversations": {"conversations": SAID, "tools": [BASH]},
    "nvidia's trajectory": {"trajectory": [{"name": None, **one} for one in SAID], "tools": [BASH], "license": "mit"},
    "system beside the messages": {"system": "You are an agent.", "messages": SAID[1:], "tools": [BASH]},
    "old function_call": {
        "messages": [
            SYSTEM,
            USER,
            {"role": "assistant", "content": "I look.", "function_call": call()["function"]},
            {"role": "function", "name": "bash", "content": "a.py"},
            DONE,
        ],
        "functions": [BASH["function"]],
    },
    "anthropic": {
        "system": "You are an agent.",
        "messages": [
            USER,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I look.", "signature": "x"},
                    {"type": "tool_use", "id": "call_1", "name": "bash", "input": {"command": "ls"}},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": "a.py"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Done."}]},
        ],
        "tools": [
            {
                "name": "bash",
                "description": "Run.",
                "input_schema": BASH["function"]["parameters"],
                "cache_control": {"type": "ephemeral"},
            }
        ],
    },
    "LLaMA-Factory's parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "value": "You are an agent."}], "loss_weight": 0.0},
            {"role": "user", "content": [{"type": "text", "value": "Fix it."}], "loss_weight": 0.0},
            {
                "role": "assistant",
                "content": [
                    {"type": "reasoning", "value": "I look."},
                    {"type": "tool_call", "value": '{"name": "bash", "arguments": {"command": "ls"}}'},
                ],
                "loss_weight": 1.0,
            },
            {"role": "tool", "content": [{"type": "text", "value": "a.py"}], "loss_weight": 0.0},
            {"role": "assistant", "content": [{"type": "text", "value": "Done."}], "loss_weight": 1.0},
        ],
        "tools": json.dumps([BASH["function"]]),
    },
    "responses of OpenAI": {
        "messages": [
            SYSTEM,
            USER,
            {
                "object": "response",
                "output": [
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "I look."}]},
                    {"type": "function_call", "call_id": "call_1", "name": "bash", "arguments": '{"command": "ls"}'},
                ],
            },
            {"type": "function_call_output", "call_id": "call_1", "output": "a.py"},
            {"object": "response", "output": [{"type": "message", "content": [{"type": "output_text", "text": "Done."}]}]},
        ],
        "tools": [BASH],
    },
    "Hermes": {
        "conversations": [
            {"from": "system", "value": "You are an agent."},
            {"from": "human", "value": "Fix it."},
            {"from": "gpt", "value": 'I look.\n<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'},
            {"from": "tool", "value": "<tool_response>\na.py\n</tool_response>"},
            {"from": "gpt", "value": "Done."},
        ],
        "tools": [BASH],
    },
    "Qwen's functions": {
        "messages": [
            SYSTEM,
            USER,
            {
                "role": "assistant",
                "content": "<think>\nI look.\n</think>\n\n<tool_call>\n<function=bash>\n<parameter=command>\nls\n"
                "</parameter>\n</function>\n</tool_call>",
            },
            {"role": "user", "content": "<tool_response>\na.py\n</tool_response>"},
            DONE,
        ],
        "tools": [BASH],
    },
    "sharegpt": {
        "system": "You are an agent.",
        "conversations": [
            {"from": "human", "value": "Fix it."},
            {"from": "function_call", "value": '{"name": "bash", "arguments": {"command": "ls"}}'},
            {"from": "observation", "value": "a.py"},
            {"from": "gpt", "value": "Done."},
        ],
        "tools": json.dumps([BASH["function"]]),
    },
    "SWE-smith": {
        "messages": json.dumps(
            [
                {**SYSTEM, "agent": "main", "message_type": "system_prompt"},
                {"role": "user", "content": [{"type": "text", "text": "Fix it."}], "agent": "main"},
                {**LOOKS, "thought": "I look.", "action": "ls", "message_type": "action"},
                {"role": "tool", "content": [{"type": "text", "text": "a.py"}], "tool_call_ids": ["call_1"]},
                {**DONE, "thought": "Done.", "action": ""},
            ]
        ),
        "tools": [BASH],
    },
    ".traj": {
        "environment": "swe_main",
        "trajectory": [{"action": "ls", "observation": "a.py", "response": "I look.", "thought": "I look.", "query": []}],
        "history": [
            SYSTEM,
            USER,
            {**LOOKS, "thought": "I look.", "action": "ls", "agent": "main"},
            {"role": "tool", "content": [{"type": "text", "text": "a.py"}], "tool_call_ids": ["call_1"]},
            {**DONE, "thought": "Done."},
        ],
        "info": {"exit_status": "submitted"},
    },
    "mini-SWE-agent 2": {
        "info": {"mini_version": "2.4.6", "exit_status": "Submitted"},
        "messages": [*SAID, {"role": "exit", "content": "diff", "extra": {"submission": "diff"}}],
        "trajectory_format": "mini-swe-agent-1.1",
    },
    "OpenHands' events": {
        "instance_id": "a__b-1",
        "history": [
            {"id": 0, "source": "agent", "action": "system", "args": {"content": "You are an agent.", "tools": [BASH]}},
            {"id": 1, "source": "user", "action": "message", "args": {"content": "Fix it.", "image_urls": None}},
            {"id": 2, "source": "user", "action": "recall", "args": {"query": "Fix it."}},
            {"id": 3, "source": "agent", "action": "run", "args": {"command": "ls"}, "tool_call_metadata": METADATA},
            {"id": 4, "source": "agent", "observation": "run", "content": "a.py", "tool_call_metadata": METADATA},
            {"id": 5, "source": "environment", "observation": "agent_state_changed", "content": "", "extras": {}},
            {"id": 6, "source": "agent", "action": "message", "args": {"content": "Done."}},
        ],
    },
    "OpenHands' SDK": {
        "events": [
            {
                "kind": "SystemPromptEvent",
                "source": "agent",
                "system_prompt": {"type": "text", "text": "You are an agent."},
                "tools": [BASH],
            },
            {"kind": "MessageEvent", "source": "user", "llm_message": {"role": "user", "content": [{"type": "text", "text": "Fix it."}]}},
            {
                "kind": "ActionEvent",
                "source": "agent",
                "thought": [{"type": "text", "text": "I look."}],
                "tool_call_id": "call_1",
                "tool_call": {"id": "call_1", "name": "bash", "arguments": '{"command": "ls"}', "origin": "completion"},
                "llm_response_id": "r1",
            },
            {
                "kind": "ObservationEvent",
                "source": "environment",
                "tool_call_id": "call_1",
                "observation": {"kind": "BashObservation", "content": [{"type": "text", "text": "a.py"}]},
            },
            {"kind": "MessageEvent", "source": "agent", "llm_message": {"role": "assistant", "content": [{"type": "text", "text": "Done."}]}},
        ]
    },
    "Inspect": {
        "id": 1,
        "epoch": 1,
        "target": "",
        "eval": {"task": "t"},
        "attachments": {"abc": "a.py"},
        "events": [{"event": "model", "tools": [BASH["function"]]}],
        "messages": [
            {**SYSTEM, "id": "m0"},
            {**USER, "id": "m1", "source": "input"},
            {
                "id": "m2",
                "source": "generate",
                "role": "assistant",
                "content": [{"type": "reasoning", "reasoning": "I look."}],
                "tool_calls": [{"id": "call_1", "function": "bash", "arguments": {"command": "ls"}, "type": "function"}],
            },
            {"role": "tool", "content": "attachment://abc", "tool_call_id": "call_1", "function": "bash"},
            {"role": "assistant", "content": [{"type": "text", "text": "Done."}], "model": "m"},
        ],
    },
    "ATIF": atif(
        {"source": "system", "message": "You are an agent."},
        {"source": "user", "message": "Fix it."},
        {
            "source": "agent",
            "message": "",
            "reasoning_content": "I look.",
            "tool_calls": [CALL],
            "observation": {"results": [{"source_call_id": "call_1", "content": "a.py"}]},
            "metrics": {"prompt_tokens": 10},
        },
        {"source": "agent", "message": "Done."},
        agent={"name": "a", "version": "1", "tool_definitions": [BASH]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_one_conversation_is_the_same_in_every_format(name):
    importer = Trajectories()
    sample = importer.convert(RECORDS[name])
    own_ids = {call.id: "call_1" for message in sample.messages for call in message.tool_calls}
    expected = EXPECTED if name != "sharegpt" else (*EXPECTED[:2], replace(EXPECTED[2], reasoning=""), *EXPECTED[3:])
    renamed = [
        replace(
            message,
            tool_calls=tuple(replace(one, id="call_1") for one in message.tool_calls),
            tool_call_id=own_ids.get(message.tool_call_id),
        )
        for message in sample.messages
    ]
    assert tuple(renamed) == expected
    assert sample.tools in (TOOLS, INFERRED)
    assert (sample.tools == INFERRED) == (name in (".traj", "mini-SWE-agent 2"))
    assert SampleFilter().passes(sample)
    account = importer.account()
    assert account["not_understood"] == {}
    assert sum(account["formats"].values()) == 1
    assert next(iter(account["formats"])) in {one.name for one in FORMATS}


def test_every_format_is_found_by_itself_alone():
    found = {name: next(one.name for one in FORMATS if one.detects(record)) for name, record in RECORDS.items()}
    assert found[".traj"] == "swe_agent"
    assert found["mini-SWE-agent 2"] == "mini_swe_agent"
    assert found["OpenHands' events"] == found["OpenHands' SDK"] == "openhands"
    assert found["Inspect"] == "inspect"
    assert found["ATIF"] == "atif"
    assert found["sharegpt"] == found["Hermes"] == "sharegpt"
    assert found["SWE-smith"] == "swe_smith"
    assert {found[name] for name in ("openai", "anthropic", "LLaMA-Factory's parts")} == {"messages"}
    with pytest.raises(
        DataError, match="expected messages, or a trajectory of one of the formats atif.*got the keys a"
    ):
        Trajectories().convert({"a": 1})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False) | st.sampled_from(["", "a", "{", "[1]", "<think>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "name", "id"]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def damaged(value, data, chance):
    """``value`` with some of what it holds replaced by anything."""
    if data.draw(st.integers(0, chance)) == 0:
        return data.draw(JSON)
    if isinstance(value, dict):
        return {key: damaged(below, data, chance) for key, below in value.items()}
    return [damaged(below, data, chance) for below in value] if isinstance(value, list) else value


def check_damage(data):
    record = RECORDS[data.draw(st.sampled_from(sorted(RECORDS)))]
    record = {key: damaged(value, data, 25) for key, value in record.items()}
    try:
        sample = Trajectories().convert(record)
    except DataError:
        return
    for check in SampleFilter().filters:
        check.find_fault(sample)
    assert sample_from_json(json.loads(json.dumps(sample_to_json(sample)))) == sample


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_damaged_record_is_read_or_refused(data):
    check_damage(data)


@pytest.mark.long
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_many_damaged_records_are_read_or_refused(data):
    check_damage(data)


# ---- what is trained -----------------------------------------------------------------------------------------------

MARKS = [
    *({key: value} for key in ("weight", "loss", "loss_weight", "train", "trainable") for value in (0, 0.0, False, "false", "0")),
    {"loss_mask": 0},
    {"mask": True},
    {"is_demo": True},
    {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]},
]  # fmt: skip


def written(kind, turns):
    """Turns of an assistant, some marked, in a format; ``turns`` are texts with their marks."""
    if kind == "atif":
        marks = [{"is_copied_context": True} if mark else {} for _, mark in turns]
        steps = [{"source": "agent", "message": text, **mark} for (text, _), mark in zip(turns, marks, strict=True)]
        return atif({"source": "user", "message": "a"}, *steps)
    if kind == "sharegpt":
        return {
            "conversations": [{"from": "human", "value": "a"}, *({"from": "gpt", "value": t, **m} for t, m in turns)]
        }
    if kind == "parts":
        parts = [{"role": "assistant", "content": [{"type": "text", "value": text}], **mark} for text, mark in turns]
        return {"messages": [USER, *parts]}
    if kind == "mini":
        said = [{"role": "assistant", "content": text, "extra": {}, **mark} for text, mark in turns]
        return {"messages": [USER, *said], "trajectory_format": "mini-swe-agent-1"}
    return {"messages": [USER, *({"role": "assistant", "content": text, **mark} for text, mark in turns)]}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["messages", "sharegpt", "parts", "mini", "atif"]),
    st.lists(st.tuples(st.text("ab c.\n", max_size=9), st.sampled_from([{}, {"weight": 1}, {"train": True}, *MARKS])), min_size=1, max_size=6),
)  # fmt: skip
def test_turns_are_learned_unless_they_are_marked_and_their_text_is_kept(kind, turns):
    sample = Trajectories().convert(written(kind, turns))
    said = [message for message in sample.messages if message.role == "assistant"]
    assert [message.content for message in said] == [text.strip() for text, _ in turns]
    marked = [bool(mark) and mark not in ({"weight": 1}, {"train": True}) for _, mark in turns]
    if kind == "atif":
        marked = [bool(mark) for _, mark in turns]
    expected = [not mark and bool(text.strip()) for (text, _), mark in zip(turns, marked, strict=True)]
    assert [message.trained for message in said] == expected
    assert sample_from_json(json.loads(json.dumps(sample_to_json(sample)))) == sample


def test_weights_without_a_place_are_counted():
    importer = Trajectories()
    sample = importer.convert({"messages": [{**USER, "train": True}, {**DONE, "weight": 0.5}]})
    assert sample.messages[1].trained
    assert set(importer.account()["not_understood"]) == {"$.messages[].train=True", "$.messages[].weight=0.5"}


def test_a_step_that_no_model_wrote_and_a_record_of_no_weight_are_not_learned():
    steps = [{"source": "user", "message": "a"}, {"source": "agent", "message": "b", "llm_call_count": 0}]
    assert not Trajectories().convert(atif(*steps)).messages[-1].trained
    assert not Trajectories().convert({"messages": [USER, DONE], "weight": 0.0}).messages[-1].trained
    own = {"role": "assistant", "content": "Exit due to cost limit", "thought": "Exit due to cost limit", "action": ""}
    trajectory = {"trajectory": [{"action": "", "observation": "", "response": ""}], "history": [USER, DONE, own]}
    assert [message.trained for message in Trajectories().convert(trajectory).messages[1:]] == [True, False]


# ---- thoughts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "<think>\nhm\n</think>\n\nDone."},
        {"content": "<thinking>hm</thinking>Done."},
        {"content": "hm\n</think>\n\nDone."},
        {"content": "Done.", "thinking": "hm"},
        {"content": "Done.", "reasoning": "hm"},
        {"content": "Done.", "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}]},
        {"content": "Done.", "reasoning_details": [{"type": "reasoning.text", "text": "hm", "format": "x"}]},
        {"content": "Done.", "reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}]},
        {"content": "Done.", "reasoning_content": "hm", "thinking_blocks": [{"type": "thinking", "thinking": "hm"}]},
        {"content": "<think>hm</think>Done.", "reasoning_content": "hm"},
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Done."}]},
        {"content": [{"type": "reasoning", "reasoning": "", "summary": "hm", "redacted": True}, "Done."]},
    ],
)
def test_thoughts_are_reasoning_under_every_name(turn):
    (_, said) = Trajectories().convert({"messages": [USER, {"role": "assistant", **turn}]}).messages
    assert (said.reasoning, said.content, said.trained) == ("hm", "Done.", True)


def test_thoughts_between_words_move_and_those_in_code_stay():
    def said(content):
        return Trajectories().convert({"messages": [USER, {"role": "assistant", "content": content}]}).messages[-1]

    assert said("a\n<think>b</think>\nc") == Message("assistant", "a\n\nc", "b")
    for text in ("```\n<think>b</think>\n```", "Write `<think>b</think>` first."):
        assert said(text) == Message("assistant", text)
    assert said("<think>it never ends") == Message("assistant", "", "it never ends", trained=False)


# ---- calls and results ---------------------------------------------------------------------------------------------


def test_results_find_their_calls_by_id_by_order_or_together():
    def results(ids, answers):
        calls = [{**call(), "id": id} for id in ids]
        observed = [{"role": "tool", "content": text, "tool_call_id": id} for id, text in answers]
        importer = Trajectories()
        messages = importer.convert(
            {"messages": [USER, {"role": "assistant", "tool_calls": calls}, *observed, DONE]}
        ).messages
        answered = {message.tool_call_id: message.content for message in messages if message.role == "tool"}
        changed = {what: count for what, count in importer.account()["changed"].items() if "without tools" not in what}
        return [answered[one.id] for one in messages[1].tool_calls], changed

    assert results(["a", "b"], [("b", "2"), ("a", "1")]) == (["1", "2"], {})
    assert results(["a", "b"], [(None, "1"), (None, "2")]) == (["1", "2"], {})
    assert results(["a", "a"], [("a", "1"), ("a", "2")])[0] == ["1", "2"]
    assert results([None, None], [(None, "1"), (None, "2")]) == (["1", "2"], {})
    assert results(["a", "b"], [(["a", "b"], "both")])[0] == ["", "both"]
    assert results(["a", "b"], [(None, "both")]) == (["", "both"], {"observations shared by several calls": 1})
    assert results(["a", "b"], [("a", "1")]) == (["1", ""], {"calls without a result, given an empty one": 1})


def test_ids_that_are_used_in_every_turn_become_different_ones():
    turns = [LOOKS, SEES] * 3
    sample = Trajectories().convert({"messages": [USER, *turns, DONE]})
    ids = [one.id for message in sample.messages for one in message.tool_calls]
    assert len(set(ids)) == 3
    assert [message.tool_call_id for message in sample.messages if message.role == "tool"] == ids
    assert SampleFilter().passes(replace(sample, messages=sample.messages[:3]))


def test_a_last_observation_is_left_out_and_counted():
    importer = Trajectories()
    sample = importer.convert({"messages": [USER, LOOKS, SEES]})
    assert sample.messages[-1].tool_calls
    assert importer.account()["changed"]["records whose last observation is left out"] == 1
    assert SampleFilter().passes(sample)


def test_a_call_that_is_no_json_is_shown_and_not_learned():
    record = {"messages": [USER, {**LOOKS, "tool_calls": [call('{"command": ')]}, {**SEES, "content": "Error."}, DONE]}
    importer = Trajectories()
    sample = importer.convert(record)
    assert [(message.role, message.trained) for message in sample.messages[1:]] == [
        ("assistant", False), ("user", True), ("assistant", True),
    ]  # fmt: skip
    assert importer.account()["changed"]["turns with an unreadable call, not trained"] == 1
    text = {"messages": [USER, {"role": "assistant", "content": "<tool_call>{bad</tool_call>"}, DONE]}
    assert not Trajectories().convert(text).messages[1].trained


def test_text_calls_are_python_too_and_tools_stand_in_the_prompt():
    prompt = f"Signatures are within <tools> </tools> tags:\n<tools>\n{json.dumps(BASH)}\n</tools>"
    content = "<tool_call>\n{'name': 'bash', 'arguments': {'command': 'ls'}}\n</tool_call>"
    record = {"messages": [{"role": "system", "content": prompt}, USER, {"role": "assistant", "content": content}]}
    sample = Trajectories().convert(record)
    assert sample.tools == TOOLS
    assert sample.messages[-1].tool_calls[0].arguments == {"command": "ls"}


def test_harbors_tables_have_results_as_what_the_user_says():
    content = '<think>I look.</think>\n<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
    turns = [("user", f"<tools>\n{json.dumps([BASH], indent=2)}\n</tools>\n\nYou are an agent."), ("user", "Fix it."),
             ("assistant", content), ("user", "a.py"), ("assistant", "Done.")]  # fmt: skip
    record = {
        "conversations": [{"role": role, "content": text} for role, text in turns],
        "agent": "terminus-2", "model": "m", "model_provider": "p", "date": "2026", "task": "t", "episode": "episode-0",
        "run_id": "r", "trial_name": "n", "result": "1.0", "tool_definitions": None, "instruction": "Fix it.",
    }  # fmt: skip
    importer = Trajectories()
    sample = importer.convert(record)
    assert [replace(message, tool_calls=(), tool_call_id=None) for message in sample.messages[2:]] == [
        Message("assistant", reasoning="I look."), Message("tool", "a.py"), Message("assistant", "Done."),
    ]  # fmt: skip
    assert (sample.tools, sample.verified, sample.harness, sample.task_id) == (TOOLS, True, "terminus2", "t")
    assert importer.account()["not_understood"] == {}


def test_an_agent_whose_calls_are_text_keeps_its_text():
    xml = "I look.\n\n<function=bash>\n<parameter=command>ls</parameter>\n</function>"
    turns = [{"role": "assistant", "content": "\n" + xml}, {"role": "user", "content": "OBSERVATION:\na.py"}] * 2
    sample = Trajectories().convert({"messages": [SYSTEM, USER, *turns]})
    assert [message.content for message in sample.messages if message.role == "assistant"] == [xml, xml]
    assert (sample.tools, SampleFilter().passes(sample)) == ((), True)


@pytest.mark.parametrize(
    ("tool", "parameters"),
    [
        (BASH["function"], BASH["function"]["parameters"]),
        ({"type": "function", "function": {"name": "bash", "description": None, "parameters": None}}, {}),
        ({"name": "bash", "inputSchema": {"type": "object"}}, {"type": "object"}),
        (json.dumps({"name": "bash", "parameters": "{}"}), {}),
    ],
)
def test_tools_are_read_in_every_shape(tool, parameters):
    (read,) = Trajectories().convert({"messages": [USER, DONE], "tools": [tool]}).tools
    assert (read.name, dict(read.parameters)) == ("bash", parameters)


def test_an_error_of_a_tool_reads_as_inspect_showed_it():
    failed = {
        "role": "tool",
        "content": "",
        "tool_call_id": "call_1",
        "error": {"type": "timeout", "message": "too slow"},
    }
    messages = [*RECORDS["Inspect"]["messages"][:3], failed, RECORDS["Inspect"]["messages"][4]]
    sample = Trajectories().convert({**RECORDS["Inspect"], "messages": messages})
    assert sample.messages[3].content == "Error: too slow"


# ---- ATIF ----------------------------------------------------------------------------------------------------------


def test_observations_of_the_system_stay():
    sample = Trajectories().convert(
        atif(
            {"source": "user", "message": "Fix it."},
            {"source": "system", "message": "Ran a check.", "observation": {"results": [{"content": "SAID 42"}]}},
            {"source": "agent", "message": "42."},
        )
    )
    assert [message.content for message in sample.messages] == ["Fix it.", "Ran a check.", "SAID 42", "42."]


@pytest.mark.parametrize(
    "words",
    ["Executed bash", "[tool call]", "[tool call: bash]", "(tool use)", "(tool calls)", "Tool call", "bash result", "Executed bash (no result)"],
)  # fmt: skip
def test_words_that_harbor_puts_in_the_models_mouth_are_not_learned(words):
    user = {"source": "user", "message": "Fix it."}
    importer = Trajectories()
    sample = importer.convert(atif(user, {"source": "agent", "message": words, "tool_calls": [CALL]}))
    assert sample.messages[1] == Message("assistant", tool_calls=(LS,))
    assert importer.account()["changed"]["placeholders of Harbor's converters left out"] == 1
    if not words.startswith("["):
        assert Trajectories().convert(atif(user, {"source": "agent", "message": words})).messages[1].content == words
    lost = {"source": "agent", "message": "a.py", "extra": {"source_call_id": "x"}}
    error = {"source": "agent", "message": "[error] no answer"}
    steps = Trajectories().convert(atif(user, lost, error, {"source": "agent", "message": "Done."})).messages
    assert [(m.role, m.content, m.trained) for m in steps[1:]] == [
        ("user", "a.py", True), ("assistant", "", False), ("assistant", "Done.", True),
    ]  # fmt: skip


@pytest.mark.parametrize("parser", ["json", "xml"])
def test_replies_of_terminus_2_are_put_together_from_their_parts(parser):
    keys = [("ls\n", 0.1), ("cat 'ü'\n", 1.0)]
    calls = [
        {"tool_call_id": f"call_0_{n}", "function_name": "bash_command", "arguments": {"keystrokes": k, "duration": d}}
        for n, (k, d) in enumerate(keys)
    ]
    done = {"tool_call_id": "x", "function_name": "mark_task_complete", "arguments": {}}
    sample = Trajectories().convert(
        atif(
            {"source": "user", "message": "Task"},
            {"source": "agent", "message": "Analysis: a\nPlan: p\nq", "tool_calls": calls, "observation": {"results": [{"content": "screen"}]}},
            {"source": "agent", "message": "no JSON", "observation": {"results": [{"content": "Previous response had parsing errors:\nx"}]}},
            {"source": "agent", "message": "Plan: wait", "observation": {"results": [{"content": "screen"}]}},
            {"source": "agent", "message": "Analysis: a", "tool_calls": [done], "observation": {"results": [{"content": "sure?"}]}},
            agent={"name": "terminus-2", "version": "1", "extra": {"parser": parser}},
        )
    )  # fmt: skip
    assert (sample.harness, sample.tools) == ("terminus2", ())
    said = [message.content for message in sample.messages if message.role == "assistant"]
    assert [message.role for message in sample.messages] == ["user", *["assistant", "user"] * 3, "assistant"]
    assert said[1] == "no JSON"
    if parser == "json":
        commands = [{"keystrokes": k, "duration": d} for k, d in keys]
        assert [json.loads(said[index]) for index in (0, 2, 3)] == [
            {"analysis": "a", "plan": "p\nq", "commands": commands},
            {"analysis": "", "plan": "wait", "commands": []},
            {"analysis": "a", "plan": "", "commands": [], "task_complete": True},
        ]
    else:
        assert "<keystrokes duration=\"1.0\">cat 'ü'\n</keystrokes>" in said[0]
        assert "<task_complete>true</task_complete>" in said[3]
        assert "task_complete" not in said[0]


# ---- columns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "verdict"),
    [
        *(({key: value}, True) for key in ("resolved", "reward", "score", "passed", "success", "correct") for value in (True, 1, 1.0, "True", "1", "1.0")),
        *(({key: value}, False) for key in ("resolved", "reward", "score", "passed", "is_resolved") for value in (False, 0, 0.0, "False", "0", "0.0")),
        ({"result": "AgentTimeoutError"}, False),
        ({"result": "0.5"}, False),
        ({"report": {"resolved": "false", "empty_generation": False}}, False),
        ({"verifier_result": {"rewards": {"reward": 1.0}}}, True),
        ({"scores": {"includes": {"value": "I"}, "match": {"value": "C"}}}, False),
        ({"resolved": True, "reward": 0.0}, False),
        ({"resolved": None, "reward": ""}, None),
        ({"score": 3}, None),
        ({"target": "an answer"}, None),
        ({"target": False}, False),
    ],
)  # fmt: skip
def test_verdicts_are_read_from_every_common_column_and_type(columns, verdict):
    assert Trajectories().convert({"messages": [USER, DONE], **columns}).verified is verdict


def test_keys_that_are_not_understood_are_counted_and_refused_where_that_is_asked():
    record = {
        "messages": [USER, {**DONE, "mood": "good", "audio": None}],
        "images": ["a.png"],
        "videos": [],
        "score": 3,
        "model": "m",
    }
    importer = Trajectories()
    importer.convert(record)
    importer.convert(record)
    assert importer.account()["not_understood"] == {"$.messages[].mood": 2, "$.images": 2, "$.score": 2}
    strict = Trajectories(ignore=["score", "images"])
    strict.strict = True
    with pytest.raises(DataError, match=r"expected only keys that are understood, got \$.messages\[\].mood"):
        strict.convert(record)
    assert strict.account()["formats"] == {}
    strict.convert({**record, "messages": [USER, DONE]})
    image = [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {"url": "x"}}]
    importer.convert({"messages": [{"role": "user", "content": image}, DONE]})
    assert importer.account()["not_understood"]["$.messages[].content[].image_url"] == 1


def test_labels_are_found_and_foreign_names_of_our_harnesses_are_ours():
    record = {
        "messages": [USER, DONE],
        "instance_id": "oauthlib__oauthlib.1fd52536.combine_file__x",
        "agent": "SWE-agent",
    }
    sample = Trajectories(source="s").convert({**record, "id": 3})
    assert (sample.source, sample.harness, sample.repo) == ("s", "swe_agent", "oauthlib/oauthlib")
    assert Trajectories(harness="mine").convert({"messages": [USER, DONE]}).harness == "mine"
    for name, ours in (("terminus-2", "terminus2"), ("mini-swe-agent", "mini_swe_agent"), ("opencode", "opencode")):
        steps = [{"source": "user", "message": "a"}, {"source": "agent", "message": "b"}]
        assert Trajectories().convert(atif(*steps, agent={"name": name})).harness == ours


def test_a_trajectory_inside_of_a_column_keeps_the_columns_beside_it():
    steps = [{"source": "user", "message": "a"}, {"source": "agent", "message": "b"}]
    for value in (atif(*steps), json.dumps(atif(*steps))):
        sample = Trajectories().convert({"trajectory": value, "reward": "0.0", "repo": "a/b"})
        assert (len(sample.messages), sample.verified, sample.repo) == (2, False, "a/b")


# ---- files ---------------------------------------------------------------------------------------------------------


def test_nulls_that_arrow_puts_into_structs_are_no_arguments_and_those_of_json_are(tmp_path):
    def turn(id, **arguments):
        function = {"name": "edit", "arguments": arguments}
        return {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": id, "type": "function", "function": function}],
        }

    record = {"messages": [USER, turn("1", path="a"), {**SEES, "tool_call_id": "1"}, turn("2", text="b")]}
    tools = [
        {"name": "edit", "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string", "enum": ["b"]}}}},
        {"name": "stop", "parameters": {"type": "object"}},
    ]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist([{**record, "tools": tools}]), tmp_path / "a.parquet")
    (sample,) = SampleReader([tmp_path / "a.parquet"], Trajectories())
    assert [one.arguments for m in sample.messages for one in m.tool_calls] == [{"path": "a"}, {"text": "b"}]
    assert dict(sample.tools[1].parameters) == {"type": "object"}
    assert SampleFilter().passes(sample)
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [USER, turn("1", path=None)]}))
    (sample,) = SampleReader([tmp_path / "a.jsonl"], Trajectories())
    assert sample.messages[1].tool_calls[0].arguments == {"path": None}
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    table = pyarrow.table({"messages": [[USER, DONE]], "extra": pyarrow.array([[("a", None)]], kind)})
    parquet.write_table(table, tmp_path / "b.parquet")
    importer = Trajectories()
    list(SampleReader([tmp_path / "b.parquet"], importer))
    assert importer.account()["not_understood"] == {"$.extra": 1}


def test_documents_hold_one_record_or_many_whatever_they_are_called(tmp_path):
    sample = {"messages": [USER, DONE]}
    log = {
        "version": 2,
        "eval": {"task": "t"},
        "samples": [{**sample, "id": n, "epoch": 1, "target": ""} for n in (1, 2)],
    }
    for name, text, count in (
        ("list.json", json.dumps([sample, sample]), 2),
        ("conversation.json", json.dumps([USER, DONE]), 1),
        ("events.json", json.dumps(RECORDS["OpenHands' events"]["history"]), 1),
        ("lines.json", f"{json.dumps(sample)}\n{json.dumps(sample)}\n\n", 2),
        ("log.json", json.dumps(log), 2),
        ("a.traj", json.dumps(RECORDS[".traj"], indent=1), 1),
        ("a.traj.json", json.dumps(RECORDS["mini-SWE-agent 2"], indent=1), 1),
    ):
        (tmp_path / name).write_text(text)
        assert len(list(SampleReader([tmp_path / name], Trajectories()))) == count, name
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number, event in enumerate(RECORDS["OpenHands' SDK"]["events"]):
            (tmp_path / folder / f"event-{number:05}-x{number}.json").write_text(json.dumps(event))
    samples = list(SampleReader([tmp_path / "*" / "event-*.json"], Trajectories()))
    assert [sample.messages for sample in samples] == [EXPECTED] * 2
    (tmp_path / "bad.json").write_text('{"messages": [\n{"role"')
    with pytest.raises(DataError, match=r"bad.json: .*expected JSON"):
        list(SampleReader([tmp_path / "bad.json"], Trajectories()))


@pytest.mark.parametrize(
    ("importer", "record", "message"),
    [
        (Trajectories(), {"trajectory": []}, r"\$: expected messages, or a trajectory"),
        (OpenAIMessages(), {}, r"\$.messages: expected a list of messages, got None"),
        (OpenAIMessages(), {"messages": [{"role": "robot"}]}, r"\$.messages\[0\].role: expected one of"),
        (OpenAIMessages(), {"messages": ["hi"]}, r"\$.messages\[0\]: expected an object, got 'hi'"),
        (OpenAIMessages(), {"messages": "["}, r"\$.messages: expected JSON"),
        (
            OpenAIMessages(),
            {"messages": [{"role": "user", "content": 3}]},
            r"\$.messages\[0\].content: expected a string",
        ),
        (
            OpenAIMessages(),
            {"messages": [USER, DONE], "tools": [3]},
            r"\$.tools\[0\]: expected a tool with a name, got 3",
        ),
        (ATIFTrajectories(), {"steps": []}, r"\$.schema_version: expected ATIF-v1.x, got None"),
        (
            ATIFTrajectories(),
            {"schema_version": "ATIF-v1.4", "steps": [{"source": "tool"}]},
            r"\$.steps\[0\].source: expected system, user or agent",
        ),
        (ShareGPT(), {"conversations": [{"from": "x", "value": ""}]}, r"\$.conversations\[0\].role: expected one of"),
    ],
)
def test_a_broken_record_names_the_json_path_and_what_was_expected(importer, record, message):
    with pytest.raises(DataError, match=message):
        importer.convert(record)


def test_a_file_of_tools_is_for_records_without_and_a_missing_one_is_a_mistake_of_the_config(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([BASH]))
    assert Trajectories(tools=tmp_path / "tools.json").convert({"messages": [USER, DONE]}).tools == TOOLS
    with pytest.raises(ConfigError, match="tools: expected a JSON list of tools"):
        Trajectories(tools=tmp_path / "none.json").convert({"messages": [USER, DONE]})


@pytest.mark.parametrize(
    ("task_id", "repository"),
    [
        ("django__django-12345", "django/django"),
        ("scikit-learn__scikit-learn-9", "scikit-learn/scikit-learn"),
        ("oauthlib__oauthlib.1fd52536.combine_file__09vlzwgc", "oauthlib/oauthlib"),
        (f"instance_NodeBB__NodeBB-{'0' * 40}-vnan", "NodeBB/NodeBB"),
        ("django__django-11099-3", "django/django"),
        ("sweb.eval.x86_64.django_1776_django-11099", "django/django"),
        ("terminal-train-00001", ""),
        ("", ""),
    ],
)
def test_repositories_are_read_from_instance_ids(task_id, repository):
    assert repository_of(task_id) == repository
