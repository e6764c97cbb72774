"""One line that says how training goes: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from north_lightning.types import NotNegative

DEFAULT_METRICS = [
    "train/loss",
    "val/loss",
    "rollout/pass@1",
    "rollout/turns",
    "train/mismatch_kl",
    "train/entropy",
    "policy_lag/max",
    "speed/wait_s",
    "speed/tokens_per_s",
]


class ProgressLine(Callback):
    """Shows the optimizer step and the latest value of chosen metrics.

    Args:
        metrics: What to show, where it is logged.
        every_s: Seconds between lines where the output is not a terminal.
    """

    def __init__(self, metrics: list[str] | None = None, every_s: NotNegative = 10.0) -> None:
        self.metrics = DEFAULT_METRICS if metrics is None else metrics
        self.every_s = every_s
        self._progress: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = self._printed = time.monotonic()
        if trainer.is_global_zero and sys.stderr.isatty():
            from rich.console import Console

            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self._progress.start()
            self._bar = self._progress.add_task("", total=trainer.max_steps if (trainer.max_steps or -1) > 0 else None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self._progress is not None:
            self._progress.update(self._bar, completed=trainer.global_step, description=self._values(trainer))
        elif time.monotonic() - self._printed >= self.every_s:
            self._print(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        self._print(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _print(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self._printed = time.monotonic()
            elapsed = timedelta(seconds=round(self._printed - self._started))
            print(f"step {trainer.global_step:>5}  {elapsed}  {self._values(trainer)}", file=sys.stderr, flush=True)

    def _values(self, trainer: Trainer) -> str:
        latest = trainer.callback_metrics
        return "  ".join(f"{name} {float(latest[name]):.4g}" for name in self.metrics if name in latest)

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
