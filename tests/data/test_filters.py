"""Each check finds its fault and nothing else."""

import pytest

from north_lightning.data import Conversation, SampleFilter
from north_lightning.data.filters import CHECKS
from north_lightning.types import Message, ToolCall, ToolSpec

SCHEMA = {
    "type": "object",
    "properties": {"command": {"type": "string"}},
    "required": ["command"],
    "additionalProperties": False,
}
TOOLS = (ToolSpec("shell", "Run.", SCHEMA),)


def call(id="0", name="shell", **arguments):
    return ToolCall(id, name, arguments or {"command": "ls\x03\n "})


def say(content="Fine.", reasoning="I think.\n\nSo it is.", calls=()):
    return Message("assistant", content, reasoning, tuple(calls))


def result(id="0", content="<|END_TURN|>\r\n\x1b[0m"):
    return Message("tool", content, tool_call_id=id)


def conversation(*messages, tools=TOOLS):
    return Conversation((Message("user", "Do it.\r\n"), *messages), tools)


def reasons(sample):
    return [reason for reason, check in CHECKS.items() if check(sample)]


@pytest.mark.parametrize(
    "sample",
    [
        conversation(say("", calls=[call()]), result(), say()),
        conversation(say("", calls=[call("a"), call("b")]), result("b"), result("a"), say()),
        conversation(say("", calls=[call()])),  # the last call may stay unanswered
        conversation(say("def f():\n\n\n    return 1")),
        conversation(say("a < b | c > d <|> <x|y> <eos>")),
    ],
)
def test_sound_conversations_have_no_fault(sample):
    assert reasons(sample) == []


@pytest.mark.parametrize(
    ("calls", "results"),
    [
        ([call(name="missing")], ["0"]),
        ([call(command=3)], ["0"]),
        ([call(cmd="ls")], ["0"]),
        ([call(command="ls", extra=1)], ["0"]),
        ([call(), call()], ["0"]),
        ([call()], ["1"]),
        ([call()], []),
        ([call()], ["0", "0"]),
        ([call("a"), call("b")], ["a"]),
    ],
)
def test_calls_outside_the_tools_or_without_their_result_are_invalid(calls, results):
    assert reasons(conversation(say("", calls=calls), *map(result, results), say())) == ["invalid_tool_call"]


def test_a_result_that_comes_after_another_message_is_invalid():
    late = conversation(say("", calls=[call()]), Message("user", "Well?"), result(), say())
    assert reasons(late) == ["invalid_tool_call"]


def test_a_result_without_a_call_and_a_broken_schema_are_invalid():
    assert reasons(conversation(result(), say())) == ["invalid_tool_call"]
    broken = (ToolSpec("shell", "Run.", {"type": "nonsense"}),)
    assert reasons(conversation(say(), tools=broken)) == ["invalid_tool_call"]


@pytest.mark.parametrize(
    "text", [" x", "x\n", "a\r\nb", "a\x00b", "a\u00a0b", "a\u200bb", "a\n\n\n\n\nb", "a" + " " * 120 + "b", "\ufeffa"]
)
def test_erroneous_whitespace_is_found_in_content_and_reasoning(text):
    assert reasons(conversation(say(text))) == ["erroneous_whitespace"]
    assert reasons(conversation(say(reasoning=text))) == ["erroneous_whitespace"]


@pytest.mark.parametrize(
    "marker", ["<|END_OF_TURN_TOKEN|>", "<|START_ACTION|>", "<BOS_TOKEN>", "<|SOME_OTHER|>", "<PAD>"]
)
def test_control_markers_are_found_everywhere_but_in_tool_results(marker):
    assert reasons(conversation(say(f"a {marker} b"))) == ["control_marker"]
    assert reasons(conversation(say(reasoning=marker))) == ["control_marker"]
    assert reasons(conversation(say("", calls=[call(command=marker)]))) == ["control_marker"]
    assert reasons(conversation(Message("user", marker), say())) == ["control_marker"]
    assert reasons(conversation(say("", calls=[call()]), result(content=marker), say())) == []


def test_content_beside_tool_calls_and_empty_conversations_are_found():
    assert reasons(conversation(say("text", calls=[call()]))) == ["content_beside_tool_calls"]
    assert reasons(conversation()) == ["nothing_to_train"]
    assert reasons(conversation(say("", ""))) == ["nothing_to_train"]


def test_filter_passes_sound_samples_in_order_and_counts_the_others_once():
    good = [conversation(say(str(i))) for i in range(3)]
    bad = [conversation(say("<PAD> ")), conversation()]
    fit = SampleFilter()
    assert list(fit([good[0], bad[0], good[1], bad[1], good[2]])) == good
    assert fit.kept == 3
    assert fit.dropped == {"erroneous_whitespace": 1, "nothing_to_train": 1}


def test_only_the_chosen_checks_are_applied():
    fit = SampleFilter(["nothing_to_train"])
    assert len(list(fit([conversation(say(" x")), conversation()]))) == 1
