"""SciCode's sub-problem score from the attempts' rewards, against the count of solved steps."""

from dataclasses import replace

import pytest

from north_lightning.evaluation.attempts import Attempt
from north_lightning.evaluation.command import step_score

ONE = Attempt("m", "w", "a", "t", "answer", "scicode", "single_answer", 0, 0.5)


def test_every_step_weighs_the_same_and_every_seed_of_a_task() -> None:
    attempts = [
        replace(ONE, task_id="a", seed=0, reward=1 / 2),  # 1 of 2
        replace(ONE, task_id="a", seed=1, reward=2 / 2),
        replace(ONE, task_id="b", seed=0, reward=3 / 10),
        replace(ONE, task_id="b", seed=1, reward=None, error="of the sandbox"),
        replace(ONE, task_id="c", seed=0, reward=0.0),
        replace(ONE, task_id="another benchmark's", seed=0, reward=1.0),
    ]
    score = step_score(attempts, {"a": 2, "b": 10, "c": 4})
    assert score["value"] == pytest.approx((1.5 + 3 + 0) / 16)
    low, high = score["ci95"]
    assert low < score["value"] < high
