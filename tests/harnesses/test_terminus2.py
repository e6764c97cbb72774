"""Terminus 2: the parser against the agent's own, and its loop on a real terminal."""

import json
from pathlib import Path

import pytest
from peers.terminus_replies import REPLIES

from north_lightning.errors import InvalidActionError
from north_lightning.harnesses import Terminus2Harness
from north_lightning.harnesses.terminus2 import FIRST_SCREEN, NEW_OUTPUT, SCREEN, head_and_tail
from north_lightning.harnesses.terminus_reply import read_reply
from north_lightning.types import AssistantAction

PEER = json.loads((Path(__file__).parent / "peers" / "terminus2.json").read_text())


def reply(*keystrokes: str, duration: float = 1.0, complete: bool = False) -> AssistantAction:
    commands = [{"keystrokes": text, "duration": duration} for text in keystrokes]
    return AssistantAction(
        content=json.dumps({"analysis": "", "plan": "", "commands": commands, "task_complete": complete})
    )


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_is_read_as_terminus_reads_it(name):
    read = read_reply(REPLIES[name])
    assert {
        "commands": [[command.text, command.duration_s] for command in read.commands],
        "complete": read.is_complete,
        "is_error": read.error is not None,
        "num_warnings": len(read.warnings),
    } == PEER[name]


def test_only_what_is_new_is_shown_from_the_last_prompt_on(play):
    steps = play(Terminus2Harness(), reply("ls\n"), reply("echo a\n", "echo b\n"), reply())
    first, second, third = [step.message for step in steps]
    assert first.rstrip("\n") == "New Terminal Output:\n$ ls\ncalc.py  pkg\n$"
    assert second.rstrip("\n") == "New Terminal Output:\n\n$ echo a\na\n$ echo b\nb\n$"
    assert third.rstrip("\n") == "New Terminal Output:\n\n$"


def test_a_task_is_complete_when_that_is_said_twice_in_a_row(play):
    done = reply(complete=True)
    steps = play(Terminus2Harness(), done, reply("true\n"), done, done)
    assert [step.done for step in steps] == [False, False, False, True]
    assert steps[0].message.startswith("Current terminal state:\nNew Terminal Output:")


def test_the_prompt_shows_the_screen_a_terminal_really_has(play, task):
    assert FIRST_SCREEN in Terminus2Harness().prompt(task).messages[0].content
    [step] = play(Terminus2Harness(), reply("clear\n"))
    assert step.message.removeprefix(NEW_OUTPUT) == FIRST_SCREEN.removeprefix(SCREEN)


def test_a_command_that_runs_on_can_be_waited_for_and_interrupted(play):
    steps = play(
        Terminus2Harness(), reply("sleep 1; echo slept\n", duration=0.1), reply("", duration=20),
        reply("cat\n", duration=0.2),
        reply("C-c"),
    )  # fmt: skip
    assert "\nslept\n" not in steps[0].message
    assert "\nslept\n$" in steps[1].message
    assert steps[3].message.rstrip("\n").endswith("^C\n$")


def test_a_reply_that_cannot_be_read_is_invalid_and_answered(play):
    with pytest.raises(InvalidActionError, match="ERROR: No valid JSON"):
        play(Terminus2Harness(), AssistantAction(content="ls"))


def test_floods_and_bytes_that_are_no_text_are_cut_to_the_cap(play):
    [flood, odd, more] = play(
        Terminus2Harness(),
        reply("seq 9000\n", duration=20),
        reply("printf '\\xff\\xfe'\n"),
        reply("seq 100000\n", duration=20),
    )
    assert more.message.startswith("Current Terminal Screen:\n")
    assert more.message.rstrip("\n").endswith("\n100000\n$")
    assert 9_900 < len(flood.message.encode()) < 10_200
    assert flood.message.rstrip("\n").endswith("\n9000\n$")
    odd.message.encode()


def test_the_cut_keeps_whole_characters():
    cut = head_and_tail("é" * 100, 21)
    assert cut == "é" * 5 + "\n[... output limited to 21 bytes; 180 interior bytes omitted ...]\n" + "é" * 5
