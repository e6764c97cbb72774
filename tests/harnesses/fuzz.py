"""Fuzzed episodes through the whole road: sampled ids, parser, harness, real sandbox, observation ids, next prompt.

In: a harness, a seed, a number of episodes. Out: how every sampled turn and every episode ended, and how many tokens of
any prompt or record were not the tokens that had been sampled and observed before (the drift; 0 is right). Used by a
small test and by ``tests/benchmarks/bench_harnesses.py`` at full size.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from north_lightning.chat import ChatFormat, NorthTokenizer, train_tokenizer
from north_lightning.errors import NorthError
from north_lightning.harnesses import (
    MiniSWEAgentHarness,
    OpenCodeHarness,
    ReActTerminalHarness,
    SWEAgentHarness,
    Terminus2Harness,
)
from north_lightning.interfaces import Harness, RewardVerifier, Sampler, Sandbox, SandboxProvider
from north_lightning.rollout import RolloutRunner
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.types import (
    AssistantAction,
    Message,
    Prompt,
    Reward,
    Rollout,
    Sample,
    SamplingParams,
    Task,
    ToolCall,
    ToolSpec,
)

HARNESSES: dict[str, Harness] = {
    "react_terminal": ReActTerminalHarness(command_timeout_s=2),
    "swe_agent": SWEAgentHarness(command_timeout_s=2),
    "mini_swe_agent": MiniSWEAgentHarness(command_timeout_s=2, max_format_errors=0),
    "opencode": OpenCodeHarness(command_timeout_s=2, max_equal_calls=0),
    "terminus2": Terminus2Harness(),
}
MAX_TURNS = 12
MAX_CONTEXT_TOKENS = 6000
HANG_S = 120

ODD_TEXTS = (
    "", " ", "\n", "\0", "\ud800", "é漢字🙂", "\x1b[2J\x1b]0;t\x07", "\x1e", "'\"`$(x)", "%s{0}{x}", "-n", "\r\n",
    "<|END_OF_TURN_TOKEN|>", "<|START_TOOL_RESULT|>[]<|END_TOOL_RESULT|>", "</output>", "]}", "{", "a" * 3000,
    "../../../etc/passwd", "/work/calc.py", "calc.py", "/dev/zero", "/proc/self/mem", "nul\0byte",
)  # fmt: skip
COMMANDS = (
    "ls", "cat calc.py", "true", "false", "echo hi", "seq 30", "seq 100000", "head -c 300000 /dev/urandom",
    "printf '\\xff\\xfe\\x00'", "exit 3", "cd /tmp", "kill $$", "echo '<|END_TOOL_RESULT|>'", "cat <<EOF", "echo 'open",
    "yes | head -c 5000000", "C-c", "ls\n", "exec true", "set -e; false", "echo a & wait", "ulimit -a",
    "printf '\\033]133;D;0\\007$ '", "sleep 0.05", "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; false",
)  # fmt: skip


# ---- what a model might say ----------------------------------------------------------------------------------------


def some_text(rng: random.Random) -> str:
    return rng.choice((rng.choice(ODD_TEXTS), rng.choice(COMMANDS), "".join(rng.choices("abc \n\\\"'{}[]<|>", k=12))))


def some_value(rng: random.Random, schema: Mapping[str, Any]) -> Any:
    """A value that fits ``schema``, or now and then one that does not."""
    if rng.random() < 0.1:
        return rng.choice((None, 3, -1, 1e300, 10**30, True, [], {}, "x", [[[]]], {"a": {"b": 1}}))
    if "enum" in schema:
        return rng.choice(schema["enum"])
    match schema.get("type"):
        case "object":
            names = [name for name in schema["properties"] if name in schema.get("required", ()) or rng.random() < 0.4]
            return {name: some_value(rng, schema["properties"][name]) for name in names}
        case "array":
            return [some_value(rng, schema["items"]) for _ in range(rng.randint(0, 3))]
        case "integer":
            return rng.choice((0, 1, 2, 5, 1000))
        case "boolean":
            return rng.random() < 0.5
        case _:
            return some_text(rng)


def some_arguments(rng: random.Random, tool: ToolSpec) -> Any:
    arguments = some_value(rng, tool.parameters)
    if isinstance(arguments, dict):
        for name in ("keystrokes", "command"):
            if name in arguments and "enum" not in tool.parameters["properties"][name] and rng.random() < 0.7:
                arguments[name] = rng.choice(COMMANDS)
        if "timeout" in arguments:
            arguments["timeout"] = 500
    return arguments


def some_reply(rng: random.Random) -> str:
    """A Terminus reply, more or less."""
    commands = [
        {"keystrokes": rng.choice(COMMANDS) + rng.choice(("\n", "\n", "")), "duration": rng.choice((0, 0.02, 0.1, -1))}
        for _ in range(rng.randint(0, 3))
    ]
    if commands and rng.random() < 0.2:
        commands[0] = rng.choice(({"keystrokes": 3}, "ls", {"keystrokes": some_text(rng), "duration": 0.01}, {}))
    reply = {"analysis": some_text(rng), "plan": "p", "commands": commands}
    if rng.random() < 0.15:
        reply["task_complete"] = rng.choice((True, "true", 1, None, "no"))
    if rng.random() < 0.1:
        reply.pop(rng.choice(list(reply)))
    text = json.dumps(reply, ensure_ascii=rng.random() < 0.5)
    return rng.choice((text, text, text, f"Here: {text} so.", text[:-1], mutated(rng, text)))


def mutated(rng: random.Random, text: str) -> str:
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(text) + 1)
        text = (
            text[:place] + rng.choice(("", "\\", '"', "{", "}", "\0", "é", "999")) + text[place + rng.randint(0, 3) :]
        )
    return text


def some_turn(rng: random.Random, chat: ChatFormat, tools: Sequence[ToolSpec], next_id: int) -> list[int]:
    """Ids of one sampled turn: mostly something near a valid one, sometimes noise."""
    tokenizer = chat.tokenizer
    kind = rng.random()
    if kind < 0.06:
        return [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 60))]
    if kind < 0.12:
        content = rng.choice(("Done.", some_text(rng)))
        action = AssistantAction(content=content)
    elif not tools:
        action = AssistantAction(content=some_reply(rng))
    else:
        number = rng.choice((1, 1, 1, 1, 2, 3))
        chosen = [rng.choice(tools) for _ in range(number)]
        calls = [(tool.name if rng.random() < 0.95 else "python", some_arguments(rng, tool)) for tool in chosen]
        first = next_id if rng.random() < 0.95 else rng.randint(0, 9)
        action = AssistantAction(
            tool_calls=tuple(
                ToolCall(str(first + i), name, arguments if isinstance(arguments, dict) else {"x": arguments})
                for i, (name, arguments) in enumerate(calls)
            )
        )
    try:
        ids = chat.encode_action(action)
    except (
        NorthError,
        UnicodeEncodeError,
        TypeError,
    ):  # half characters, numbers of 70 bits: no tokenizer can be given them
        ids = chat.encode_action(AssistantAction(content="?"))
    if kind > 0.9:
        place = rng.randrange(len(ids))
        ids[place : place + rng.randint(0, 3)] = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 3))]
    return ids


class FuzzSampler(Sampler):
    """Says anything. Keeps what it was asked and what it answered, by episode."""

    def __init__(self, chat: ChatFormat, tools: Sequence[ToolSpec], seed: int) -> None:
        self.chat = chat
        self.tools = tools
        self.rng = random.Random(seed)
        self.log: list[tuple[list[int], list[int]]] = []

    async def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Sample:
        calls = self.chat.tokenizer.decode(prompt_token_ids).count('"tool_name": ')
        ids = some_turn(self.rng, self.chat, self.tools, calls)
        eos = self.chat.tokenizer.eos_id
        if eos in ids:
            ids = ids[: ids.index(eos) + 1]
        finish = "stop" if ids[-1] == eos and len(ids) <= params.max_tokens else "length"
        ids = ids[: params.max_tokens]
        if finish == "length" and self.rng.random() < 0.8:  # most turns end
            ids = [*ids[: params.max_tokens - 1], eos]
            finish = "stop"
        self.log.append((list(prompt_token_ids), ids))
        return Sample(list(ids), [-0.1] * len(ids), [0] * len(ids), finish)


# ---- a sandbox for many episodes -----------------------------------------------------------------------------------


class KeptSandbox(Sandbox):
    """A real sandbox that stays open from episode to episode."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    async def spawn(self, argv):
        return await self.sandbox.spawn(argv)

    async def run(self, command, timeout_s):
        return await self.sandbox.run(command, timeout_s)

    async def snapshot(self, destination: Path) -> None:
        await asyncio.to_thread(destination.mkdir)

    async def close(self) -> None: ...


@dataclass
class KeptSandboxes(SandboxProvider):
    image: Path
    provider: BubblewrapProvider = field(default_factory=BubblewrapProvider)
    kept: KeptSandbox | None = None

    def check(self) -> None: ...

    async def open(self, image, read_only=None, writable=None, root=None) -> Sandbox:
        if self.kept is None:
            self.kept = KeptSandbox(await self.provider.open(self.image))
        return self.kept


class Accepts(RewardVerifier):
    async def verify(self, task, rollout, workdir, sandboxes) -> Reward:
        return Reward(1.0)


# ---- episodes ------------------------------------------------------------------------------------------------------


@dataclass
class FuzzReport:
    outputs: int = 0
    episodes: int = 0
    drifted_tokens: int = 0
    multi_turn_episodes: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)


def drift(log: Sequence[tuple[list[int], list[int]]], rollout: Rollout) -> int:
    """Tokens that are not where they were: in the next prompt, and in what would be trained."""
    wrong = 0
    for (prompt, sample), later in zip(log, [*[prompt for prompt, _ in log[1:]], rollout.token_ids], strict=True):
        before = prompt + sample
        wrong += sum(a != b for a, b in zip(before, later, strict=False)) + max(0, len(before) - len(later))
    trained = [token for token, mask in zip(rollout.token_ids, rollout.loss_mask, strict=True) if mask]
    sampled = [token for _, sample in log for token in sample]
    wrong += sum(a != b for a, b in zip(trained, sampled, strict=False)) + abs(len(trained) - len(sampled))
    return wrong


def make_chat(directory: Path) -> ChatFormat:
    texts = [json.dumps(dict(tool.parameters)) for harness in HARNESSES.values() for tool in prompt_of(harness).tools]
    train_tokenizer([*texts, *COMMANDS], (), 700, directory)
    return ChatFormat(NorthTokenizer.load(directory), reasoning=False)


def prompt_of(harness: Harness) -> Prompt:
    return harness.prompt(Task("fuzz", "fuzz", "fuzz", "Do it.", Path("/nowhere"), MAX_TURNS))


class ShortPrompt(Harness):
    """A harness without its long words and schemas in the prompt: the ids of every episode begin alike anyway."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.name = harness.name

    def prompt(self, task: Task, variation: int = 0) -> Prompt:
        return replace(self.harness.prompt(task, variation), messages=(Message("user", "Do it."),))

    async def open(self, task, sandbox):
        return await self.harness.open(task, sandbox)


async def run_fuzz(name: str, episodes: int, seed: int, directory: Path, min_outputs: int = 0) -> FuzzReport:
    """Until so many episodes of one harness had several turns, and ``min_outputs``; raises what it lets escape."""
    chat = make_chat(directory / "tokenizer")
    image = directory / "image"
    image.mkdir()
    (image / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    harness = HARNESSES[name]
    sampler = FuzzSampler(chat, prompt_of(harness).tools, seed)
    sandboxes = KeptSandboxes(image)
    context = MAX_CONTEXT_TOKENS + len(chat.encode_prompt((Message("user", "Do it."),), sampler.tools))
    runner = RolloutRunner(
        chat, sampler, sandboxes, {"fuzz": ShortPrompt(harness)}, Accepts(), lambda task: image, 2000, context,
        max_attempts=1,
    )  # fmt: skip
    report = FuzzReport()
    task = Task("fuzz", "fuzz", "fuzz", "Do it.", directory, MAX_TURNS)
    try:
        while report.multi_turn_episodes < episodes or report.outputs < min_outputs:
            sampler.log.clear()
            rollout = await asyncio.wait_for(runner.run(task, report.episodes, 0, seed), HANG_S)
            report.episodes += 1
            report.outputs += len(sampler.log)
            report.multi_turn_episodes += len(sampler.log) > 1
            report.drifted_tokens += drift(sampler.log, rollout)
            report.ends[rollout.stop_reason] += 1
            for turn in rollout.turns:
                outcome = "rejected" if turn.error else "cut" if turn.finish_reason == "length" else "carried out"
                report.turns[outcome] += 1
    finally:
        if sandboxes.kept is not None:
            await sandboxes.kept.sandbox.close()
    return report


def fuzz(name: str, episodes: int, seed: int = 0, min_outputs: int = 0) -> FuzzReport:
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(run_fuzz(name, episodes, seed, Path(directory), min_outputs))
