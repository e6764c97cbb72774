"""Each check finds its fault and nothing else."""

import datetime
from dataclasses import replace

import pytest

from north_lightning.chat import ChatFormat, train_tokenizer
from north_lightning.data import SampleFilter
from north_lightning.data.filters import (
    ErroneousWhitespace,
    FailedVerification,
    NothingToTrain,
    TooLong,
    default_filters,
)
from north_lightning.types import Conversation, Message, ToolCall, ToolSpec

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
    """Every reason there is to drop ``sample``; each fault says where it is."""
    found = {check.reason: check.find_fault(sample) for check in default_filters()}
    assert all(": " in fault for fault in found.values() if fault is not None)
    return [reason for reason, fault in found.items() if fault is not None]


@pytest.mark.parametrize(
    "sample",
    [
        conversation(say("", calls=[call()]), result(), say()),
        conversation(say("", calls=[call("a"), call("b")]), result("b"), result("a"), say()),
        conversation(say("", calls=[call()])),  # the last call may stay unanswered
        conversation(say("def f():\n\n\n    return 1")),
        conversation(say("a < b | c > d <|> <x|y> <eos>")),
        conversation(say("10\u00a0km \U0001f468\u200d\U0001f4bb \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645")),
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
    ],
)
def test_calls_outside_the_tools_or_with_an_id_twice_are_invalid(calls, results):
    assert "invalid_tool_call" in reasons(conversation(say("", calls=calls), *map(result, results), say()))


@pytest.mark.parametrize(
    ("calls", "results"),
    [([call()], ["1"]), ([call()], []), ([call()], ["0", "0"]), ([call("a"), call("b")], ["a"])],
)
def test_calls_and_results_that_do_not_pair_up_are_found(calls, results):
    assert "unpaired_tool_result" in reasons(conversation(say("", calls=calls), *map(result, results), say()))


def test_a_result_that_comes_after_another_message_is_invalid():
    late = conversation(say("", calls=[call()]), Message("user", "Well?"), result(), say())
    assert "unpaired_tool_result" in reasons(late)


def test_a_result_without_a_call_and_a_broken_schema_are_found():
    assert "unpaired_tool_result" in reasons(conversation(result(), say()))
    broken = (ToolSpec("shell", "Run.", {"type": "nonsense"}),)
    assert reasons(conversation(say(), tools=broken)) == ["invalid_tool_call"]


@pytest.mark.parametrize(
    "text", [" x", "x\n", "a\r\nb", "a\x00b", "a\u200bb", "a\n\n\n\n\nb", "a" + " " * 120 + "b", "\ufeffa"]
)
def test_erroneous_whitespace_is_found_in_content_and_reasoning(text):
    assert reasons(conversation(say(text))) == ["erroneous_whitespace"]
    assert reasons(conversation(say(reasoning=text))) == ["erroneous_whitespace"]


@pytest.mark.parametrize(
    "marker",
    [
        "<|END_OF_TURN_TOKEN|>",
        "<|START_ACTION|>",
        "<BOS_TOKEN>",
        "<|SOME_OTHER|>",
        "<PAD>",
        "<|im_start|>",
        "<|END_OF_TURN_TOKEN|",
        "< |START_TEXT|>",
        "|end_thinking|>",
        "<START_ACTION>",
    ],
)
def test_control_markers_are_found_everywhere_but_in_tool_results(marker):
    assert reasons(conversation(say(f"a {marker} b"))) == ["control_marker"]
    assert reasons(conversation(say(reasoning=marker))) == ["control_marker"]
    assert reasons(conversation(say("", calls=[call(command=marker)])))[0] == "control_marker"
    assert reasons(conversation(Message("user", marker), say())) == ["control_marker"]
    assert reasons(conversation(say("", calls=[call()]), result(content=marker), say())) == []


def test_content_beside_tool_calls_and_empty_conversations_are_found():
    assert reasons(conversation(say("text", calls=[call()]))) == ["content_beside_tool_calls", "round_trip"]
    assert reasons(conversation()) == ["nothing_to_train"]
    assert reasons(conversation(say("", ""))) == ["nothing_to_train"]


@pytest.mark.parametrize(
    "text", ["It is <co: 0>so</co: 0:[1]>.", "See 【4†source】.", "As shown [citation:3].", "As shown[^2]."]
)
def test_citations_that_point_nowhere_are_found(text):
    assert reasons(conversation(say(text))) == ["hallucinated_citation"]
    assert reasons(conversation(say("", calls=[call()]), result(content=text), say())) == []


def test_footnotes_that_are_written_out_and_indices_are_no_citations():
    assert reasons(conversation(say("As shown[^2]; `rows[0]`, a[1][2].\n\n[^2]: In the log."))) == []


def test_a_call_over_and_over_is_a_loop_only_with_the_same_result():
    def turns(times, content):
        calls = [(say("", calls=[call(str(i))]), result(str(i), content(i))) for i in range(times)]
        return conversation(*(message for pair in calls for message in pair), say())

    assert reasons(turns(4, lambda i: "same")) == ["repetition_loop"]
    assert reasons(turns(3, lambda i: "same")) == []
    assert reasons(turns(9, lambda i: f"poll {i}")) == []


@pytest.mark.parametrize("phrase", ["again ", "Let me check the file once more. ", "a b c d e f g h i j k l m "])
def test_words_that_go_round_in_circles_are_a_loop(phrase):
    assert reasons(conversation(say("I see. " + (phrase * 40).strip()))) == ["repetition_loop"]
    assert reasons(conversation(say("I see. " + (phrase * 3).strip()))) == []


def test_tables_and_lists_are_no_loops():
    table = "\n".join(f"| row {i} | --- | {i * i} |" for i in range(40))
    assert reasons(conversation(say(table + "\nDone."))) == []


@pytest.mark.parametrize("text", ["So:\n```python\nx = 1", "The files are a,", "call f("])
def test_endings_in_the_middle_are_found(text):
    assert reasons(conversation(say(text))) == ["truncated_ending"]


def test_what_follows_the_assistants_last_turn_does_not_matter():
    assert reasons(conversation(say("", calls=[call()]), result())) == []
    assert reasons(conversation(say(), Message("user", "And now?"))) == []
    assert reasons(conversation(say("call f("), Message("user", "And now?"))) == ["truncated_ending"]


@pytest.mark.parametrize("wrong", [say(" x"), say("", calls=[call(name="missing")]), say("As shown[^2].")])
def test_a_turn_that_is_not_learned_is_not_judged(wrong):
    assert reasons(conversation(wrong, *map(result, [c.id for c in wrong.tool_calls]), say())) != []
    wrong = replace(wrong, trained=False)
    assert reasons(conversation(wrong, *map(result, [c.id for c in wrong.tool_calls]), say())) == []
    assert reasons(conversation(replace(say(), trained=False))) == ["nothing_to_train"]


@pytest.mark.parametrize("command", [2**70, "half \ud800", float("inf")])
def test_calls_that_do_not_survive_rendering_and_parsing_are_found(command):
    tools = (ToolSpec("shell", "Run.", {"type": "object"}),)
    assert "round_trip" in reasons(conversation(say("", calls=[call(command=command)]), tools=tools))


def test_a_rejected_result_is_dropped_and_an_unchecked_one_where_checks_are_required():
    def verified(verdict):
        return Conversation(conversation(say()).messages, verified=verdict)

    assert [reasons(verified(verdict)) for verdict in (None, True, False)] == [[], [], ["failed_verification"]]
    required = FailedVerification(required=True)
    assert [required.find_fault(verified(verdict)) is None for verdict in (None, True, False)] == [False, True, False]


def test_a_sample_of_exactly_the_limit_is_not_too_long(tmp_path):
    tokenizer = train_tokenizer(["Do it. Fine. So it is."], [], 400, tmp_path)
    sample = conversation(say())
    length = len(ChatFormat(tokenizer, True).encode_conversation(sample.messages, sample.tools).token_ids)
    assert TooLong(length, tmp_path).find_fault(sample) is None
    assert TooLong(length - 1, tmp_path).find_fault(sample) == f"tokens: {length}, more than {length - 1}"


def test_filter_passes_sound_samples_in_order_and_counts_the_others_once():
    good = [conversation(say(str(i))) for i in range(3)]
    bad = [conversation(say("<PAD> ")), conversation(say("", ""))]
    fit = SampleFilter()
    assert list(fit([good[0], bad[0], good[1], bad[1], good[2]])) == good
    assert fit.kept == 3
    assert fit.dropped == {"erroneous_whitespace": 1, "nothing_to_train": 1}


def test_only_the_chosen_checks_are_applied():
    fit = SampleFilter([NothingToTrain()])
    assert len(list(fit([conversation(say(" x")), conversation()]))) == 1
    assert fit.examples == {"nothing_to_train": [{"source": "", "task_id": "", "detail": FAULT}]}
    assert ErroneousWhitespace().find_fault(conversation(say(" x"))) == "messages[1].content: ' ' at character 0"


FAULT = "messages: no words and no calls by the assistant"


@pytest.mark.parametrize("schema", [{"$ref": "#/definitions/none"}, {"$ref": "http://127.0.0.1:9/x"}, {"$ref": "#"}])
def test_references_of_a_schema_that_lead_nowhere_are_a_fault_and_are_not_fetched(schema, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("fetched"))
    sample = conversation(say("", calls=[call()]), result(), say(), tools=(ToolSpec("shell", "", schema),))
    assert reasons(sample) == ["invalid_tool_call"]


def test_values_that_json_does_not_know_are_a_fault():
    day = datetime.date(2020, 1, 1)  # as parquet holds them
    called = conversation(say("", calls=[call(command=day)]), result(), say())
    offered = conversation(say(), tools=(ToolSpec("shell", "", {"default": day}),))
    assert "round_trip" in reasons(called)
    assert "round_trip" in reasons(offered)
