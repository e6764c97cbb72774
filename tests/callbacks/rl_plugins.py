"""A verifier for rollouts of an untrained model. Importable by the rollout process."""

from pathlib import Path

from north_lightning.interfaces import RewardVerifier, SandboxProvider
from north_lightning.types import Reward, Rollout, Task


class FirstTokenIsEven(RewardVerifier):
    """1 for half of all rollouts, by what was sampled and nothing else."""

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        first = rollout.token_ids[rollout.loss_mask.index(True)]
        return Reward(float(first % 2 == 0))
