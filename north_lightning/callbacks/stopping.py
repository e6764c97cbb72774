"""Ends training when the loss is low enough: supervised fine-tuning that primes for reinforcement learning."""

from __future__ import annotations

from collections import deque
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from north_lightning.errors import ConfigError
from north_lightning.types import Count


class StopAtLoss(Callback):
    """Stops when the mean of ``monitor`` over the last ``window_steps`` optimizer steps is at most ``loss``.

    Reinforcement learning needs a model that sometimes succeeds and still explores, so where SFT stops decides; the
    loss tells it more robustly than a number of steps.

    Args:
        loss: Where to stop.
        window_steps: How many optimizer steps the running mean covers.
        monitor: The logged quantity.
    """

    def __init__(self, loss: float, window_steps: Count = 20, monitor: str = "train/loss") -> None:
        if window_steps < 1:
            raise ConfigError(f"window_steps: expected at least 1, got {window_steps}")
        self.loss = loss
        self.monitor = monitor
        self.recent: deque[float] = deque(maxlen=window_steps)
        self._step = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # a micro-batch of a step that is not complete
        self._step = trainer.global_step
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ConfigError(f"StopAtLoss.monitor: '{self.monitor}' is not logged; logged are {known}")
        self.recent.append(float(trainer.callback_metrics[self.monitor]))
        if len(self.recent) == self.recent.maxlen and fmean(self.recent) <= self.loss:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self.recent), "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.recent.extend(state_dict["recent"])
        self._step = state_dict["step"]
