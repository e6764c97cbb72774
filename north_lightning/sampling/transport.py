"""Pushing the trainer's weights into a running vLLM server on the same machine.

Comes in: tensors under their Hugging Face names, and a version. Goes out: a server that samples with them, its requests
in flight kept and continued with the new weights. Nothing here knows the model or decides when to push.

    trainer: write to memory ─► pause (keep) ─► start ─► update(path)... ─► finish(version) ─► confirm ─► resume
    engine:                     requests freeze           reads the files                                 requests go on
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import httpx

from north_lightning.errors import WeightPushError
from north_lightning.interfaces import WeightTransport

if TYPE_CHECKING:
    from torch import Tensor

BUCKET_BYTES = 2**30

_DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


@dataclass(frozen=True, slots=True)
class PushReport:
    """One successful push."""

    version: int
    seconds: float  # from the first tensor read to the engine resumed
    paused_seconds: float  # of which sampling stood still
    num_bytes: int


class SharedMemoryTransport(WeightTransport):
    """Safetensors files in memory, read by the engine through this process's open file descriptors.

    The files have no name: their memory is free as soon as the push is over, or this process dead. Tensors are taken
    one bucket at a time, so that those made on the way (gathered from many processes, merged with adapters) never exist
    all at once outside of the files.

    A push that fails leaves the server paused (``fenced`` is true): its weights are unknown, so it must not sample
    until a push succeeds. The version counts as served only when the engine has confirmed it.

    Args:
        url: base URL of the server, as in ``Sidecar.url``.
        timeout_s: limit for each of the requests a push consists of.
        max_staged_gib: sampling pauses once so much is written, and what follows is read as it is made: less memory on
            the host, a longer pause. None: everything is written before sampling pauses.
    """

    def __init__(self, url: str, timeout_s: float = 60.0, max_staged_gib: float | None = None) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.max_staged_bytes = math.inf if max_staged_gib is None else max_staged_gib * 2**30
        self.fenced = False
        self.last_push: PushReport | None = None
        # A connection per request: the server closes one after an error, which a request on it would run into.
        no_reuse = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(base_url=self.url, timeout=timeout_s, limits=no_reuse)

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Make ``version`` the served weights; ``WeightPushError`` if that was not confirmed."""
        started = time.monotonic()
        paused: float | None = None
        total = num_staged = 0
        try:
            with ExitStack() as staged:
                paths = []
                for bucket in _in_buckets(tensors, min(BUCKET_BYTES, self.max_staged_bytes)):
                    file = staged.enter_context(open(os.memfd_create("north_lightning-weights"), "wb"))
                    size = _write_safetensors(bucket, file)
                    total, num_staged = total + size, num_staged + size
                    paths.append(f"/proc/{os.getpid()}/fd/{file.fileno()}")
                    if num_staged >= self.max_staged_bytes:
                        paused = self._pause() if paused is None else paused
                        self._load(paths)
                        staged.close()
                        num_staged = 0
                paused = self._pause() if paused is None else paused
                self._load(paths)
            self._finish(version)
        except httpx.HTTPError as error:
            raise WeightPushError(
                f"{self.url}: version {version} was not confirmed ({type(error).__name__}: {error}); "
                "the sampler stays paused until a push succeeds"
            ) from error
        ended = time.monotonic()
        self.last_push = PushReport(version, ended - started, ended - paused, total)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _pause(self) -> float:
        """Begin: no token is sampled from here on. When that was asked for."""
        self.fenced = True
        paused = time.monotonic()
        self._post("/pause", params={"mode": "keep", "clear_cache": "true"})
        self._start()
        return paused

    def _load(self, paths: list[str]) -> None:
        """Have the engine read what is staged."""
        while paths:
            self._post("/update_weights", json={"update_info": {"path": paths.pop(0)}})

    def _finish(self, version: int) -> None:
        self._post("/finish_weight_update", json={"weight_version": str(version)})
        served = self._client.get("/weight_info").raise_for_status().json()["weight_version"]
        if served != str(version):
            raise WeightPushError(f"{self.url}: pushed version {version}, but the engine serves {served}")
        self._post("/resume")
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


def _in_buckets(tensors: Iterable[tuple[str, Tensor]], num_bytes: float) -> Iterator[list[tuple[str, Tensor]]]:
    """Lists of tensors that follow each other, of at most so many bytes each or of one tensor."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > num_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _write_safetensors(named: list[tuple[str, Tensor]], file: BinaryIO) -> int:
    """Write length of the header, header and bytes, copying every tensor once; returns the file's size.

    The format is that of https://huggingface.co/docs/safetensors; the library's own writer makes three copies.
    """
    import torch

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
