"""Pushing the trainer's weights into a running vLLM server on the same machine.

Comes in: tensors under their Hugging Face names, and a version. Goes out: a server that samples with them, its requests
in flight kept and continued with the new weights. Nothing here knows the model or decides when to push.

    trainer: write /dev/shm/...  ─► pause (keep) ─► start ─► update(path) ─► finish(version) ─► confirm ─► resume
    engine:                          requests freeze           reads the file                      requests go on
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from safetensors import SafetensorError

from north_lightning.errors import WeightPushError
from north_lightning.interfaces import WeightTransport

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PushReport:
    """One successful push."""

    version: int
    seconds: float  # from the first tensor read to the engine resumed
    paused_seconds: float  # of which sampling stood still
    num_bytes: int


class SharedMemoryTransport(WeightTransport):
    """One safetensors file in shared memory per push, read by the engine on the same machine.

    A push that fails leaves the server paused (``fenced`` is true): its weights are unknown, so it must not sample
    until a push succeeds. The version counts as served only when the engine has confirmed it.

    Args:
        url: base URL of the server, as in ``Sidecar.url``.
        timeout_s: limit for each of the requests a push consists of.
        directory: where the file is put; on CPU-only Linux, memory.
    """

    def __init__(self, url: str, timeout_s: float = 60.0, directory: str | Path = "/dev/shm") -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.directory = Path(directory)
        self.fenced = False
        self.last_push: PushReport | None = None
        # A connection per request: the server closes one after an error, which a request on it would run into.
        no_reuse = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(base_url=self.url, timeout=timeout_s, limits=no_reuse)

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Make ``version`` the served weights; ``WeightPushError`` if that was not confirmed."""
        started = time.monotonic()
        with self._written(tensors) as path:
            paused = time.monotonic()
            self._update(path, version)
            ended = time.monotonic()
            self.last_push = PushReport(version, ended - started, ended - paused, path.stat().st_size)

    @contextmanager
    def _written(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Path]:
        """The tensors as a file of their own, for as long as the block runs."""
        from safetensors.torch import save_file

        try:
            folder = Path(tempfile.mkdtemp(prefix="north_lightning-", dir=self.directory))
        except OSError as error:
            raise WeightPushError(f"cannot write weights: {error}") from error
        path = folder / "weights.safetensors"
        try:
            try:
                save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}, path)
            except (OSError, SafetensorError) as error:
                raise WeightPushError(f"cannot write weights to {path}: {error}") from error
            yield path
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _update(self, path: Path, version: int) -> None:
        self.fenced = True
        try:
            self._post("/pause", params={"mode": "keep", "clear_cache": "true"})
            self._start()
            self._post("/update_weights", json={"update_info": {"path": str(path)}})
            self._post("/finish_weight_update", json={"weight_version": str(version)})
            served = self._client.get("/weight_info").raise_for_status().json()["weight_version"]
            if served != str(version):
                raise WeightPushError(f"{self.url}: pushed version {version}, but the engine serves {served}")
            self._post("/resume")
        except httpx.HTTPError as error:
            raise WeightPushError(
                f"{self.url}: version {version} was not confirmed ({type(error).__name__}: {error}); "
                "the sampler stays paused until a push succeeds"
            ) from error
        self.fenced = False

    def _start(self) -> None:
        """Start an update session, ending first the one that a failed push or another trainer has left open."""
        try:
            self._post("/start_weight_update")
        except httpx.HTTPStatusError:
            # vLLM has no request that ends a session, but a chunk that cannot be read does.
            self._client.post("/update_weights", json={"update_info": {"path": ""}})
            self._post("/start_weight_update")

    def _post(self, path: str, **content: Any) -> None:
        response = self._client.post(path, **content)
        if response.is_error:
            raise httpx.HTTPStatusError(
                f"{path} answered {response.status_code}: {response.text[:500]}",
                request=response.request,
                response=response,
            )
