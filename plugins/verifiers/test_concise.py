"""The concise reward around a verifier whose answer is known."""

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest
from concise import ConciseVerifier

from north_lightning.errors import ConfigError, VerifierError
from north_lightning.interfaces import RewardVerifier, SandboxProvider
from north_lightning.types import Reward, Rollout, Task

TASK = Task("task", "terminal", "family", "do it", Path("task"), 4)


class Says(RewardVerifier):
    """Always the same reward."""

    def __init__(self, value: float) -> None:
        self.value = value

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        return Reward(self.value, {"output": "words"})


class Fails(RewardVerifier):
    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        raise VerifierError("no sandbox")


def score(verifier: RewardVerifier, num_tokens: int) -> Reward:
    rollout = Rollout("task", "terminal", "family", 0, 0, 0, loss_mask=[True, False] * num_tokens)
    return asyncio.run(verifier.verify(TASK, rollout, Path("work"), None))  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_tokens", "value"), [(0, 1.0), (100, 1.0), (125, 0.8), (200, 0.5), (9000, 0.5)])
def test_a_solved_attempt_is_worth_less_the_longer_it_is_down_to_the_floor(num_tokens: int, value: float) -> None:
    reward = score(ConciseVerifier(Says(1.0), free_tokens=100), num_tokens)
    assert reward.value == pytest.approx(value)
    assert reward.details == {"output": "words", "length_scale": pytest.approx(value)}


def test_an_unsolved_attempt_is_worth_nothing_however_short() -> None:
    assert score(ConciseVerifier(Says(0.0), free_tokens=100), 1).value == 0.0


def test_an_infrastructure_failure_passes_through() -> None:
    with pytest.raises(VerifierError, match="no sandbox"):
        score(ConciseVerifier(Fails(), free_tokens=100), 1)


@pytest.mark.parametrize("settings", [{"free_tokens": 0}, {"free_tokens": 1, "floor": 0.0}])
def test_settings_that_cannot_work_name_their_key(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="free_tokens|floor"):
        ConciseVerifier(Says(1.0), **settings)


def test_it_travels_to_the_rollout_process() -> None:
    copy = pickle.loads(pickle.dumps(ConciseVerifier(Says(1.0), free_tokens=7)))
    assert (copy.free_tokens, copy.verifier.value) == (7, 1.0)
