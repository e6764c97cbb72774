"""What the benchmarks run in the rollout process: the real runner over a fake sampler, sandbox and verifier."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rollout_fakes import (
    EchoHarness,
    FakeSandboxes,
    FakeVerifier,
    answer,
    by_index,
    call,
    image_of,
    load_chat,
    numbered,
)

from north_lightning.interfaces import Sampler
from north_lightning.rollout import RolloutRunner
from north_lightning.rollout.journal import JournalledSampler
from north_lightning.types import Sample, SamplingParams


@dataclass
class SleepingSampler(Sampler):
    """Sleeps, then says the next of ``turns``; one object for each attempt, as ``for_attempt`` gives."""

    turns: list[list[int]]
    turn_s: float  # mean; between half of it and one and a half times
    num_said: int = field(default=0, init=False)

    def for_attempt(self) -> Sampler:
        return JournalledSampler(SleepingSampler(self.turns, self.turn_s), 0)

    async def generate(self, prompt_token_ids, params: SamplingParams) -> Sample:
        await asyncio.sleep(self.turn_s * random.uniform(0.5, 1.5))
        ids = self.turns[self.num_said]
        self.num_said += 1
        return Sample(list(ids), [-0.5] * len(ids), [0] * len(ids), "stop")


def sleeping_runner(tokenizer_dir: Path, num_turns: int, words_per_turn: int, turn_s: float) -> RolloutRunner:
    """Everything real but sampler, sandbox and verdict; the harness sleeps a tenth of a turn for each action."""
    chat = load_chat(tokenizer_dir)
    text = " ".join(["hello"] * words_per_turn)
    actions = [numbered(call(text), turn) for turn in range(num_turns - 1)]
    turns = [chat.encode_action(action) for action in (*actions, answer(text))]
    return RolloutRunner(
        chat,
        SleepingSampler(turns, turn_s),
        FakeSandboxes(),
        {"terminal": EchoHarness(on_act=partial(asyncio.sleep, turn_s / 10))},
        FakeVerifier(by_index),
        image_of,
        max_turn_tokens=10_000,
        max_context_tokens=131_072,
    )
