"""SWE-agent's loop on a real repository in a real sandbox."""

import pickle
import time

import jsonschema
import pytest

from north_lightning.errors import InvalidActionError
from north_lightning.harnesses import SWEAgentHarness
from north_lightning.harnesses.prompts import SWE_REVIEW
from north_lightning.types import AssistantAction, ToolCall


def outputs(steps):
    contents = [result.content for step in steps for result in step.results]
    assert all(content.startswith("OBSERVATION:\n") for content in contents)
    return [content.removeprefix("OBSERVATION:\n") for content in contents]


def test_bash_keeps_its_directory_and_variables_and_says_when_nothing_was_printed(play, call):
    steps = play(
        SWEAgentHarness(),
        call("bash", command="cd pkg; x=blue"),
        call("bash", command="pwd; echo $x; echo oops >&2; false"),
    )
    assert outputs(steps) == ["(no output)", "/work/pkg\nblue\noops"]


def test_the_first_submit_shows_the_changes_for_review_and_the_second_ends(play, call):
    fix = {"old_str": "a - b", "new_str": "a + b"}
    steps = play(
        SWEAgentHarness(),
        call("str_replace_editor", command="str_replace", path="/work/calc.py", **fix),
        call("bash", command="cd pkg && echo new > added.txt"),
        call("submit"),
        call("bash", command="true"),
        call("submit"),
    )
    assert [step.done for step in steps] == [False, False, False, False, True]
    review = outputs(steps)[2]
    assert "-    return a - b\n+    return a + b" in review
    assert "pkg/added.txt" in review
    assert "+new" in review
    assert review.endswith(SWE_REVIEW)
    assert steps[-1].results == ()


def test_a_submit_without_changes_asks_for_the_review_all_the_same(play, call):
    steps = play(SWEAgentHarness(), call("submit"), call("submit"))
    assert outputs(steps) == [SWE_REVIEW]
    assert steps[-1].done


@pytest.mark.parametrize(
    "action",
    [
        AssistantAction(content="I am done."),
        AssistantAction(tool_calls=(ToolCall("0", "bash", {"command": "a"}), ToolCall("1", "submit", {}))),
        AssistantAction(tool_calls=(ToolCall("0", "bash", {}),)),
        AssistantAction(tool_calls=(ToolCall("0", "python", {"command": "a"}),)),
        AssistantAction(tool_calls=(ToolCall("0", "submit", {"force": True}),)),
        AssistantAction(tool_calls=(ToolCall("0", "str_replace_editor", {"command": "delete", "path": "a"}),)),
        AssistantAction(
            tool_calls=(ToolCall("0", "str_replace_editor", {"command": "view", "path": "a", "view_range": [1]}),)
        ),
    ],
)
def test_a_turn_that_is_not_exactly_one_fitting_call_is_invalid(action, play):
    with pytest.raises(InvalidActionError):
        play(SWEAgentHarness(), action)


def test_a_command_is_stopped_at_its_limit_and_three_in_a_row_end_the_attempt(play, call):
    harness = SWEAgentHarness(command_timeout_s=0.3)
    sleep, other = call("bash", command="sleep 1000"), call("bash", command="echo on")
    started = time.monotonic()
    steps = play(harness, sleep, sleep, other, sleep, sleep, sleep)
    assert time.monotonic() - started < 10
    assert [step.done for step in steps] == [False, False, False, False, False, True]
    assert "killed" in outputs(steps)[0]
    assert outputs(steps)[2] == "on"


def test_the_limit_of_all_commands_together_ends_the_attempt_as_it_stands(play, call):
    harness = SWEAgentHarness(total_timeout_s=0.5, command_timeout_s=20)
    started = time.monotonic()
    steps = play(harness, call("bash", command="echo a"), call("bash", command="sleep 1000"))
    assert time.monotonic() - started < 10
    assert [step.done for step in steps] == [False, True]


def test_long_observations_are_cut_at_the_set_length(play, call):
    harness = SWEAgentHarness(max_observation_chars=50)
    [output] = outputs(play(harness, call("bash", command="seq 1000")))
    assert output.startswith("1\n2\n3\n")
    assert len(output) < 150
    assert "left out" in output


def test_the_prompt_names_the_repository_and_the_issue_in_three_wordings(task):
    prompts = [SWEAgentHarness().prompt(task, variation) for variation in range(4)]
    for prompt in prompts:
        assert [message.role for message in prompt.messages] == ["system", "user"]
        assert task.instruction in prompt.messages[1].content
        assert "/work" in prompt.messages[1].content
        assert [tool.name for tool in prompt.tools] == ["bash", "str_replace_editor", "submit"]
        for tool in prompt.tools:
            assert tool.parameters["additionalProperties"] is False
            jsonschema.Draft202012Validator.check_schema(tool.parameters)
    assert len({prompt.messages[1].content for prompt in prompts}) == 3
    assert prompts[0] == prompts[3]


def test_an_issue_with_braces_is_passed_on_as_it_is(task):
    from dataclasses import replace

    odd = replace(task, instruction="{repository} {0} {{x}} fails")
    assert "{repository} {0} {{x}} fails" in SWEAgentHarness().prompt(odd).messages[1].content


def test_the_harness_travels_to_another_process():
    harness = pickle.loads(pickle.dumps(SWEAgentHarness(total_timeout_s=3.0)))
    assert harness.total_timeout_s == 3.0
