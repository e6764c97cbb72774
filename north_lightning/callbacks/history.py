"""Every logged number, kept on disk: one JSON line per optimizer step, and a summary at the end.

In: what modules and callbacks log. Out: ``history.jsonl`` and ``summary.json`` in the run's folder, which reports are
made from. Independent of W&B, which may be used beside it. Not here: charts.
"""

from __future__ import annotations

import json
import math
import resource
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from north_lightning.data.batches import rows_at_once
from north_lightning.data.rollouts import RolloutStep
from north_lightning.durable import replace_text
from north_lightning.history import HISTORY, read_history

SUMMARY = "summary.json"


class JSONLHistory(Logger):
    """A Lightning logger: ``{"step": 12, "time_s": 34.5, "train/loss": 0.6, ...}``, one line per logged step.

    ``step`` is the optimizer step's number from 0, ``time_s`` seconds of this process. A resumed run drops the lines of
    steps that it repeats. Values that are not finite become ``null``.

    Args:
        save_dir: The run's folder; ``trainer.default_root_dir`` by default.
    """

    def __init__(self, save_dir: Path = Path()) -> None:
        super().__init__()
        self.path = Path(save_dir) / HISTORY
        self._file: TextIO | None = None
        self._line: dict[str, Any] = {}
        self._begins_at: int | None = None
        self._started = time.monotonic()

    @property
    def name(self) -> str:
        """Empty, as is the version: Lightning's checkpoints lie in ``checkpoints`` right in the run's folder."""
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration is saved as ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._line.get("step") != step:
            self._line = {"step": step or 0, "time_s": round(time.monotonic() - self._started, 3)}
            self._begins_at = None
        self._line |= {key: _number(value) for key, value in metrics.items() if key != "epoch"}
        self._write_line()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._line = {}
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # what the disk has no room for was complained of
                file.close()

    def _write_line(self) -> None:
        """At once, so that a kill loses nothing; in place of what was logged for the same step before."""
        try:
            if self._file is None:
                self._file, same_step = _continue(self.path, self._line["step"])
                self._line = same_step | self._line
            if self._begins_at is None:
                self._begins_at = self._file.tell()
            self._file.truncate(self._begins_at)
            self._file.write(json.dumps(self._line) + "\n")
            self._file.flush()
        except OSError as error:  # such as a full disk, which does not say where
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _continue(path: Path, step: int) -> tuple[TextIO, dict[str, Any]]:
    """``path`` opened behind its last line before ``step``, and the line of ``step``; a torn last line is dropped."""
    lines = read_history(path) if path.exists() else []
    replace_text(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] < step))
    return path.open("a"), next((line for line in lines if line["step"] == step), {})


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


class RunSummary(Callback):
    """Writes ``summary.json``: steps, seconds, peak memory, why training ended, and the last value of every metric."""

    def __init__(self) -> None:
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        complete = trainer.max_steps not in (-1, None) and trainer.global_step >= trainer.max_steps
        summary = {
            "steps": trainer.global_step,
            "seconds": round(time.monotonic() - self._started, 3),
            "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
            "stopped": "max_steps" if complete else "early" if trainer.should_stop else "end of data",
            "metrics": {name: _number(value) for name, value in sorted(trainer.callback_metrics.items())},
        }
        replace_text(Path(trainer.default_root_dir) / SUMMARY, json.dumps(summary, indent=2) + "\n")


class Throughput(Callback):
    """Logs ``speed/tokens_per_s`` (of all tokens that pass through the model) and ``speed/step_s``.

    The time of a step runs from the end of the one before, so waiting for data is part of it. Works on ``RolloutStep``s
    and on any batch that has ``token_ids``; where several of these are worked on at a time, every one of them counts as
    long as this process's.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()
        self._tokens = 0
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(batch, RolloutStep):
            self._tokens += batch.num_tokens
        else:
            self._tokens += batch.token_ids.numel() * rows_at_once(trainer)[0]
        if trainer.global_step == self._step:
            return
        now = time.monotonic()
        seconds = (now - self._since) / (trainer.global_step - self._step)
        pl_module.log("speed/tokens_per_s", self._tokens / max(now - self._since, 1e-9))
        pl_module.log("speed/step_s", seconds)
        self._since, self._tokens, self._step = now, 0, trainer.global_step
