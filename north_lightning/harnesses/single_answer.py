"""Questions that are answered in words: no tools, and the code in an answer is the solution.

In: a task whose ``[metadata]`` names the ``answer_files`` (one for each question) and the ``follow_ups``, the questions
after the first. Out: each answer's code, written to its file in ``/work``. A later question shows the code of earlier
ones where it says ``{{answer 1}}``. The attempt ends with the last answer, whatever it is.

What counts as the code is a benchmark's convention, ``answer_form``: ``last_block`` (LiveCodeBench) is what stands
between the last two lines with a fence, and nothing if there are none; ``first_python_block`` (SciCode) is the first
block, without its import lines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping

from north_lightning.errors import InvalidActionError, SandboxError
from north_lightning.interfaces import Harness, HarnessSession, Sandbox
from north_lightning.types import AssistantAction, Message, Prompt, Step, Task

FENCE = "```"
_EARLIER = re.compile(r"\{\{answer (\d+)\}\}")
_IMPORT = re.compile(r"^\s*(import .*|from .*\s+import\s+.*)", re.MULTILINE)


def last_block(answer: str) -> str:
    lines = answer.split("\n")
    fences = [number for number, line in enumerate(lines) if FENCE in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else ""


def first_python_block(answer: str) -> str:
    opening = f"{FENCE}python" if f"{FENCE}python" in answer else FENCE
    code = answer.split(opening)[1].split(FENCE)[0] if opening in answer else answer
    return _IMPORT.sub("", code)


FORMS: Mapping[str, Callable[[str], str]] = {"last_block": last_block, "first_python_block": first_python_block}


class SingleAnswerHarness(Harness):
    """One answer to each of the task's questions; no tools. A tool call ends the attempt with reward 0."""

    name = "single_answer"

    def prompt(self, task: Task, variation: int = 0) -> Prompt:
        system = task.metadata.get("system")
        messages = (Message("system", str(system)),) if system else ()
        return Prompt((*messages, Message("user", task.instruction)))

    async def open(self, task: Task, sandbox: Sandbox) -> HarnessSession:
        return SingleAnswerSession(task, sandbox)


class SingleAnswerSession(HarnessSession):
    """One attempt: the code of the answers so far."""

    def __init__(self, task: Task, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self._files: list[str] = task.metadata.get("answer_files", ["solution.py"])
        self._follow_ups: list[str] = task.metadata.get("follow_ups", [])
        self._code_of = FORMS[task.metadata.get("answer_form", "last_block")]
        self._answers: list[str] = []

    async def act(self, action: AssistantAction) -> Step:
        if action.tool_calls:
            raise InvalidActionError("expected an answer in words, got a tool call: there are no tools")
        code = self._code_of(action.content)
        await write(self.sandbox, f"/work/{self._files[len(self._answers)]}", code)
        self._answers.append(code)
        if len(self._answers) > len(self._follow_ups):
            return Step(done=True)
        question = self._follow_ups[len(self._answers) - 1]
        return Step(message=_EARLIER.sub(lambda mark: self._answers[int(mark[1]) - 1], question))

    async def close(self) -> None: ...


async def write(sandbox: Sandbox, path: str, text: str) -> None:
    """``text`` as the file ``path`` inside; half characters become question marks."""
    process = await sandbox.spawn(["bash", "-c", f"cat > {shlex.quote(path)}"])
    said, _ = await process.communicate(text.encode(errors="replace"))
    if await process.wait() != 0:
        raise SandboxError(f"{path} cannot be written: {said.decode(errors='replace')[-300:]}")
