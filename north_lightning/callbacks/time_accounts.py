"""Where the trainer's time went: every second of it in exactly one account.

In: a run of ``CISPOModule``. Out: shares of each step in the logs (``time/<account>``), seconds of the whole run in
``time.json``. Nothing is measured twice and "other" is what is left of the clock, so the accounts add up to the wall
time. Not here: the sampler's time.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from north_lightning.callbacks.hf_checkpoint import HFCheckpoint
from north_lightning.callbacks.weight_sync import WeightSyncCallback
from north_lightning.data.rollouts import RolloutStep
from north_lightning.errors import ConfigError
from north_lightning.modules import CISPOModule

TIME = "time.json"
ACCOUNTS = ("wait", "forward_backward", "optimizer", "push", "checkpoint", "validation", "other")


class TimeAccounts(Callback):
    """Accounts of process 0: waiting for rollouts, forward and backward, optimizer, weight push, checkpoints
    (Lightning's and Hugging Face's), validation, other.

    A step's interval ends where this callback is told of its end; what is done for it afterwards (a checkpoint) counts
    in the next one.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(ACCOUNTS, 0.0)
        """Of the run so far, by account; from the start of training."""
        self._elsewhere = defaultdict[str, float](float)  # measured by this object since the start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CISPOModule):
            raise ConfigError(f"TimeAccounts: expected a CISPOModule, got {type(pl_module).__name__}")
        trainer.save_checkpoint = self._timed("checkpoint", trainer.save_checkpoint)  # type: ignore[method-assign]
        self._before = self._measured(trainer, pl_module)
        self._since = time.monotonic()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: RolloutStep, batch_idx: int
    ) -> None:
        self._elsewhere["wait"] += batch.wait_s

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: RolloutStep, batch_idx: int
    ) -> None:
        spent = self._close(trainer, pl_module)
        whole = sum(spent.values())
        pl_module.log_dict({f"time/{name}": spent[name] / whole for name in ACCOUNTS})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating_since = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._elsewhere["validation"] += time.monotonic() - self._validating_since

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer, pl_module)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / TIME
            path.parent.mkdir(parents=True, exist_ok=True)
            seconds = {name: round(self.seconds[name], 3) for name in ACCOUNTS}
            path.write_text(json.dumps({"trainer_s": seconds}, indent=2) + "\n")

    def _close(self, trainer: Trainer, module: LightningModule) -> dict[str, float]:
        """Seconds by account since the last call."""
        assert isinstance(module, CISPOModule)
        now, measured = time.monotonic(), self._measured(trainer, module)
        spent = {name: measured[name] - self._before[name] for name in ACCOUNTS if name != "other"}
        spent["other"] = now - self._since - sum(spent.values())
        assert spent["other"] > -1e-3, f"more was measured than went by: {spent}"
        self.seconds = {name: self.seconds[name] + spent[name] for name in ACCOUNTS}
        self._before, self._since = measured, now
        return spent

    def _measured(self, trainer: Trainer, module: CISPOModule) -> dict[str, float]:
        measured = dict.fromkeys(ACCOUNTS, 0.0) | self._elsewhere | module.seconds
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightSyncCallback):
                measured["push"] += callback.seconds
            elif isinstance(callback, HFCheckpoint):
                measured["checkpoint"] += callback.seconds
        return measured

    def _timed(self, account: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*arguments: Any, **settings: Any) -> Any:
            started = time.monotonic()
            try:
                return call(*arguments, **settings)
            finally:
                self._elsewhere[account] += time.monotonic() - started

        return timed
