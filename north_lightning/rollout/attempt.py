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
    AttemptError,
    InfrastructureError,
    InvalidActionError,
    NorthError,
    SandboxError,
    TreeTooLargeError,
    VerifierError,
)
from north_lightning.interfaces import Harness, HarnessSession, RewardVerifier, Sandbox, SandboxProvider
from north_lightning.rollout.circles import MAX_SAME_TURNS, CircleDetector
from north_lightning.rollout.journal import busy_with
from north_lightning.rollout.stages import Timeouts, clean_up, within
from north_lightning.rollout.steps import ends_attempt, prepare_step, reward_of_steps
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
    TaskStep,
    ToolCall,
    ToolResult,
)
from north_lightning.verifiers.checked import checked_reward
from north_lightning.verifiers.frameworks import mounts_of

OPEN, ACT, SNAPSHOT, VERIFY = (f"timeouts.{stage}_s" for stage in ("open", "act", "snapshot", "verify"))

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


class Conversation:
    """What goes on over all steps of a task: the messages, the turns that are left, the ids of calls.

    Args:
        policy: Who speaks.
        rollout: Where the messages go.
        max_turns: Of all steps together.
    """

    def __init__(self, policy: Policy, rollout: Rollout, max_turns: int) -> None:
        self.policy = policy
        self.rollout = rollout
        self.turns_left = max_turns
        self.next_call_id = 0
        self._unseen = Step()  # what the policy has not observed yet

    @property
    def is_over(self) -> bool:
        """Whether the policy can say no more."""
        return self.turns_left < 1

    def answer(self, step: Step) -> None:
        """The last turn gave ``step``."""
        if not step.done and bool(step.results) == bool(step.message):
            raise InfrastructureError("the harness: expected results, or a message, or the end after a turn")
        self._unseen = Step(step.results, "" if step.done else step.message)
        self._record(self._unseen)

    def go_on_with(self, instruction: str) -> None:
        """The next step of the task begins. Calls that ended the last one are answered with nothing."""
        if self.is_over:
            return
        last = self._unseen
        calls = () if last.results else self.rollout.messages[-1].tool_calls
        further = Step(tuple(ToolResult(call.id, "") for call in calls), instruction)
        self._record(further)
        said = f"{last.message}\n\n{instruction}" if last.message else instruction
        self._unseen = Step(last.results or further.results, said)

    def observe(self) -> None:
        """Show the policy what it has not seen; ``AttemptEnds`` if it does not fit."""
        unseen, self._unseen = self._unseen, Step()
        if unseen.results or unseen.message:
            self.policy.observe(unseen)

    def _record(self, step: Step) -> None:
        self.rollout.messages.extend(
            Message("tool", result.content, tool_call_id=result.tool_call_id) for result in step.results
        )
        if step.message:
            self.rollout.messages.append(Message("user", step.message))


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
        keep: Is given what an attempt left in ``/work``, before that is verified; of a task of several steps, after
            each.
    """

    sandboxes: SandboxProvider
    verifier: RewardVerifier
    image_of: Callable[[Task], Path]
    timeouts: Timeouts = field(default_factory=Timeouts)
    max_same_turns: int = MAX_SAME_TURNS
    keep: Callable[[Task, Rollout, Path], None] | None = None

    async def run(self, task: Task, harness: Harness, policy: Policy, rollout: Rollout, variation: int) -> None:
        """Fill ``messages``, ``stop_reason``, ``reward`` and ``duration_s`` of ``rollout``.

        An invalid action and a tree that is too large score 0 without a verification. Every other end is verified as
        it stands, a used-up turn budget included.

        The steps of a task that has several are one conversation in one sandbox, whose processes end with each step: a
        new instruction is the user's next message. Each step is verified on its own copy of ``/work``, which nothing
        comes back from. A policy that can say no more leaves the steps that remain as they are, to be verified.

        Raises:
            InfrastructureError: a stage failed; the rollout is worthless.
        """
        started = time.monotonic()
        limit_s = self.timeouts.of_attempt(task)
        prompt = harness.prompt(task.steps[0].task if task.steps else task, variation)
        rollout.messages.extend(prompt.messages)
        policy.begin(prompt)
        scratch = Scratch("attempt")
        try:
            async with asyncio.timeout(limit_s) as limit:
                await self._in_sandbox(task, harness, policy, rollout, scratch.path)
        except NorthError:
            raise
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                raise AttemptError(
                    f"an attempt at task {task.id}: expected an end within {limit_s:g} s (timeouts.attempt_s and what "
                    f"the task allows), got none after {len(rollout.turns)} turns"
                ) from error
            raise AttemptError(f"task {task.id}: {type(error).__name__}: {error}") from error
        finally:
            await clean_up(self.timeouts.close_s, f"deleting {scratch.path}", asyncio.to_thread(scratch.delete))
        rollout.duration_s = time.monotonic() - started

    async def _in_sandbox(self, task: Task, harness: Harness, policy: Policy, rollout: Rollout, scratch: Path) -> None:
        sandbox = await self._open_sandbox(task)
        closing = f"closing the sandbox of task {task.id}"
        try:
            conversation = Conversation(policy, rollout, task.max_turns)
            if not task.steps:
                workdir = scratch / "work"
                if await self._work(task, harness, conversation, sandbox, workdir):
                    await clean_up(self.timeouts.close_s, closing, sandbox.close())
                    rollout.reward = await self.verify(task, rollout, workdir)
                return
            verdicts: list[Reward] = []
            for number, step in enumerate(task.steps):
                workdir = scratch / f"work{number}"
                if reason := await self._prepare(step, sandbox):
                    if not verdicts:
                        raise SandboxError(f"task {task.id}: {reason}")
                    if self.verifier.grading == "strict":
                        verdicts.append(Reward(0.0, {"reason": reason}))
                    break
                if number:
                    conversation.go_on_with(step.task.instruction)
                if not await self._work(step.task, harness, conversation, sandbox, workdir):
                    return
                if number == len(task.steps) - 1:
                    await clean_up(self.timeouts.close_s, closing, sandbox.close())
                verdicts.append(await self.verify(step.task, rollout, workdir))
                if ends_attempt(verdicts[-1], step.min_reward):
                    break
            rollout.reward = reward_of_steps(task, verdicts)
        finally:
            await clean_up(self.timeouts.close_s, closing, sandbox.close())

    async def _prepare(self, step: TaskStep, sandbox: Sandbox) -> str:
        preparing = prepare_step(step, sandbox, self.timeouts.act_s)
        return await within(self.timeouts.of_preparing(step), SandboxError, f"preparing step {step.name}", preparing)

    async def _work(
        self, task: Task, harness: Harness, conversation: Conversation, sandbox: Sandbox, workdir: Path
    ) -> bool:
        """Converse, then copy ``/work`` to ``workdir``; False if the attempt has its reward already."""
        limits, rollout = self.timeouts, conversation.rollout
        if not conversation.is_over:
            opening = harness.open(task, sandbox)
            session = await within(limits.open_s, SandboxError, f"opening harness {harness.name!r}", opening, OPEN)
            try:
                rollout.stop_reason = await self._converse(task, harness, conversation, session)
            finally:
                await clean_up(limits.close_s, f"closing harness {harness.name!r}", session.close())
            if rollout.stop_reason == "invalid_action":
                return False
        for hook in task.collect:
            running = sandbox.run(hook.command, hook.timeout_s)
            await within(hook.timeout_s + limits.act_s, SandboxError, "a collect command", running)
        try:
            await within(limits.snapshot_s, SandboxError, "snapshot of /work", sandbox.snapshot(workdir), SNAPSHOT)
        except TreeTooLargeError as error:
            rollout.reward = Reward(0.0, {"reason": str(error)})
            return False
        return True

    async def _open_sandbox(self, task: Task) -> Sandbox:
        image = self.image_of(task) if task.root is None else None
        opening = asyncio.ensure_future(self.sandboxes.open(image, read_only=mounts_of(task), root=task.root))
        try:
            return await within(self.timeouts.open_s, SandboxError, "opening a sandbox", opening, OPEN)
        except BaseException:
            opening.add_done_callback(_close_if_opened)
            raise

    async def _converse(
        self, task: Task, harness: Harness, conversation: Conversation, session: HarnessSession
    ) -> StopReason:
        policy, rollout = conversation.policy, conversation.rollout
        circle = CircleDetector(self.max_same_turns)
        clock = _Clock()
        try:
            conversation.observe()
            while conversation.turns_left:
                conversation.turns_left -= 1
                step, num_calls = await self._turn(harness, policy, session, rollout, conversation.next_call_id, clock)
                if step is None:
                    return "invalid_action"
                conversation.next_call_id += num_calls
                conversation.answer(step)
                if step.done:
                    return "finished"
                if circle.closes(rollout.messages):
                    raise AttemptEnds("loop")
                if task.agent_timeout_s is not None and clock.used_s >= task.agent_timeout_s:
                    return "timeout" if conversation.turns_left else "max_turns"
                if conversation.turns_left:
                    conversation.observe()
            return "max_turns"
        except AttemptEnds as end:
            conversation.turns_left = 0
            return end.stop_reason

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
            with clock, busy_with("harness"):
                step = await within(self.timeouts.act_s, AttemptError, "the harness", session.act(action), ACT)
            return step, len(action.tool_calls)
        except InvalidActionError as error:
            said = policy.reject(error)
            if said is not None:
                rollout.messages.append(said)
            with busy_with("harness"):
                answer = await within(self.timeouts.act_s, AttemptError, "the harness", session.reject(error), ACT)
            if answer is None:
                rollout.reward = Reward(0.0, {"invalid_action": str(error)})
                return None, 0
            if policy.can_forget and harness.forgets_rejected_turns:
                del rollout.messages[num_messages:]
                return answer, 0
            num_calls = sum(len(message.tool_calls) for message in rollout.messages[num_messages:])
            return answer, max(error.num_calls, num_calls)

    async def verify(self, task: Task, rollout: Rollout, workdir: Path) -> Reward:
        """The verdict on what an attempt left in ``workdir``; ``VerifierError`` if there is none."""
        if self.keep is not None:
            await asyncio.to_thread(self.keep, task, rollout, workdir)
        name = type(self.verifier).__name__
        verifying = self.verifier.verify(task, rollout, workdir, self.sandboxes)
        limit_s = self.timeouts.of_verifying(task)
        try:
            with busy_with("verifier"):
                reward = await within(limit_s, VerifierError, f"verifier {name}", verifying, VERIFY)
        except InvalidActionError as error:
            raise VerifierError(f"verifier {name} raised InvalidActionError: {error}") from error
        return checked_reward(reward, self.verifier, f"verifier {name}")


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
