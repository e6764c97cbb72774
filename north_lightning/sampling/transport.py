"""Pushing the trainer's weights into running vLLM servers: the protocol, and shared memory to carry them.

Comes in: tensors under their Hugging Face names, and a version. Goes out: servers that sample with them, their requests
in flight kept and continued with the new weights. Nothing here knows the model or decides when to push.

    trainer: write to memory ─► pause (keep) ─► start ─► update(path)... ─► finish(version) ─► confirm ─► resume
    engine:                     requests freeze           reads the files                                 requests go on

Several servers take each step together, and are compared at the end.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar, get_args

import httpx

from north_lightning.errors import ConfigError, WeightPushError
from north_lightning.interfaces import WeightTransport
from north_lightning.sampling.loopback import loopback_client
from north_lightning.types import NotNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PrefixCache = Literal["cleared", "kept", "salted"]

BUCKET_BYTES = 2**30
PROBE = tuple(range(1, 33))
"""Token ids that every server scores after a push."""

_DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


@dataclass(frozen=True, slots=True)
class PushReport:
    """One successful push."""

    version: int
    seconds: float  # from the first tensor read to the engine resumed
    paused_seconds: float  # of which sampling stood still
    num_bytes: int
    resumed_at: float  # of the monotonic clock


class HTTPTransport(WeightTransport):
    """What every push to vLLM servers has in common, whatever carries the tensors.

    A push that fails leaves the servers paused (``fenced`` is true): their weights are unknown, so they must not sample
    until a push succeeds. The version counts as served only when every engine has confirmed it.

    None of several servers samples before all have confirmed the version, and it counts only when all give the tokens
    of ``PROBE`` the same log-probabilities; one that fails is named, and fences all. What is sampled while they are
    probed has its own log-probabilities, whatever the probe says.

    Args:
        urls: base URL of the server, as in ``Sidecar.url``, or of several that serve the same model.
        timeout_s: limit for each of the requests a push consists of.
        prefix_cache: ``cleared`` at every push, so that every token is sampled as its version would: requests in flight
            read their context again. ``kept``: neither they nor later prompts that begin alike do, and what is sampled
            behind such a prefix mixes versions; cheaper for long contexts, with a larger mismatch to the trainer.
            ``salted``: requests in flight keep theirs, but a prompt that is sent later finds only what its own version
            has computed (``VLLMSampler.salt_by_version``; one that is sent while a push is under way may still find
            the older version's).
        probe_tolerance: largest mean difference of log-probabilities between two servers, in nats; bfloat16 needs some.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        timeout_s: float = 60.0,
        prefix_cache: PrefixCache = "cleared",
        probe_tolerance: float = 0.02,
    ) -> None:
        if prefix_cache not in get_args(PrefixCache):
            raise ConfigError(f"prefix_cache: expected {', '.join(get_args(PrefixCache))}, got {prefix_cache!r}")
        self.urls = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        self.probe_tolerance = probe_tolerance
        self.prefix_cache = prefix_cache
        self.timeout_s = timeout_s
        self.fenced = False
        self.last_push: PushReport | None = None
        self._clients = [loopback_client(url, timeout_s) for url in self.urls]
        self._threads = ThreadPoolExecutor(len(self.urls), "weight-push")

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Make ``version`` the served weights; ``WeightPushError`` if that was not confirmed."""
        started = time.monotonic()
        try:
            paused, total = self._send(tensors)
            self._finish(version)
        except ServersFailed as failed:
            urls = ", ".join(failed.errors)
            reasons = "; ".join(f"{type(error).__name__}: {error}" for error in failed.errors.values())
            raise WeightPushError(
                f"{urls}: version {version} was not confirmed ({reasons}); the sampler stays paused until a push "
                "succeeds"
            ) from failed
        ended = time.monotonic()
        self._check_agreement(version)
        self.last_push = PushReport(version, ended - started, ended - paused, total, ended)

    @abstractmethod
    def _send(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[float, int]:
        """``_pause`` and bring all tensors to all engines; when it paused, and how many bytes there were."""

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown()
        for client in self._clients:
            client.close()

    def _pause(self) -> float:
        """Begin: no token is sampled from here on. When that was asked for."""
        self.fenced = True
        paused = time.monotonic()
        clears = str(self.prefix_cache == "cleared").lower()
        self._post("/pause", params={"mode": "keep", "clear_cache": clears})
        self._on_all(self._start)
        return paused

    def _finish(self, version: int) -> None:
        self._post("/finish_weight_update", json={"weight_version": str(version)})
        for url, served in zip(self.urls, self._on_all(_served_version), strict=True):
            if served != str(version):
                raise WeightPushError(f"{url}: pushed version {version}, but the engine serves {served}")
        self._post("/resume")
        self.fenced = False

    def _check_agreement(self, version: int) -> None:
        """``WeightPushError``, with all fenced, if two servers differ on the probe. One has none to differ from."""
        if len(self.urls) == 1:
            return
        try:
            scores = self._on_all(_score_probe)
            for url, score in zip(self.urls[1:], scores[1:], strict=True):
                apart = sum(abs(one - other) for one, other in zip(scores[0], score, strict=True)) / len(score)
                if not apart <= self.probe_tolerance:
                    raise WeightPushError(
                        f"{url}: version {version} gives log-probabilities {apart:.3g} from those of {self.urls[0]}, "
                        f"expected at most {self.probe_tolerance:g}; all are paused until a push succeeds"
                    )
        except ServersFailed as failed:
            self._fence()
            raise WeightPushError(f"version {version} could not be probed: {failed}") from failed
        except WeightPushError:
            self._fence()
            raise

    def _fence(self) -> None:
        self.fenced = True
        with suppress(ServersFailed):  # one that cannot be reached samples for nobody
            self._post("/pause", params={"mode": "keep", "clear_cache": "true"})

    @staticmethod
    def _start(client: httpx.Client) -> None:
        """Start an update session, ending first the one that a failed push or another trainer has left open."""
        try:
            post(client, "/start_weight_update")
        except httpx.HTTPStatusError:
            # vLLM has no request that ends a session, but a chunk that cannot be read does.
            client.post("/update_weights", json={"update_info": {"path": ""}})
            post(client, "/start_weight_update")

    def _post(self, path: str, **content: Any) -> None:
        self._on_all(lambda client: post(client, path, **content))

    def _on_all(self, request: Callable[[httpx.Client], T]) -> list[T]:
        """Ask every server at the same time and wait for all; their answers, in the order of ``urls``."""
        asked = [self._threads.submit(request, client) for client in self._clients]
        errors = {url: error for url, future in zip(self.urls, asked, strict=True) if (error := future.exception())}
        for error in errors.values():
            if not isinstance(error, httpx.HTTPError):
                raise error
        if errors:
            raise ServersFailed(errors)
        return [future.result() for future in asked]


class SharedMemoryTransport(HTTPTransport):
    """Safetensors files in memory, read by the engine through this process's open file descriptors.

    The files have no name: their memory is free as soon as the push is over, or this process dead. Tensors are taken
    one bucket at a time, so that those made on the way (gathered from many processes, merged with adapters) never exist
    all at once outside of the files. Several servers read the same files at the same time.

    Args:
        urls, timeout_s, prefix_cache, probe_tolerance: as of ``HTTPTransport``.
        max_staged_gib: sampling pauses once so much is written, and what follows is read as it is made: less memory on
            the host, a longer pause. None: everything is written before sampling pauses.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        timeout_s: Positive = 60.0,
        max_staged_gib: Positive | None = None,
        prefix_cache: PrefixCache = "cleared",
        probe_tolerance: NotNegative = 0.02,
    ) -> None:
        super().__init__(urls, timeout_s, prefix_cache, probe_tolerance)
        self.max_staged_bytes = math.inf if max_staged_gib is None else max_staged_gib * 2**30

    def _send(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[float, int]:
        paused: float | None = None
        total = num_staged = 0
        with ExitStack() as staged:
            paths = []
            for bucket in in_buckets(tensors, min(BUCKET_BYTES, self.max_staged_bytes)):
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
        return paused, total

    def _load(self, paths: list[str]) -> None:
        """Have the engines read what is staged."""
        while paths:
            self._post("/update_weights", json={"update_info": {"path": paths.pop(0)}})


class ServersFailed(Exception):
    """What went wrong where: URL -> error."""

    def __init__(self, errors: Mapping[str, BaseException]) -> None:
        super().__init__("; ".join(f"{url}: {type(error).__name__}: {error}" for url, error in errors.items()))
        self.errors = errors


def post(client: httpx.Client, path: str, **content: Any) -> httpx.Response:
    response = client.post(path, **content)
    if response.is_error:
        raise httpx.HTTPStatusError(
            f"{path} answered {response.status_code}: {response.text[:500]}",
            request=response.request,
            response=response,
        )
    return response


def _served_version(client: httpx.Client) -> str:
    return str(client.get("/weight_info").raise_for_status().json()["weight_version"])


def _score_probe(client: httpx.Client) -> list[float]:
    """Log-probability of every token of ``PROBE`` but the first."""
    sampling_params = {"max_tokens": 1, "temperature": 1.0, "detokenize": False, "prompt_logprobs": 0}
    body = {"token_ids": PROBE, "sampling_params": sampling_params}
    entries = post(client, "/inference/v1/generate", json=body).json()["prompt_logprobs"][1:]
    return [float(entry[str(token)]["logprob"]) for token, entry in zip(PROBE[1:], entries, strict=True)]


def in_buckets(tensors: Iterable[tuple[str, Tensor]], num_bytes: float) -> Iterator[list[tuple[str, Tensor]]]:
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
