"""The learning rate over optimizer steps: linear warm-up, then constant or cosine; how other schedules are stepped."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from north_lightning.errors import ConfigError
from north_lightning.types import Count, Fraction, Whole

_PROBED_STEPS = 100_000  # 0.3 s


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


def scheduler_config(schedule: Any, automatic: bool) -> dict[str, Any]:
    """How Lightning steps ``schedule``: after each optimizer step; one that looks at a metric never, ``StepPlateau``
    does."""
    if isinstance(schedule, ReduceLROnPlateau):
        never = {"frequency": sys.maxsize, "monitor": schedule.monitor} if automatic else {}
        return {"scheduler": schedule, **never}
    if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
        raise ConfigError(
            "model.lr_scheduler: expected lightning.pytorch.cli.ReduceLROnPlateau, which takes the name of a metric as "
            "monitor, got torch.optim.lr_scheduler.ReduceLROnPlateau"
        )
    return {"scheduler": schedule, **({"interval": "step"} if automatic else {})}


def check_rates(schedule: Any, num_steps: float) -> None:
    """Step a schedule, which is spent then, to the end of a run; of a long run, a part and the end.

    Raises:
        ConfigError: it fails, a rate is negative or not finite, or the last steps train nothing.
    """
    if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) or not 0 < num_steps < math.inf:
        return
    name, end, trained = f"model.lr_scheduler: {type(schedule).__name__}", int(num_steps), 0
    with warnings.catch_warnings(action="ignore"):  # no optimizer takes these steps
        for step in range(end) if end <= _PROBED_STEPS else [*range(_PROBED_STEPS), end - 1]:
            rates = [float(group["lr"]) for group in schedule.optimizer.param_groups]
            if not all(0 <= rate < math.inf for rate in rates):
                raise ConfigError(f"{name}: expected rates of at least 0, got {rates[0]:g} for step {step}")
            trained = step + 1 if any(rates) else trained
            schedule.last_epoch = step
            try:
                schedule.step()
            except Exception as error:  # a plug-in's may be any
                said = " ".join(str(error).split())
                raise ConfigError(f"{name} fails after step {step + 1} of {end}: make it longer ({said})") from error
    if trained < end - 1:
        raise ConfigError(f"{name}: the rate is 0 after step {trained} of {end}: make it longer, or train less")


class StepPlateau(Callback):
    """Steps a ``ReduceLROnPlateau`` when its metric is new, with automatic and with manual optimization alike."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step != self._step:  # not in the middle of an accumulated step
            self._step = trainer.global_step
            _step_plateaus(trainer, after_validation=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            _step_plateaus(trainer, after_validation=True)


def _step_plateaus(trainer: Trainer, after_validation: bool) -> None:
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if isinstance(schedule, ReduceLROnPlateau) and schedule.monitor.startswith("val") == after_validation:
            if schedule.monitor not in trainer.callback_metrics:
                known = ", ".join(sorted(trainer.callback_metrics))
                raise ConfigError(f"model.lr_scheduler: monitor '{schedule.monitor}' is not logged; logged are {known}")
            schedule.step(float(trainer.callback_metrics[schedule.monitor]))
