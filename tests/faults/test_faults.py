"""The faults that the package ships strike as planned: the same for the same seed, and what they break is typed."""

import asyncio

import pytest
from fault_trials import RATES

from north_lightning.errors import SandboxError
from north_lightning.faults import FaultPlan
from north_lightning.faults.plugins import FaultySandboxes, NoSandboxes


def struck(folder, seed):
    plan = FaultPlan(folder, seed, RATES)
    kinds = [plan.strike(tuple(RATES), "call", number) for number in range(200)]
    return kinds, dict(plan.struck())


def test_the_same_seed_plans_the_same_faults(tmp_path):
    first, counts = struck(tmp_path / "a", 0)
    assert first == struck(tmp_path / "b", 0)[0]
    assert first != struck(tmp_path / "c", 1)[0]
    assert sum(kind is not None for kind in first) == sum(counts.values()) > 0


def test_a_rate_of_one_strikes_always_and_of_zero_never(tmp_path):
    async def opened(rate):
        plan = FaultPlan(tmp_path / str(rate), 0, {"sandbox_cannot_start": rate})
        return await FaultySandboxes(NoSandboxes(), plan).open(tmp_path)

    assert asyncio.run(opened(0.0)) is not None
    with pytest.raises(SandboxError, match="a planned fault"):
        asyncio.run(opened(1.0))
