"""Where the time of trainer and samplers went: every second of each in exactly one account.

In: a run of ``CISPOModule``. Out: shares of each step in the logs (``time/<account>``, ``sampler_time/<account>``),
seconds of the whole run in ``time.json``. Nothing of the trainer's is measured twice and "other" is what is left of the
clock, so its accounts add up to the wall time. How the samplers' do: ``rollout.accounts``.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from north_lightning.callbacks.hf_checkpoint import HFCheckpoint
from north_lightning.callbacks.producer import RolloutProducerCallback
from north_lightning.callbacks.sidecar import running_sidecar
from north_lightning.callbacks.weight_sync import WeightSyncCallback
from north_lightning.data.rollouts import RolloutStep
from north_lightning.durable import replace_text
from north_lightning.errors import ConfigError
from north_lightning.modules import CISPOModule
from north_lightning.rollout.accounts import Event, SamplerAccounts

TIME = "time.json"
ACCOUNTS = ("wait", "forward_backward", "optimizer", "push", "checkpoint", "validation", "other")


class TimeAccounts(Callback):
    """Accounts of process 0: waiting for rollouts, forward and backward, optimizer, weight push, checkpoints
    (Lightning's and Hugging Face's), validation, other. And of each server, where a ``RolloutProducerCallback`` before
    this one says what is asked of it: generating (for groups trained, discarded, or pending when training ends), idle
    while attempts wait for sandbox, harness or verifier, idle without attempts, paused for a push, down.

    A step's interval ends where this callback is told of its end; what is done for it afterwards (a checkpoint) counts
    in the next one. The samplers' ends with the rollout process's last sign of life, a second ago at most.
    """

    def __init__(self) -> None:
        self.samplers: SamplerAccounts | None = None
        self._events = deque[Event]()  # filled by the producer's thread
        self.seconds = dict.fromkeys(ACCOUNTS, 0.0)
        """Of the run so far, by account; from the start of training."""
        self._elsewhere = defaultdict[str, float](float)  # measured by this object since the start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, CISPOModule):
            raise ConfigError(f"TimeAccounts: expected a CISPOModule, got {type(pl_module).__name__}")
        trainer.save_checkpoint = self._timed("checkpoint", trainer.save_checkpoint)  # type: ignore[method-assign]
        self._before = self._measured(trainer, pl_module)
        self._since = time.monotonic()
        if trainer.is_global_zero:
            self._listen_to_producer(trainer)

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
        assert isinstance(pl_module, CISPOModule)
        pl_module.record({f"sampler_time/{name}": share for name, share in self._sampler_shares(trainer).items()})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating_since = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._elsewhere["validation"] += time.monotonic() - self._validating_since

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer, pl_module)
        if trainer.is_global_zero:
            account = {"trainer_s": _rounded(self.seconds), **self._of_samplers(trainer)}
            replace_text(Path(trainer.default_root_dir) / TIME, json.dumps(account, indent=2) + "\n")

    def check_run(self, trainer: Trainer, module: LightningModule, data: object) -> None:
        after = trainer.callbacks[trainer.callbacks.index(self) :]  # type: ignore[attr-defined]
        if any(isinstance(callback, RolloutProducerCallback) for callback in after):
            raise ConfigError("trainer.callbacks: expected TimeAccounts after the RolloutProducerCallback")

    def _listen_to_producer(self, trainer: Trainer) -> None:
        self.check_run(trainer, trainer.lightning_module, None)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RolloutProducerCallback):
                callback.listen(self._events.append)
                self.samplers = SamplerAccounts(len(running_sidecar(trainer).urls), time.monotonic())

    def _sampler_shares(self, trainer: Trainer) -> dict[str, float]:
        """Of the time since the last call, the mean of all servers; empty where nothing is known of it yet."""
        if self.samplers is None:
            return {}
        since_s, before = self.samplers.until_s, [dict(seconds) for seconds in self.samplers.seconds]
        self._tell_samplers(self.samplers, trainer)
        whole = (self.samplers.until_s - since_s) * len(before)
        if not whole:
            return {}
        spent = zip(self.samplers.seconds, before, strict=True)
        changes = [{name: now[name] - then[name] for name in now} for now, then in spent]
        return {name: sum(change[name] for change in changes) / whole for name in changes[0]}

    def _tell_samplers(self, samplers: SamplerAccounts, trainer: Trainer) -> None:
        """First when they were away, then what happened meanwhile."""
        for outage in running_sidecar(trainer).take_outages():
            samplers.away(*outage, "down")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            while isinstance(callback, WeightSyncCallback) and callback.pauses:
                since_s, until_s = callback.pauses.pop(0)
                for server in range(len(samplers.seconds)):
                    samplers.away(server, since_s, until_s, "paused")
        while self._events:
            samplers.add([self._events.popleft()])

    def _of_samplers(self, trainer: Trainer) -> dict[str, Any]:
        if self.samplers is None:
            return {}
        self._tell_samplers(self.samplers, trainer)
        generated_for = self.samplers.generated_for(trainer.datamodule.queue.end_of)  # type: ignore[attr-defined]
        return {
            "samplers_s": [_rounded(seconds) for seconds in self.samplers.seconds],
            "generated_for_s": _rounded(generated_for),
        }

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


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}
