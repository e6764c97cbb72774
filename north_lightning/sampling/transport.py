"""Pushing the trainer's weights into a running vLLM server on the same machine.

Comes in: tensors under their Hugging Face names, and a version. Goes out: a server that samples with them, its requests
in flight kept and continued with the new weights. Nothing here knows the model or decides when to push.

    trainer: write to memory ─► pause (keep) ─► start ─► update(path) ─► finish(version) ─► confirm ─► resume
    engine:                     requests freeze           reads the file                               requests go on
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import httpx

from north_lightning.errors import WeightPushError
from north_lightning.interfaces import WeightTransport

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


@dataclass(frozen=True, slots=True)
class PushReport:
    """One successful push."""

    version: int
    seconds: float  # from the first tensor read to the engine resumed
    paused_seconds: float  # of which sampling stood still
    num_bytes: int


class SharedMemoryTransport(WeightTransport):
    """One safetensors file in memory per push, read by the engine through this process's open file descriptor.

    The file has no name: its memory is free as soon as the push is over, or this process dead.

    A push that fails leaves the server paused (``fenced`` is true): its weights are unknown, so it must not sample
    until a push succeeds. The version counts as served only when the engine has confirmed it.

    Args:
        url: base URL of the server, as in ``Sidecar.url``.
        timeout_s: limit for each of the requests a push consists of.
    """

    def __init__(self, url: str, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.fenced = False
        self.last_push: PushReport | None = None
        # A connection per request: the server closes one after an error, which a request on it would run into.
        no_reuse = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(base_url=self.url, timeout=timeout_s, limits=no_reuse)

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Make ``version`` the served weights; ``WeightPushError`` if that was not confirmed."""
        started = time.monotonic()
        with open(os.memfd_create("north_lightning-weights"), "wb") as file:
            num_bytes = _write_safetensors(tensors, file)
            paused = time.monotonic()
            self._update(f"/proc/{os.getpid()}/fd/{file.fileno()}", version)
        ended = time.monotonic()
        self.last_push = PushReport(version, ended - started, ended - paused, num_bytes)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _update(self, path: str, version: int) -> None:
        self.fenced = True
        try:
            self._post("/pause", params={"mode": "keep", "clear_cache": "true"})
            self._start()
            self._post("/update_weights", json={"update_info": {"path": path}})
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


def _write_safetensors(tensors: Iterable[tuple[str, Tensor]], file: BinaryIO) -> int:
    """Write length of the header, header and bytes, copying every tensor once; returns the file's size.

    The format is that of https://huggingface.co/docs/safetensors; the library's own writer makes three copies.
    """
    import torch

    named = list(tensors)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in named:
        dtype = _DTYPES.get(str(tensor.dtype))
        if dtype is None:
            raise WeightPushError(f"{name}: expected a dtype of {', '.join(_DTYPES)}, got {tensor.dtype}")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in named:
        file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    file.flush()
    return 8 + len(text) + end
