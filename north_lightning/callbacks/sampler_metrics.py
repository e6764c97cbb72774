"""Logs what the vLLM servers say of themselves: use of the KV cache, preemptions, requests, tokens, prefix hits.

In: the running servers' ``/metrics``, read by a thread. Out: ``sampler/*`` in the logs of each step. Not here: what the
numbers are (``sampling.gauges``).
"""

from __future__ import annotations

import threading
from typing import Any

import httpx
from lightning.pytorch import Callback, LightningModule, Trainer

from north_lightning.callbacks.sidecar import running_sidecar
from north_lightning.errors import ConfigError
from north_lightning.modules import NorthModule
from north_lightning.sampling.gauges import METRICS_PATH, Reading, SamplerGauges, read_metrics
from north_lightning.sampling.loopback import loopback_client
from north_lightning.types import Positive

TIMEOUT_S = 5.0


class SamplerMetrics(Callback):
    """Reads every server's metrics every ``every_s`` seconds; ``sampler/unread`` counts readings that failed, as they
    do while a server is started again.

    Args:
        every_s: Seconds between two readings.
    """

    def __init__(self, every_s: Positive = 1.0) -> None:
        if not every_s > 0:
            raise ConfigError(f"every_s: expected a positive number of seconds, got {every_s}")
        self.every_s = every_s
        self._gauges = SamplerGauges()
        self._num_unread = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            urls = running_sidecar(trainer).urls
            self._stopping.clear()
            self._thread = threading.Thread(target=self._watch, args=(urls,), name="sampler-metrics", daemon=True)
            self._thread.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, NorthModule)
        with self._lock:
            numbers = self._gauges.take() | ({"unread": float(self._num_unread)} if self._num_unread else {})
        pl_module.record({f"sampler/{name}": value for name, value in numbers.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self, urls: list[str]) -> None:
        with loopback_client("", TIMEOUT_S) as client:
            while not self._stopping.is_set():
                for server, url in enumerate(urls):
                    reading = _read(client, url)
                    with self._lock:
                        if reading is None:
                            self._num_unread += 1
                        else:
                            self._gauges.add(server, reading)
                self._stopping.wait(self.every_s)


def _read(client: httpx.Client, url: str) -> Reading | None:
    try:
        return read_metrics(client.get(url + METRICS_PATH).raise_for_status().text)
    except (httpx.HTTPError, ValueError):
        return None
