"""The terminal harness on a real tmux session in a real sandbox."""

import pickle

import jsonschema
import pytest

from north_lightning.errors import InvalidActionError
from north_lightning.harnesses import ReActTerminalHarness
from north_lightning.types import AssistantAction, ToolCall


def outputs(steps):
    return [result.content for step in steps for result in step.results]


def test_commands_share_one_shell_and_only_new_output_is_shown(play, call):
    steps = play(
        ReActTerminalHarness(),
        call("terminal", keystrokes="cd pkg\n"),
        call("terminal", keystrokes="x=blue"),
        call("terminal", keystrokes="ls; echo $x"),
        call("terminal", keystrokes="pwd"),
    )
    assert outputs(steps) == ["(no output)", "(no output)", "deep.txt\nblue", "/work/pkg"]
    assert not any(step.done for step in steps)


def test_a_result_answers_the_id_of_its_call(play):
    action = AssistantAction(tool_calls=(ToolCall("17", "terminal", {"keystrokes": "true"}),))
    assert play(ReActTerminalHarness(), action)[0].results[0].tool_call_id == "17"


def test_an_answer_without_a_call_ends_the_attempt(play, call):
    steps = play(ReActTerminalHarness(), call("terminal", keystrokes="true"), AssistantAction(content="Done."))
    assert [step.done for step in steps] == [False, True]
    assert steps[1].results == ()


@pytest.mark.parametrize(
    "action",
    [
        AssistantAction(tool_calls=(ToolCall("0", "terminal", {"keystrokes": "a"}),) * 2),
        AssistantAction(tool_calls=(ToolCall("0", "shell", {"keystrokes": "a"}),)),
        AssistantAction(tool_calls=(ToolCall("0", "terminal", {}),)),
        AssistantAction(tool_calls=(ToolCall("0", "terminal", {"keystrokes": 3}),)),
        AssistantAction(tool_calls=(ToolCall("0", "terminal", {"keystrokes": "a", "more": 1}),)),
        AssistantAction(tool_calls=(ToolCall("0", "terminal", {"keystrokes": "\ud800"}),)),
        AssistantAction(content=" \n", reasoning="hm"),
        AssistantAction(),
    ],
)
def test_anything_but_one_fitting_call_or_an_answer_is_invalid(action, play):
    with pytest.raises(InvalidActionError):
        play(ReActTerminalHarness(), action)


def test_a_command_that_goes_on_can_be_interrupted(play, call):
    steps = play(
        ReActTerminalHarness(command_timeout_s=0.5),
        call("terminal", keystrokes="echo started; sleep 1000"),
        call("terminal", keystrokes="C-c"),
        call("terminal", keystrokes="echo again"),
    )
    running, _, again = outputs(steps)
    assert "started" in running
    assert running.endswith("(still running)")
    assert again == "again"


def test_typing_after_the_shell_has_ended_is_the_models_mistake(play, call):
    steps = play(ReActTerminalHarness(), call("terminal", keystrokes="exit"))
    assert outputs(steps)[0].endswith("(the shell has ended)")
    with pytest.raises(InvalidActionError):
        play(ReActTerminalHarness(), call("terminal", keystrokes="exit"), call("terminal", keystrokes="ls"))


def test_long_output_is_cut_to_the_set_length(play, call):
    [output] = outputs(play(ReActTerminalHarness(max_output_bytes=500), call("terminal", keystrokes="seq 9999")))
    assert len(output) < 700
    assert output.startswith("1\n2\n")
    assert output.endswith("9998\n9999")


def test_the_prompt_is_a_system_message_the_instruction_and_one_strict_tool(task):
    prompts = [ReActTerminalHarness().prompt(task, variation) for variation in range(4)]
    for prompt in prompts:
        assert [message.role for message in prompt.messages] == ["system", "user"]
        assert prompt.messages[1].content == task.instruction
        [tool] = prompt.tools
        assert tool.name == "terminal"
        assert tool.parameters["additionalProperties"] is False
        jsonschema.Draft202012Validator.check_schema(tool.parameters)
    wordings = [prompt.messages[0].content for prompt in prompts]
    assert len(set(wordings)) == 3
    assert wordings[0] == wordings[3]


def test_the_harness_travels_to_another_process():
    harness = pickle.loads(pickle.dumps(ReActTerminalHarness(command_timeout_s=3.0)))
    assert harness.command_timeout_s == 3.0
