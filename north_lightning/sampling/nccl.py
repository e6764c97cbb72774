"""Weights to vLLM servers on GPUs, on this and other machines, over vLLM's own NCCL engine.

    trainer: join once ─► pause (keep) ─► start ─► for each bucket: announce ║ broadcast ─► finish(version) ─► ...
    engines: join as ranks 1..N                              load what comes                as over shared memory

Here only the messages and the order of things are ours: rendezvous, packing and both ends of the broadcast are vLLM's
(``vllm.distributed.weight_transfer``), which must be installed beside the trainer.

It never ran on a GPU. The tests exchange messages with vLLM's own classes, and its packing and loading code, with gloo
in the place of NCCL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import httpx

from north_lightning.errors import ConfigError, WeightPushError
from north_lightning.sampling.sidecar import free_port, is_loopback
from north_lightning.sampling.transport import BUCKET_BYTES, HTTPTransport, PrefixCache, ServersFailed, in_buckets, post
from north_lightning.types import Count, NotNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor


class NCCLTransport(HTTPTransport):
    """Broadcasts from the trainer's process 0 to all workers of all servers, a bucket of tensors at a time.

    The servers run with ``Sidecar.weight_transfer: nccl``. Sampling stands still from the first bucket to the last,
    the trainer's gathering included; no process holds more than a bucket of what is gathered. A broadcast that does not
    end in time leaves engines inside NCCL: they are started again before the next push can succeed.

    vLLM's engine loads what comes and does not say which weights did not; the probe compares servers with each other.

    Args:
        urls, timeout_s, prefix_cache, probe_tolerance: as of ``HTTPTransport``.
        master_address: of this machine, as the servers reach it. NCCL asks nobody who they are.
        master_port: where they meet; by default a free one.
        trusted_network: say that nobody else reaches ``master_address``; needed where it is not loopback.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        timeout_s: Positive = 300.0,
        prefix_cache: PrefixCache = "cleared",
        probe_tolerance: NotNegative = 0.02,
        master_address: str = "127.0.0.1",
        master_port: Count | None = None,
        trusted_network: bool = False,
    ) -> None:
        if not (is_loopback(master_address) or trusted_network):
            raise ConfigError(
                f"master_address: expected loopback, got {master_address}: whoever reaches it can take the place of a "
                "server; set trusted_network: true where nobody else does"
            )
        super().__init__(urls, timeout_s, prefix_cache, probe_tolerance)
        self.master_address = master_address
        self.master_port = master_port
        self._group: Any = None  # vLLM's communicator, this process as rank 0
        self._sender = ThreadPoolExecutor(1, "weight-broadcast")

    def close(self) -> None:
        self._sender.shutdown(wait=False)
        super().close()

    def _send(self, tensors: Iterable[tuple[str, Tensor]]) -> tuple[float, int]:
        paused, total = None, 0
        for bucket in in_buckets(tensors, BUCKET_BYTES):
            if paused is None:
                self._group = self._group or self._join()
                paused = self._pause()
            self._broadcast(bucket)
            total += sum(tensor.nbytes for _, tensor in bucket)
        if paused is None:
            raise WeightPushError("expected tensors to push, got none")
        return paused, total

    def _join(self) -> Any:
        """A communicator with every worker of every server."""
        from vllm.distributed.weight_transfer.nccl_common import (
            NCCLWeightTransferInitInfo,
            trainer_init,
            worker_init_payload,
        )

        sizes = self._on_all(_num_workers)
        world_size = 1 + sum(sizes)
        port = self.master_port or free_port()
        asked = []
        for index, client in enumerate(self._clients):
            worker = NCCLWeightTransferInitInfo(
                master_address=self.master_address,
                master_port=port,
                rank_offset=1 + sum(sizes[:index]),
                world_size=world_size,
                packed=True,
            )
            body = {"init_info": worker_init_payload(worker)}
            asked.append(self._threads.submit(post, client, "/init_weight_transfer_engine", json=body))
        place = {"master_address": self.master_address, "master_port": port, "world_size": world_size}
        joining = self._sender.submit(_on_device, _current_device(), trainer_init, place)
        self._all_done(joining, asked, "join the servers")
        return joining.result()

    def _broadcast(self, bucket: list[tuple[str, Tensor]]) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
        from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

        announced = NCCLWeightTransferUpdateInfo(
            names=[name for name, _ in bucket],
            dtype_names=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            shapes=[list(tensor.shape) for _, tensor in bucket],
        )
        body = {"update_info": asdict(announced)}
        asked = [self._threads.submit(post, client, "/update_weights", json=body) for client in self._clients]
        device = _current_device()

        def send() -> None:
            packed_nccl_broadcast_producer(
                iterator=iter(bucket),
                group=self._group,
                src=0,
                post_iter_func=lambda item: item[1].detach().to(device).contiguous(),
            )

        self._all_done(self._sender.submit(_on_device, device, send), asked, "broadcast")

    def _all_done(self, own: Future[Any], asked: Sequence[Future[httpx.Response]], what: str) -> None:
        """Wait for this end and the servers'. A failure of one leaves the others waiting: the group is given up."""
        done, _ = wait([own, *asked], self.timeout_s, FIRST_EXCEPTION)
        failed = {
            url: error
            for url, future in zip(self.urls, asked, strict=True)
            if future in done and (error := future.exception()) is not None
        }
        if len(done) == 1 + len(asked) and not failed and own.exception() is None:
            return
        self._group = None
        self._sender.shutdown(wait=False)  # its thread may never come back
        self._sender = ThreadPoolExecutor(1, "weight-broadcast")
        if failed:
            raise ServersFailed(failed)
        if own in done and own.exception() is not None:
            raise WeightPushError(f"cannot {what}: {own.exception()}; the sampler stays paused") from own.exception()
        raise WeightPushError(
            f"could not {what} within {self.timeout_s:g} s; the sampler stays paused, and servers that still wait for "
            "the rest must be started again"
        )


def _on_device(device: Any, call: Any, *arguments: Any) -> Any:
    """Each thread has a current device of its own."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)
    return call(*arguments)


def _current_device() -> Any:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _num_workers(client: httpx.Client) -> int:
    return int(client.get("/get_world_size").raise_for_status().json()["world_size"])
