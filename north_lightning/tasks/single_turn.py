"""Single-turn samples for the first SFT stage: a question, and the shell command or word that answers it.

Every command is run in the sandbox before it may be trained on: setup, command, check.
Out: conversations of a user's question and an assistant's answer, with the names of one split only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from north_lightning.errors import TaskError
from north_lightning.interfaces import SandboxProvider
from north_lightning.sandbox.scratch import Scratch
from north_lightning.tasks.names import NameSource, Split
from north_lightning.types import Message

CHECKS_PER_SANDBOX = 200
CHECK_TIMEOUT_S = 120.0
NUMBER_SHARE = 0.25
"""Of a word question's words. Digits repeat, so copying a number is harder than copying a name, and learnt later."""


@dataclass(frozen=True, slots=True)
class Question:
    """``setup`` and ``check`` are bash; an empty check means that the answer is a word, not a command."""

    source: str  # "commands" or "words"
    text: str
    answer: str
    setup: str = ""
    check: str = ""

    @property
    def messages(self) -> tuple[Message, ...]:
        return (Message("user", self.text), Message("assistant", self.answer))


def command_question(index: int, seed: int, split: Split) -> Question:
    """Question number ``index`` about a shell command: a pure function of its arguments."""
    rng = random.Random(f"commands/{seed}/{split}/{index}")
    names = NameSource(rng, split)
    a, b, c = names.name(), names.name(), names.name()
    rows = (
        (f"delete {a}", f"rm {a}", f"touch {a} {b}", f"[ ! -e {a} ] && [ -e {b} ]"),
        (f"rename {a} to {b}", f"mv {a} {b}", f"touch {a}", f"[ -e {b} ] && [ ! -e {a} ]"),
        (f"show {a}", f"cat {a}", f"echo {b} > {a}", f'[ "$output" = {b} ]'),
        (f"list {a}", f"ls {a}", f"mkdir {a}; touch {a}/{b}", f'[ "$output" = {b} ]'),
        (f"make the directory {a}", f"mkdir {a}", "", f"[ -d {a} ]"),
        (f"find {a}", f"find -name {a}", f"mkdir {b}; touch {b}/{a}", f'[ "$output" = ./{b}/{a} ]'),
        (f"find files that contain {a}", f"grep -l {a} *", f"echo {a} > {b}; touch {c}", f'[ "$output" = {b} ]'),
        (f"show where {a} links to", f"readlink {a}", f"ln -s {b} {a}", f'[ "$output" = {b} ]'),
        (f"run {a}.sh", f"sh {a}.sh", f"echo echo {b} > {a}.sh", f'[ "$output" = {b} ]'),
        (f"write {a} to {b}", f"echo {a} > {b}", "", f'[ "$(<{b})" = {a} ]'),
        (f"append {a} to {b}", f"echo {a} >> {b}", f"echo {c} > {b}", f"[ \"$(<{b})\" = $'{c}\\n{a}' ]"),
        (f"show {a} in {b}", f"grep {a} {b}", f"echo {a}={c} > {b}", f'[ "$output" = {a}={c} ]'),
        (
            f"move {b} in {a} to {c}",
            f"mv {a}/{b} {c}",
            f"mkdir {a} {c}; touch {a}/{b}",
            f"[ -e {c}/{b} ] && [ ! -e {a}/{b} ]",
        ),
        (f"move {b} in {a} here", f"mv ./{a}/{b} .", f"mkdir {a}; touch {a}/{b}", f"[ -e {b} ] && [ ! -e {a}/{b} ]"),
        (f"make {b} in {a} executable", f"chmod +x {a}/{b}", f"mkdir {a}; touch {a}/{b}", f"[ -x {a}/{b} ]"),
    )
    wish, answer, setup, check = rows[index % len(rows)]
    return Question("commands", f"Write a command to {wish}.", answer, setup, check)


def word_question(index: int, seed: int, split: Split) -> Question:
    """Question number ``index`` that is answered with words of the question."""
    rng = random.Random(f"words/{seed}/{split}/{index}")
    names = NameSource(rng, split)
    words = [str(names.number()) if rng.random() < NUMBER_SHARE else names.name() for _ in range(6)]
    rows = (("Repeat", words), ("Reverse", words[::-1]), ("Last first", words[-1:] + words[:-1]))
    wish, answer = rows[index % len(rows)]
    return Question("words", f"{wish}: {' '.join(words)}", " ".join(answer))


async def verify_commands(questions: Sequence[Question], sandboxes: SandboxProvider) -> None:
    """Run every command question in the sandbox; ``TaskError`` names the first whose check does not hold."""
    commands = [question for question in questions if question.check]
    for start in range(0, len(commands), CHECKS_PER_SANDBOX):
        batch = commands[start : start + CHECKS_PER_SANDBOX]
        with Scratch("task") as folder:
            (folder / "empty").mkdir()
            sandbox = await sandboxes.open(folder / "empty")
            try:
                result = await sandbox.run("\n".join(map(_check_script, range(len(batch)), batch)), CHECK_TIMEOUT_S)
            finally:
                await sandbox.close()
        passed = set(result.output.split())
        for number, question in enumerate(batch):
            if f"ok-{number}" not in passed:
                raise TaskError(f"the answer {question.answer!r} to {question.text!r} does not do what it should")


def _check_script(number: int, question: Question) -> str:
    return (
        f"mkdir /work/q{number}; cd /work/q{number}\n{question.setup}\n"
        f"output=$({question.answer} 2>&1)\n{question.check} && echo ok-{number}"
    )
