"""Rewards put together, against sums done by hand."""

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest

from north_lightning.errors import ConfigError, VerifierError
from north_lightning.interfaces import RewardVerifier, SandboxProvider
from north_lightning.types import Message, Reward, Rollout, Task, ToolCall, Turn
from north_lightning.verifiers import FormatPenalty, LengthPenalty, LoopPenalty, Part, RewardSum

TASK = Task("task", "terminal", "family", "do it", Path("task"), 4)


class Says(RewardVerifier):
    def __init__(self, reward: Any, after_s: float = 0.0, limit_s: float | None = None) -> None:
        self.reward, self.after_s, self.own_limit_s = reward, after_s, limit_s

    @property
    def reward_range(self) -> tuple[float, float]:
        return (-1.0, 2.0)

    def limit_s(self, task: Task) -> float | None:
        return self.own_limit_s

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        await asyncio.sleep(self.after_s)
        return self.reward


def score(verifier: RewardVerifier, rollout: Rollout | None = None) -> Reward:
    rollout = rollout or attempt()
    return asyncio.run(verifier.verify(TASK, rollout, Path("work"), None))  # type: ignore[arg-type]


def attempt(num_tokens: int = 0, errors: tuple[str | None, ...] = (), **fields: Any) -> Rollout:
    turns = [Turn(0, 0, "stop", error) for error in errors]
    return Rollout("task", "terminal", "family", 0, 0, 0, loss_mask=[True] * num_tokens, turns=turns, **fields)


def test_the_sum_is_weighted_and_the_judge_alone_says_solved() -> None:
    judge = Part(Says(Reward(0.8, {"output": "words"}, solved=True)), weight=0.5)
    reward = score(RewardSum(judge, {"a": Part(Says(Reward(-1.0)), 0.25), "b": Part(Says(Reward(2.0)))}))
    assert reward.value == pytest.approx(0.5 * 0.8 - 0.25 + 2.0)
    assert reward.solved is True
    assert reward.details == {"output": "words", "parts": {"judge": 0.4, "a": -0.25, "b": 2.0}}
    assert score(RewardSum(Part(Says(Reward(0.0))), {"b": Part(Says(Reward(2.0)))})).solved is False


def test_the_range_of_a_sum_is_that_of_its_parts() -> None:
    total = RewardSum(Part(Says(Reward(1.0)), 0.5), {"loops": Part(LoopPenalty(), 2.0), "against": Part(Says(0), -1.0)})
    assert total.reward_range == (-0.5 - 2.0 - 2.0, 1.0 + 0.0 + 1.0)


@pytest.mark.parametrize(
    "bad",
    [Reward(float("nan")), Reward(float("inf")), 1.0, None, Reward("1"), Reward(True), Reward(2.5), Reward(10**400)],
)
def test_a_part_that_is_no_number_of_its_range_leaves_the_attempt_ungraded(bad: Any) -> None:
    with pytest.raises(VerifierError, match="part 'b'"):
        score(RewardSum(Part(Says(Reward(1.0))), {"b": Part(Says(bad))}))


def test_a_part_that_is_too_slow_is_named() -> None:
    with pytest.raises(VerifierError, match=r"part 'slow': expected an end within 0.01 s"):
        score(RewardSum(Part(Says(Reward(1.0))), {"slow": Part(Says(Reward(1.0), after_s=30), timeout_s=0.01)}))
    with pytest.raises(ConfigError, match="timeout_s"):
        Part(Says(Reward(1.0)), timeout_s=0)


def test_a_part_that_is_ended_before_its_tests_names_both_limits() -> None:
    one = RewardSum(Part(Says(None, limit_s=60.0), timeout_s=60.0))
    with pytest.raises(ConfigError, match=r"verifier.judge.timeout_s: expected more than the 60 s .* got 60"):
        one.limit_s(TASK)


def test_the_limit_of_a_sum_is_the_sum_of_limits() -> None:
    parts = {"a": Part(Says(None, limit_s=4), timeout_s=5.0), "b": Part(Says(None))}
    assert RewardSum(Part(Says(None, limit_s=60.0)), parts).limit_s(TASK) == 65.0
    assert RewardSum(Part(Says(None))).limit_s(TASK) is None


@pytest.mark.parametrize(("errors", "value"), [((), 0.0), ((None, None), 0.0), ((None, "bad", None, "bad"), -0.5)])
def test_format_costs_the_share_of_invalid_turns(errors: tuple[str | None, ...], value: float) -> None:
    assert score(FormatPenalty(), attempt(errors=errors)).value == value


@pytest.mark.parametrize(("num_tokens", "value"), [(0, 0.0), (100, 0.0), (150, -0.5), (200, -1.0), (9000, -1.0)])
def test_length_costs_linearly_above_what_is_free(num_tokens: int, value: float) -> None:
    assert score(LengthPenalty(100, 200), attempt(num_tokens)).value == value


def test_length_without_room_names_its_key() -> None:
    with pytest.raises(ConfigError, match="free_tokens: expected 0 or more and less than max_tokens, 5, got 5"):
        LengthPenalty(5, 5)


def test_going_in_circles_costs_one() -> None:
    call = Message("assistant", tool_calls=(ToolCall("0", "bash", {"command": "ls"}),))
    circle = [call, Message("tool", "a", tool_call_id="0")]
    assert score(LoopPenalty(), attempt(messages=circle * 3)).value == -1.0
    assert score(LoopPenalty(), attempt(messages=circle * 2)).value == 0.0
    assert score(LoopPenalty(), attempt(stop_reason="loop")).value == -1.0


def test_a_sum_travels_to_the_rollout_process() -> None:
    verifier = RewardSum(Part(Says(Reward(1.0))), {"length": Part(LengthPenalty(1, 3), 0.5)})
    assert score(pickle.loads(pickle.dumps(verifier)), attempt(2)).value == 0.75
