"""Hand-written sandbox, harness, verifier and sampler that do as they are told. Importable by the rollout process."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from north_lightning.chat import ChatFormat, NorthTokenizer, train_tokenizer
from north_lightning.errors import (
    AttemptError,
    ConfigError,
    InvalidActionError,
    PromptTooLongError,
    SandboxError,
    SandboxUnavailableError,
)
from north_lightning.interfaces import (
    Harness,
    HarnessSession,
    RewardVerifier,
    Sampler,
    Sandbox,
    SandboxProvider,
)
from north_lightning.rollout import RolloutRunner, Timeouts
from north_lightning.rollout.journal import JournalledSampler
from north_lightning.types import (
    AssistantAction,
    CommandResult,
    Message,
    Prompt,
    Reward,
    Rollout,
    Sample,
    SamplingParams,
    Step,
    Task,
    ToolCall,
    ToolResult,
    ToolSpec,
)

ECHO = ToolSpec(
    "echo",
    "Say it again.",
    {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"], "additionalProperties": False},
)


def make_tokenizer(directory: Path) -> NorthTokenizer:
    texts = ["Say hello, then say goodbye and answer.", '{"tool_call_id": "0", "tool_name": "echo", "parameters": {}}']
    return train_tokenizer(texts, (), 700, directory)


def load_chat(directory: Path, reasoning: bool = False) -> ChatFormat:
    return ChatFormat(NorthTokenizer.load(directory), reasoning)


def make_task(directory: Path, max_turns: int = 4, environment: str = "terminal", name: str = "task0") -> Task:
    image = directory / "environment" / "files"
    image.mkdir(parents=True, exist_ok=True)
    (image / "hello.txt").write_text("hello\n")
    return Task(name, environment, "echo", f"Say hello ({name}).", directory, max_turns)


def image_of(task: Task) -> Path:
    return task.directory / "environment" / "files"


def call(text: str) -> AssistantAction:
    return AssistantAction(tool_calls=(ToolCall("", "echo", {"text": text}),))


def answer(text: str = "done") -> AssistantAction:
    return AssistantAction(content=text)


def numbered(action: AssistantAction, call_id: int) -> AssistantAction:
    calls = tuple(ToolCall(str(call_id + i), one.name, one.arguments) for i, one in enumerate(action.tool_calls))
    return AssistantAction(action.reasoning, action.content, calls)


# ---- sandbox -------------------------------------------------------------------------------------------------------


class FakeSandbox(Sandbox):
    def __init__(self, provider: FakeSandboxes, image: Path) -> None:
        self.provider = provider
        self.image = image

    async def spawn(self, argv: Sequence[str]) -> asyncio.subprocess.Process:
        raise NotImplementedError

    async def run(self, command: str, timeout_s: float) -> CommandResult:
        return CommandResult("", 0)

    async def snapshot(self, destination: Path) -> None:
        self.provider.num_snapshots += 1
        await self.provider.on_snapshot()
        shutil.copytree(self.image, destination, symlinks=True)

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.provider.open_now.discard(self)


async def nothing() -> None:
    return None


@dataclass
class FakeSandboxes(SandboxProvider):
    """Counts what is open; ``on_open`` and ``on_snapshot`` may raise or hang."""

    on_open: Callable[[], Awaitable[None]] = nothing
    on_snapshot: Callable[[], Awaitable[None]] = nothing
    on_opened: Callable[[], Awaitable[None]] = nothing
    open_now: set[FakeSandbox] = field(default_factory=set)
    num_opened: int = 0
    num_snapshots: int = 0

    def check(self) -> None: ...

    async def open(
        self, image: Path, read_only: object = None, writable: object = None, root: object = None
    ) -> Sandbox:
        self.num_opened += 1
        await self.on_open()
        sandbox = FakeSandbox(self, image)
        self.open_now.add(sandbox)
        await self.on_opened()
        return sandbox


# ---- harness -------------------------------------------------------------------------------------------------------


class EchoSession(HarnessSession):
    def __init__(self, harness: EchoHarness) -> None:
        self.harness = harness

    async def act(self, action: AssistantAction) -> Step:
        await self.harness.on_act()
        if not action.tool_calls:
            return Step(done=True)
        if len(action.tool_calls) > 1:
            raise InvalidActionError("one call at a time")
        one = action.tool_calls[0]
        return Step((ToolResult(one.id, f"you said {one.arguments['text']}"),), done=one.arguments["text"] == "stop")

    async def close(self) -> None:
        self.harness.num_closed += 1


@dataclass
class EchoHarness(Harness):
    name: str = "echo"
    on_act: Callable[[], Awaitable[None]] = nothing
    num_closed: int = 0

    def prompt(self, task: Task, variation: int = 0) -> Prompt:
        greeting = ("Hello.", "Good day.", "Hi.")[variation % 3]
        return Prompt((Message("system", greeting), Message("user", task.instruction)), (ECHO,))

    async def open(self, task: Task, sandbox: Sandbox) -> HarnessSession:
        return EchoSession(self)


# ---- verifier ------------------------------------------------------------------------------------------------------


@dataclass
class FakeVerifier(RewardVerifier):
    """``judge`` returns a reward, or anything else it should not; or raises, or hangs."""

    judge: Callable[[Rollout], Awaitable[object]]
    num_calls: int = 0

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        self.num_calls += 1
        assert (workdir / "hello.txt").read_text() == "hello\n"
        return await self.judge(rollout)  # type: ignore[return-value]


async def full_marks(rollout: Rollout) -> Reward:
    return Reward(1.0)


async def by_index(rollout: Rollout) -> Reward:
    return Reward(float(rollout.index % 2))


# ---- sampler -------------------------------------------------------------------------------------------------------


class RecordingSampler(Sampler):
    """Plays ``actions``, one a turn, as *uncommon* ids: one token per character, which no tokenizer would choose.

    Log-probabilities are random, and the policy version rises in the middle of every turn. ``requests`` keeps every
    prompt with its parameters and the sample that was given.
    """

    def __init__(self, chat: ChatFormat, actions: Sequence[AssistantAction | list[int]], delay_s: float = 0.0) -> None:
        self.chat = chat
        self.actions = actions
        self.delay_s = delay_s
        self.version = 0
        self.requests: list[tuple[list[int], SamplingParams, Sample]] = []

    async def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Sample:
        await asyncio.sleep(self.delay_s)
        turn = self._turn(prompt_token_ids)
        action = self.actions[min(turn, len(self.actions) - 1)]
        ids = action if isinstance(action, list) else spelled(self.chat, numbered(action, turn))
        stops = len(ids) <= params.max_tokens and ids[-1] in params.stop_token_ids
        ids = ids[: params.max_tokens]
        noise = random.Random(len(self.requests))
        versions = [self.version] * (len(ids) // 2) + [self.version + 1] * (len(ids) - len(ids) // 2)
        self.version += 1
        sample = Sample(ids, [-noise.random() for _ in ids], versions, "stop" if stops else "length")
        self.requests.append((list(prompt_token_ids), params, sample))
        return sample

    def _turn(self, prompt: Sequence[int]) -> int:
        """Every exchange adds the end of a turn twice: the assistant's and its tool results'."""
        eos = self.chat.stop_token_ids[0]
        ends = [list(ids).count(eos) for ids in (prompt, self.requests[0][0] if self.requests else prompt)]
        return (ends[0] - ends[1]) // 2


def spelled(chat: ChatFormat, action: AssistantAction) -> list[int]:
    """The ids of an action, every text between control tokens one character at a time."""
    spelled_ids: list[int] = []
    for token_id in chat.encode_action(action):
        if chat.tokenizer.is_control(token_id) or token_id in marker_ids(chat):
            spelled_ids.append(token_id)
        else:
            for character in chat.tokenizer.decode([token_id]):
                spelled_ids += chat.tokenizer.encode_text(character)
    return spelled_ids


def marker_ids(chat: ChatFormat) -> set[int]:
    return {i for name in ("<|START_TEXT|>", "<|END_TEXT|>") for i in chat.tokenizer.control_ids(name)}


FAST = Timeouts(open_s=0.4, sample_s=0.4, act_s=0.4, snapshot_s=0.4, verify_s=0.4, close_s=0.4)
"""For tests in which something hangs."""


def make_runner(
    chat: ChatFormat,
    sampler: Sampler,
    *,
    sandboxes: FakeSandboxes | None = None,
    harness: Harness | None = None,
    verifier: RewardVerifier | None = None,
    max_turn_tokens: int = 200,
    max_context_tokens: int = 2000,
    max_attempts: int = 1,
    vary_prompts: bool = True,
    timeouts: Timeouts | None = None,
) -> RolloutRunner:
    return RolloutRunner(
        chat,
        sampler,
        sandboxes or FakeSandboxes(),
        {"terminal": harness or EchoHarness()},
        verifier or FakeVerifier(full_marks),
        image_of,
        max_turn_tokens,
        max_context_tokens,
        vary_prompts=vary_prompts,
        timeouts=timeouts,
        max_attempts=max_attempts,
        retry_delay_s=0.0,
    )


async def raise_sandbox_error() -> None:
    raise SandboxError("no room")


async def hang() -> None:
    await asyncio.sleep(60)


# ---- in the rollout process ----------------------------------------------------------------------------------------


@dataclass
class PlannedVerifier(RewardVerifier):
    """Behaves by group id: ``plan`` maps it to what goes wrong there. ``once`` remembers across processes what has."""

    plan: dict[int, str]
    once: Path

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        fault = self.plan.get(rollout.group_id, self.plan.get(-1, ""))
        marker = self.once / f"{rollout.group_id}"
        if fault.startswith("once "):
            if marker.exists():
                return Reward(float(rollout.index % 2))
            marker.touch()
            fault = fault.removeprefix("once ")
        match fault:
            case "raise":
                raise RuntimeError("no verdict")
            case "own":
                raise AttemptError("exit code: invalid literal for int() with base 10: 'x'")
            case "long":
                raise PromptTooLongError("max_context_tokens: expected more than the 999 tokens of the prompt")
            case "config":
                raise ConfigError("verifier: expected a key, got none")
            case "exit":
                os._exit(3)
            case "block":
                time.sleep(600)  # noqa: ASYNC251
            case "spin":
                until = time.monotonic() + 5.0
                while time.monotonic() < until:
                    pass
            case "slow":
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    (self.once / "cancelled").touch()
                    raise
            case "lambda":
                return Reward(1.0, {"unpicklable": lambda: None})
            case "signals":
                return Reward(1.0, signals_of_a_program())
        return Reward(float(rollout.index % 2))


def signals_of_a_program() -> dict[str, str]:
    """Signal masks that a program started from here begins with."""
    status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    return dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))


def child_runner(tokenizer_dir: Path, plan: dict[int, str], once: Path, sample_s: float = 0.0) -> RolloutRunner:
    chat = load_chat(tokenizer_dir)
    return RolloutRunner(
        chat,
        JournalledSampler(RecordingSampler(chat, [call("one"), answer()], delay_s=sample_s), 0),
        FakeSandboxes(),
        {"terminal": EchoHarness()},
        PlannedVerifier(plan, once),
        image_of,
        max_turn_tokens=200,
        max_context_tokens=2000,
        max_attempts=1,
    )


def no_runner() -> RolloutRunner:
    raise SandboxUnavailableError("bubblewrap is not installed: apt-get install bubblewrap")
