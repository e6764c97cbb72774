"""A verifier whose tests take as long as real repositories' do, in proportion: a plug-in of ``bench_async.py``."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from north_lightning.interfaces import SandboxProvider
from north_lightning.types import Reward, Rollout, Task
from north_lightning.verifiers import UnitTestVerifier


class SlowUnitTests(UnitTestVerifier):
    """The unit tests, after a log-normal pause that depends on the rollout alone.

    Args:
        median_s: Half of the attempts take longer.
        sigma: Of the logarithm; with 1.0 one of a hundred takes ten times the median.
    """

    def __init__(self, median_s: float = 1.0, sigma: float = 1.0) -> None:
        super().__init__()
        self.median_s, self.sigma = median_s, sigma

    def limit_s(self, task: Task) -> float | None:
        return None

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        await asyncio.sleep(self.median_s * random.Random(rollout.seed).lognormvariate(0.0, self.sigma))
        return await super().verify(task, rollout, workdir, sandboxes)
