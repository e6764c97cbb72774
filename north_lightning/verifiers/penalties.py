"""Rewards put together: one verifier that judges, and penalties for how the attempt went.

In YAML:

    verifier:
      class_path: north_lightning.verifiers.RewardSum
      init_args:
        judge: {verifier: {class_path: north_lightning.verifiers.UnitTestVerifier}, timeout_s: 200}
        further:
          format: {verifier: {class_path: north_lightning.verifiers.FormatPenalty}, weight: 0.1}
          loops: {verifier: {class_path: north_lightning.verifiers.LoopPenalty}, weight: 0.2}

A penalty is a verifier like any other: its value is 0 or less, it looks at the rollout only, and opens no sandbox.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path

from north_lightning.errors import ConfigError, VerifierError
from north_lightning.interfaces import RewardVerifier, SandboxProvider
from north_lightning.types import Count, Grading, Positive, Reward, Rollout, Task, Whole
from north_lightning.verifiers.checked import checked_reward
from north_lightning.verifiers.loops import has_loop


@dataclass(frozen=True)
class Part:
    """One verifier of a sum.

    Args:
        verifier: What says a value.
        weight: What the value is multiplied with.
        timeout_s: Seconds it may take; beyond them the attempt is not graded.
    """

    verifier: RewardVerifier
    weight: float = 1.0
    timeout_s: Positive | None = None

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ConfigError(f"timeout_s: expected a positive number of seconds, got {self.timeout_s}")


@dataclass(frozen=True)
class RewardSum(RewardVerifier):
    """The weighted sum of several verifiers. The judge alone says whether the task is solved.

    Args:
        judge: Who says whether the attempt solved the task.
        further: What else counts, by name; the names are those in the reward's details.
    """

    judge: Part
    further: dict[str, Part] = field(default_factory=dict)

    @property
    def grading(self) -> Grading:  # type: ignore[override]
        return self.judge.verifier.grading

    def grader(self, task: Task) -> str:
        return self.judge.verifier.grader(task)

    @property
    def reward_range(self) -> tuple[float, float]:
        ends = [
            [part.weight * end for end in part.verifier.reward_range] for part in (self.judge, *self.further.values())
        ]
        return sum(map(min, ends)), sum(map(max, ends))

    def limit_s(self, task: Task) -> float | None:
        """Of all parts, one after another; None if none is limited."""
        limits = []
        for name, part in {"judge": self.judge, **self.further}.items():
            own_s = part.verifier.limit_s(task)
            if part.timeout_s is not None and own_s is not None and own_s >= part.timeout_s:
                raise ConfigError(
                    f"verifier.{name}.timeout_s: expected more than the {own_s:g} s that its verifier gives the tests "
                    f"of task {task.id!r}, got {part.timeout_s:g}"
                )
            limits.append(part.timeout_s or own_s)
        return sum(limit for limit in limits if limit is not None) if any(limits) else None

    def check_task(self, task: Task) -> None:
        for part in (self.judge, *self.further.values()):
            part.verifier.check_task(task)

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        """The sum; a part that raises, takes too long or returns no finite number leaves the attempt ungraded."""
        values = {}
        judged = Reward(0.0)
        for name, part in {"judge": self.judge, **self.further}.items():
            reward = await _graded(name, part, task, rollout, workdir, sandboxes)
            values[name] = part.weight * reward.value
            if name == "judge":
                judged = reward
        return replace(judged, value=sum(values.values()), details={**judged.details, "parts": values}, numbers={})


async def _graded(
    name: str, part: Part, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider
) -> Reward:
    try:
        async with asyncio.timeout(part.timeout_s):
            reward = await part.verifier.verify(task, rollout, workdir, sandboxes)
    except TimeoutError as error:
        raise VerifierError(f"verifier part {name!r}: expected an end within {part.timeout_s} s, got none") from error
    return checked_reward(reward, part.verifier, f"verifier part {name!r}")


class Penalty(RewardVerifier):
    """Takes up to 1 away."""

    @property
    def reward_range(self) -> tuple[float, float]:
        return (-1.0, 0.0)


class FormatPenalty(Penalty):
    """Minus the share of turns that were no valid action."""

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        invalid = sum(turn.error is not None for turn in rollout.turns)
        return Reward(-invalid / max(len(rollout.turns), 1))


class LengthPenalty(Penalty):
    """Nothing up to ``free_tokens`` generated tokens, then linearly down to -1 at ``max_tokens``.

    The soft overlong punishment of DAPO (https://arxiv.org/abs/2503.14476, eq. 13), over all turns of an attempt.

    Args:
        free_tokens: Generated tokens, reasoning included, that cost nothing.
        max_tokens: From here on it costs 1.
    """

    def __init__(self, free_tokens: Whole, max_tokens: Count) -> None:
        if not 0 <= free_tokens < max_tokens:
            raise ConfigError(
                f"free_tokens: expected 0 or more and less than max_tokens, {max_tokens}, got {free_tokens}"
            )
        self.free_tokens = free_tokens
        self.max_tokens = max_tokens

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        excess = (rollout.num_sampled_tokens - self.free_tokens) / (self.max_tokens - self.free_tokens)
        return Reward(-min(max(excess, 0.0), 1.0))


class LoopPenalty(Penalty):
    """-1 for an attempt that went in circles (``loops.has_loop``), or was ended because it did."""

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        return Reward(-float(rollout.stop_reason == "loop" or has_loop(rollout)))
