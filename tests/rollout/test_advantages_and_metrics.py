"""Leave-one-out advantages and trajectory metrics against formulas written out independently."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from north_lightning.rollout import rloo_advantages
from north_lightning.rollout.metrics import (
    group_metrics,
    metrics_by_environment,
    num_invalid_turns,
    percentile,
    rollout_metrics,
)
from north_lightning.rollout.records import append_records
from north_lightning.types import Message, Reward, Rollout, RolloutGroup, StopReason, ToolCall, Turn
from north_lightning.verifiers.loops import has_loop

# ---- advantages ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=16))
def test_an_advantage_is_the_reward_minus_the_mean_of_the_others(rewards: list[float]) -> None:
    expected = [r - np.mean(rewards[:i] + rewards[i + 1 :]) for i, r in enumerate(rewards)]
    assert rloo_advantages(rewards) == pytest.approx(expected, abs=1e-9)


def test_advantages_are_not_divided_by_the_standard_deviation() -> None:
    assert rloo_advantages([1.0, 0.0, 0.0, 0.0]) == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert rloo_advantages([0.99**9] * 8) == [0.0] * 8  # to the last bit: a rounding error would be a signal
    assert rloo_advantages([0.01, 0.0]) == pytest.approx([0.01, -0.01])


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_equal_rewards_give_no_advantage(value: float) -> None:
    assert rloo_advantages([value] * 8) == pytest.approx([0.0] * 8, abs=1e-12)


@pytest.mark.parametrize("rewards", [[], [1.0]])
def test_a_reward_without_others_has_no_baseline(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        rloo_advantages(rewards)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        rloo_advantages([1.0, wrong])


# ---- metrics -------------------------------------------------------------------------------------------------------


def rollout(
    reward: float = 0.0,
    turns: list[str | None] | None = None,
    stop_reason: StopReason = "finished",
    tokens_per_turn: int = 10,
    environment: str = "terminal",
) -> Rollout:
    errors = turns if turns is not None else [None]
    made = Rollout("task", environment, "family", 0, 0, 0, stop_reason=stop_reason, reward=Reward(reward))
    for error in errors:
        made.token_ids += [1] * 5
        made.loss_mask += [False] * 5
        start = len(made.token_ids)
        made.token_ids += list(range(start, start + tokens_per_turn))
        made.loss_mask += [True] * tokens_per_turn
        made.turns.append(Turn(start, len(made.token_ids), "stop", error))
    return made


def test_behaviour_is_counted_per_turn_and_per_rollout() -> None:
    rollouts = [
        rollout(1.0, [None, None, None]),
        rollout(0.0, [None, "parse: broken"], "invalid_action"),
        rollout(0.0, [None], "length", tokens_per_turn=50),
        rollout(0.0, [None, None], "finished"),
    ]
    metrics = rollout_metrics(rollouts)
    assert metrics["pass@1"] == 0.25
    assert metrics["invalid_call_rate"] == 1 / 8
    assert metrics["invalid_rollouts"] == 0.25
    assert metrics["truncated"] == 0.25
    assert metrics["concluded"] == 0.5
    assert metrics["false_success"] == 0.5
    assert metrics["turns"] == 2.0
    assert metrics["generated_tokens"] == (30 + 20 + 50 + 20) / 4
    assert [num_invalid_turns(one) for one in rollouts] == [0, 1, 0, 0]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.sampled_from([10, 50, 90]))
def test_percentiles_are_those_of_numpy(values: list[int], q: int) -> None:
    assert percentile(values, q) == pytest.approx(np.percentile(values, q))


def test_groups_without_signal_are_counted_per_environment() -> None:
    def group(environment: str, rewards: list[float]) -> RolloutGroup:
        return RolloutGroup(0, "task", environment, [rollout(reward, environment=environment) for reward in rewards])

    groups = [group("terminal", [1, 1]), group("terminal", [0, 0]), group("terminal", [0, 1]), group("swe", [0, 0])]
    assert group_metrics(groups) == {"solve_all": 0.25, "solve_none": 0.5, "lost_rollouts": 0.0}
    metrics = metrics_by_environment(groups)
    assert metrics["pass@1"] == 3 / 8
    assert (metrics["terminal/pass@1"], metrics["swe/pass@1"]) == (0.5, 0.0)
    assert (metrics["terminal/solve_all"], metrics["swe/solve_none"]) == (pytest.approx(1 / 3), 1.0)


def test_nothing_measured_gives_no_numbers() -> None:
    assert metrics_by_environment([]) == {}


# ---- loops ---------------------------------------------------------------------------------------------------------


def exchange(number: int, command: str, output: str) -> list[Message]:
    tool_call = ToolCall(str(number), "bash", {"command": command})
    return [Message("assistant", tool_calls=(tool_call,)), Message("tool", output, tool_call_id=str(number))]


def conversation(*exchanges: tuple[str, str]) -> Rollout:
    made = Rollout("task", "terminal", "family", 0, 0, 0)
    made.messages = [Message("user", "go")]
    for number, (command, output) in enumerate(exchanges):
        made.messages += exchange(number, command, output)
    return made


def test_the_same_exchange_three_times_in_ten_turns_is_a_loop() -> None:
    others = [(f"cat {i}", "x") for i in range(4)]
    assert has_loop(conversation(("ls", "a"), *others, ("ls", "a"), *others[:3], ("ls", "a")))


def test_a_changed_observation_or_a_long_pause_is_no_loop() -> None:
    others = [(f"cat {i}", "x") for i in range(9)]
    assert not has_loop(conversation(("ls", "a"), ("ls", "b"), ("ls", "c"), ("ls", "d")))
    assert not has_loop(conversation(("ls", "a"), ("ls", "a"), *others, ("ls", "a")))


def said(token_ids: list[int]) -> Rollout:
    made = Rollout("task", "terminal", "family", 0, 0, 0, token_ids=[0, *token_ids])
    made.turns = [Turn(1, len(token_ids) + 1, "stop")]
    return made


@pytest.mark.parametrize(
    ("token_ids", "expected"),
    [
        (list(range(200)), False),
        ([*range(50), *([7] * 48), *range(50)], True),
        ([*range(50), *([7] * 47), *range(50)], False),
        (list(range(64)) * 4, True),
        (list(range(64)) * 3, False),
        (list(range(65)) * 4, False),
        (list(range(12)) * 4, True),
        (list(range(10)) * 4, False),  # four times, but only 40 tokens
    ],
)
def test_a_turn_that_repeats_itself_is_a_loop(token_ids: list[int], expected: bool) -> None:
    assert has_loop(said(token_ids)) is expected


# ---- records -------------------------------------------------------------------------------------------------------


def test_records_leave_tokens_out_and_say_the_rest(tmp_path: Path) -> None:
    made = rollout(1.0, [None, "parse: broken"])
    made.messages = [Message("user", "go"), *exchange(0, "ls", "a")]
    made.policy_versions = [-1] * 5 + [3] * 10 + [-1] * 5 + [3] * 5 + [4] * 5
    path = tmp_path / "rollouts.jsonl"
    append_records(path, [made])
    path.write_text(path.read_text() + '{"torn')
    append_records(path, [made, made])
    lines = path.read_text().splitlines()
    assert lines[1] == '{"torn'
    record = json.loads(lines[2])
    assert "token_ids" not in record
    assert (record["reward"], record["num_tokens"], record["num_sampled_tokens"]) == (1.0, 30, 20)
    assert (record["policy_version_min"], record["policy_version_max"]) == (3, 4)
    assert record["turns"][1] == {"num_tokens": 10, "finish_reason": "stop", "error": "parse: broken"}
    assert record["messages"] == [
        {"role": "user", "content": "go"},
        {"role": "assistant", "tool_calls": [{"id": "0", "name": "bash", "arguments": {"command": "ls"}}]},
        {"role": "tool", "content": "a", "tool_call_id": "0"},
    ]
    assert record == json.loads(lines[0]) == json.loads(lines[3])
