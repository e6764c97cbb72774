"""One attempt at one task: prompt, turns, snapshot, reward. The only agent loop: sampled and scripted policies share
it.

In: a task, a harness and a policy that says what the assistant does next. Out: the messages, the stop reason and the
reward, written into a ``Rollout``. It handles no token: that is the policy's part. It retries nothing.

Waits for: the policy (each turn), the sandbox (each action), the verifier (once). Everything it waits for has a time
limit and ends in a typed error, and the sandbox is closed however the attempt ends.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from north_lightning.errors import (
    InfrastructureError,
    InvalidActionError,
    SandboxError,
    TreeTooLargeError,
    VerifierError,
)
from north_lightning.interfaces import Harness, HarnessSession, RewardVerifier, Sandbox, SandboxProvider
from north_lightning.rollout.circles import MAX_SAME_TURNS, CircleDetector
from north_lightning.rollout.stages import Timeouts, clean_up, within
from north_lightning.sandbox.scratch import Scratch
from north_lightning.types import (
    AssistantAction,
    Message,
    Prompt,
    Reward,
    Rollout,
    Step,
    StopReason,
    Task,
    ToolCall,
)
from north_lightning.verifiers.checked import checked_reward

Script = Callable[[Sequence[Message]], Awaitable[AssistantAction]]
"""A scripted policy: all messages so far (prompt, its own turns, tool results) -> the next action."""


class AttemptEnds(Exception):
    """Control flow, not a failure: the policy can say nothing more, for this reason."""

    def __init__(self, stop_reason: StopReason) -> None:
        super().__init__(stop_reason)
        self.stop_reason: StopReason = stop_reason


class Policy(ABC):
    """Says what the assistant does. One object per attempt; calls come in the order of the conversation."""

    can_forget = False
    """Whether a turn may be taken out of the messages; sampled tokens stay where they are."""

    @abstractmethod
    def begin(self, prompt: Prompt) -> None:
        """The opening messages and tools."""

    @abstractmethod
    async def act(self, messages: Sequence[Message], next_call_id: int) -> AssistantAction:
        """The next turn; ``InvalidActionError`` if it is not an action, ``AttemptEnds`` if there can be no further
        turn."""

    @abstractmethod
    def observe(self, step: Step) -> None:
        """What the last turn gave; called only if another turn follows. ``AttemptEnds`` if it does not fit."""

    def reject(self, error: InvalidActionError) -> Message | None:
        """The last turn was not a valid action; returns what was said, for people, if it is not in the messages yet."""
        return None


class ScriptedPolicy(Policy):
    """A solver in place of a model; call ids are counted here, so the script may leave them empty."""

    def __init__(self, script: Script) -> None:
        self._script = script

    def begin(self, prompt: Prompt) -> None: ...

    async def act(self, messages: Sequence[Message], next_call_id: int) -> AssistantAction:
        action = await self._script(messages)
        calls = tuple(replace(call, id=str(next_call_id + i)) for i, call in enumerate(action.tool_calls))
        return replace(action, tool_calls=calls)

    def observe(self, step: Step) -> None: ...


def script_of_calls(calls: Sequence[tuple[str, dict[str, object]]], answer: str = "Done.") -> Script:
    """A script that makes these (tool name, arguments) calls, one a turn, whatever comes back, and then answers."""

    async def script(messages: Sequence[Message]) -> AssistantAction:
        turn = sum(message.role == "assistant" for message in messages)
        if turn >= len(calls):
            return AssistantAction(content=answer)
        name, arguments = calls[turn]
        return AssistantAction(tool_calls=(ToolCall("", name, arguments),))

    return script


@dataclass(frozen=True)
class AttemptLoop:
    """Runs attempts with one set of plug-ins.

    Args:
        sandboxes: Where commands run.
        verifier: What scores the result.
        image_of: The directory a task's ``/work`` starts from.
        timeouts: Limits of every stage.
        max_same_turns: An attempt that makes so many turns in a row with the same calls and the same results is ended
            with the stop reason ``loop`` and verified as it stands; 0 never ends one.
    """

    sandboxes: SandboxProvider
    verifier: RewardVerifier
    image_of: Callable[[Task], Path]
    timeouts: Timeouts = field(default_factory=Timeouts)
    max_same_turns: int = MAX_SAME_TURNS

    async def run(self, task: Task, harness: Harness, policy: Policy, rollout: Rollout, variation: int) -> None:
        """Fill ``messages``, ``stop_reason``, ``reward`` and ``duration_s`` of ``rollout``.

        An invalid action and a tree that is too large score 0 without a verification. Every other end is verified as
        it stands, a used-up turn budget included.

        Raises:
            InfrastructureError: a stage failed; the rollout is worthless.
        """
        started = time.monotonic()
        prompt = harness.prompt(task, variation)
        rollout.messages.extend(prompt.messages)
        policy.begin(prompt)
        scratch = Scratch("attempt")
        try:
            workdir = scratch.path / "work"
            rollout.stop_reason = await self._in_sandbox(task, harness, policy, rollout, workdir)
            if rollout.reward is None:
                rollout.reward = await self._verify(task, rollout, workdir)
        finally:
            await clean_up(self.timeouts.close_s, f"deleting {scratch.path}", asyncio.to_thread(scratch.delete))
        rollout.duration_s = time.monotonic() - started

    async def _in_sandbox(
        self, task: Task, harness: Harness, policy: Policy, rollout: Rollout, workdir: Path
    ) -> StopReason:
        limits = self.timeouts
        sandbox = await self._open_sandbox(task)
        try:
            opening = harness.open(task, sandbox)
            session = await within(limits.open_s, SandboxError, f"opening harness {harness.name!r}", opening)
            try:
                stop_reason = await self._converse(task, harness, policy, session, rollout)
            finally:
                await clean_up(limits.close_s, f"closing harness {harness.name!r}", session.close())
            if stop_reason != "invalid_action":
                try:
                    await within(limits.snapshot_s, SandboxError, "snapshot of /work", sandbox.snapshot(workdir))
                except TreeTooLargeError as error:
                    rollout.reward = Reward(0.0, {"reason": str(error)})
            return stop_reason
        finally:
            await clean_up(limits.close_s, "closing the sandbox", sandbox.close())

    async def _open_sandbox(self, task: Task) -> Sandbox:
        opening = asyncio.ensure_future(self.sandboxes.open(self.image_of(task)))
        try:
            return await within(self.timeouts.open_s, SandboxError, "opening a sandbox", opening)
        except BaseException:
            opening.add_done_callback(_close_if_opened)
            raise

    async def _converse(
        self, task: Task, harness: Harness, policy: Policy, session: HarnessSession, rollout: Rollout
    ) -> StopReason:
        next_call_id = 0
        circle = CircleDetector(self.max_same_turns)
        clock = _Clock()
        for turns_left in reversed(range(task.max_turns)):
            if task.agent_timeout_s is not None and clock.used_s >= task.agent_timeout_s:
                return "timeout"
            try:
                step, num_calls = await self._turn(harness, policy, session, rollout, next_call_id, clock)
            except AttemptEnds as end:
                return end.stop_reason
            if step is None:
                return "invalid_action"
            next_call_id += num_calls
            rollout.messages.extend(
                Message("tool", result.content, tool_call_id=result.tool_call_id) for result in step.results
            )
            if step.done:
                return "finished"
            if bool(step.results) == bool(step.message):
                raise InfrastructureError("the harness: expected results, or a message, or the end after a turn")
            if step.message:
                rollout.messages.append(Message("user", step.message))
            if circle.closes(rollout.messages):
                return "loop"
            if turns_left:
                try:
                    policy.observe(step)
                except AttemptEnds as end:
                    return end.stop_reason
        return "max_turns"

    async def _turn(
        self,
        harness: Harness,
        policy: Policy,
        session: HarnessSession,
        rollout: Rollout,
        next_call_id: int,
        clock: _Clock,
    ) -> tuple[Step | None, int]:
        """What one turn gave, and how many calls it made; None if it was not valid and ends the attempt."""
        num_messages = len(rollout.messages)
        try:
            action = await policy.act(rollout.messages, next_call_id)
            rollout.messages.append(
                Message("assistant", action.content, action.reasoning, tool_calls=action.tool_calls)
            )
            with clock:
                step = await within(self.timeouts.act_s, InfrastructureError, "the harness", session.act(action))
            return step, len(action.tool_calls)
        except InvalidActionError as error:
            said = policy.reject(error)
            if said is not None:
                rollout.messages.append(said)
            answer = await within(self.timeouts.act_s, InfrastructureError, "the harness", session.reject(error))
            if answer is None:
                rollout.reward = Reward(0.0, {"invalid_action": str(error)})
                return None, 0
            if policy.can_forget and harness.forgets_rejected_turns:
                del rollout.messages[num_messages:]
                return answer, 0
            num_calls = sum(len(message.tool_calls) for message in rollout.messages[num_messages:])
            return answer, max(error.num_calls, num_calls)

    async def _verify(self, task: Task, rollout: Rollout, workdir: Path) -> Reward:
        name = type(self.verifier).__name__
        verifying = self.verifier.verify(task, rollout, workdir, self.sandboxes)
        limit_s = self.timeouts.of_verifying(task)
        try:
            reward = await within(limit_s, VerifierError, f"verifier {name}", verifying)
        except InvalidActionError as error:
            raise VerifierError(f"verifier {name} raised InvalidActionError: {error}") from error
        return checked_reward(reward, f"verifier {name}")


async def record_scripted(
    task: Task,
    harness: Harness,
    script: Script,
    *,
    sandboxes: SandboxProvider,
    verifier: RewardVerifier,
    image_of: Callable[[Task], Path],
    variation: int = 0,
    timeouts: Timeouts | None = None,
) -> Rollout:
    """Let ``script`` solve ``task`` through the harness in a sandbox and verify what it left behind.

    Returns:
        A rollout with messages, stop reason and reward but no tokens. Its tools are ``harness.prompt(task,
        variation).tools``. Every tool result in it is what the call really gave.

    Raises:
        InfrastructureError: as for a sampled attempt.
    """
    rollout = Rollout(task.id, task.environment, task.family, group_id=-1, index=0, seed=0)
    loop = AttemptLoop(sandboxes, verifier, image_of, timeouts or Timeouts())
    await loop.run(task, harness, ScriptedPolicy(script), rollout, variation)
    return rollout


class _Clock:
    """Seconds spent inside of it, entered any number of times."""

    def __init__(self) -> None:
        self.used_s = 0.0

    def __enter__(self) -> None:
        self._entered = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self.used_s += time.monotonic() - self._entered


def _close_if_opened(opening: asyncio.Future[Sandbox]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        closing = asyncio.ensure_future(opening.result().close())
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())
