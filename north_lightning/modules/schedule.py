"""The learning rate over optimizer steps: linear warm-up, then constant or cosine."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from north_lightning.errors import ConfigError
from north_lightning.types import Count, Fraction, Whole


class WarmupSchedule(LRScheduler):
    """Linear warm-up to the optimizer's learning rate, then constant; or cosine down, where ``total_steps`` is given.

    Args:
        optimizer: The optimizer.
        warmup_steps: The first step runs at 1/warmup_steps of the rate, step ``warmup_steps`` at all of it.
        total_steps: The step at which the cosine ends; left out, the rate stays constant after the warm-up.
        final_fraction: Where the cosine ends, as a fraction of the rate; 0.1 by default.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: Whole = 0,
        total_steps: Count | None = None,
        final_fraction: Fraction | None = None,
    ) -> None:
        if warmup_steps < 0 or (total_steps is not None and total_steps <= warmup_steps):
            raise ConfigError(f"total_steps: expected more than warmup_steps={warmup_steps} >= 0, got {total_steps}")
        if total_steps is None and final_fraction is not None:
            raise ConfigError(f"final_fraction: expected total_steps beside it, got {final_fraction}")
        final_fraction = 0.1 if final_fraction is None else final_fraction
        if not 0.0 <= final_fraction <= 1.0:
            raise ConfigError(f"final_fraction: expected 0 to 1, got {final_fraction}")
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.final_fraction = final_fraction
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [base * self._fraction(self.last_epoch) for base in self.base_lrs]

    def _fraction(self, step: int) -> float:
        """Of the learning rate, for the optimizer step that is number ``step`` from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))
