"""Writes the model as a Hugging Face checkpoint: what vLLM serves and the next stage starts from.

In: a running ``NorthModule``. Out: a folder that appears whole or not at all. Not here: Lightning's own checkpoints,
which hold the optimizer too and from which a run resumes.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from north_lightning.durable import remove_folder, replace_folder, unfinished_name
from north_lightning.errors import ConfigError
from north_lightning.model.checkpoint import check_replaceable
from north_lightning.modules import NorthModule
from north_lightning.types import Count


class HFCheckpoint(Callback):
    """Writes ``directory`` at the end of training, and ``directory/step-N`` on the way if asked to.

    Where a ``WeightAveraging`` callback averages the weights, the averages are written, wherever it stands in the list.

    Args:
        directory: Where to; ``checkpoint`` in the run's folder by default.
        every_n_steps: Also write every so many optimizer steps.
        keep: How many of the newest ``step-N`` are kept; null keeps all.
        dtype: Dtype of the written weights. Default: that of the base checkpoint (``model.checkpoint``), so that a
            bfloat16 model stays one although it is trained in float32; after random weights, that in memory.
    """

    def __init__(
        self,
        directory: Path | None = None,
        every_n_steps: Count | None = None,
        keep: Count | None = 2,
        dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> None:
        self.directory = directory
        self.keep = keep
        self._is_complete = False
        self.every_n_steps = every_n_steps
        self.dtype = dtype
        self.seconds = 0.0  # spent in writing so far
        self._written_at = -1

    def check_run(self, trainer: Trainer, module: object, data: object) -> None:
        """``ConfigError`` where another one writes the same folder."""
        all_of_them = [one for one in trainer.callbacks if isinstance(one, HFCheckpoint)]  # type: ignore[attr-defined]
        folder = self._directory(trainer)
        if (count := sum(one._directory(trainer) == folder for one in all_of_them)) > 1:
            raise ConfigError(f"trainer.callbacks: expected one HFCheckpoint per directory, got {count} for '{folder}'")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            check_replaceable(self._directory(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self._written_at:
            self._written_at = step
            for callback in _averaging(trainer):  # this step's weights too; only the first call does anything
                callback.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)  # type: ignore[arg-type]
            directory = self._directory(trainer)
            self._write(trainer, pl_module, directory / f"step-{step}")
            if self.keep is not None and trainer.is_global_zero:
                names = (re.fullmatch("step-([1-9][0-9]*)", path.name) for path in directory.iterdir())
                for number in sorted(int(name[1]) for name in names if name and int(name[1]) <= step)[: -self.keep]:
                    remove_folder(directory / f"step-{number}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, self._directory(trainer))
        self._is_complete = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where a run was killed after its last step and before it was released, no step is left to take."""
        if not self._is_complete:
            pl_module.to(trainer.strategy.root_device)
            self.on_train_end(trainer, pl_module)

    def _directory(self, trainer: Trainer) -> Path:
        own = Path(trainer.default_root_dir) / "checkpoint"
        return own if self.directory is None or trainer.fast_dev_run else self.directory  # type: ignore[attr-defined]

    def _write(self, trainer: Trainer, pl_module: LightningModule, directory: Path) -> None:
        started = time.monotonic()
        self._replace(trainer, pl_module, directory)
        self.seconds += time.monotonic() - started

    def _replace(self, trainer: Trainer, pl_module: LightningModule, directory: Path) -> None:
        assert isinstance(pl_module, NorthModule), f"expected a NorthModule, got {type(pl_module).__name__}"
        fresh = unfinished_name(directory)
        if trainer.is_global_zero:
            directory.mkdir(parents=True, exist_ok=True)
            _give_back_steps(fresh, directory)  # of a run that was killed between the two
            shutil.rmtree(fresh, ignore_errors=True)
        with _averaged(trainer, pl_module):
            pl_module.save_hf(fresh, self.dtype)
        if not trainer.is_global_zero:
            return
        if (old := replace_folder(fresh, directory)) is not None:
            _give_back_steps(old, directory)
            shutil.rmtree(old)


def _averaging(trainer: Trainer) -> list[WeightAveraging]:
    return [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]  # type: ignore[attr-defined]


@contextmanager
def _averaged(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """With the averages in place of the weights, as they are while Lightning validates."""
    for callback in _averaging(trainer):
        callback.on_validation_epoch_start(trainer, pl_module)
        rank_zero_info(f"HFCheckpoint writes the averaged weights of {type(callback).__name__}")
    try:
        yield
    finally:
        for callback in _averaging(trainer):
            callback.on_validation_epoch_end(trainer, pl_module)


def _give_back_steps(old: Path, directory: Path) -> None:
    """Checkpoints of earlier steps lie inside the folder that is replaced."""
    for kept in old.glob("step-*"):
        if not (directory / kept.name).exists():
            kept.rename(directory / kept.name)
