"""The NCCL push against vLLM's own engine, packing and messages. There is no GPU here: a queue in this process stands
where NCCL would, and CUDA's streams do nothing."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from north_lightning.errors import ConfigError, WeightPushError
from north_lightning.faults import FakeVLLM
from north_lightning.sampling import nccl
from north_lightning.sampling.nccl import NCCLTransport
from north_lightning.sampling.sidecar import Sidecar

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
from vllm.distributed.weight_transfer import nccl_common, nccl_engine, packed_tensor  # noqa: E402

pytestmark = pytest.mark.slow

TENSORS = {
    "one": torch.arange(24.0).reshape(4, 6),
    "two": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "three": torch.arange(30.0).reshape(5, 6).t(),  # not contiguous
    "four": torch.ones((), dtype=torch.float16),
}


class Wire:
    """Broadcasts of one group: what rank 0 sends, every other rank gets."""

    def __init__(self) -> None:
        self.queues: dict[int, queue.Queue[torch.Tensor]] = defaultdict(queue.Queue)


class End:
    def __init__(self, wire: Wire, rank: int, world_size: int) -> None:
        self.wire, self.rank, self.world_size = wire, rank, world_size

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        if self.rank:
            tensor.copy_(self.wire.queues[self.rank].get(timeout=20))
        else:
            for rank in range(1, self.world_size):
                self.wire.queues[rank].put(tensor.clone())


class Model:
    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, named: Any) -> None:
        self.loaded.update((name, tensor.clone()) for name, tensor in named)


class Server(FakeVLLM):
    """Has vLLM's engine receive and load."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: list[Any] = []
        self.breaks_at: int | None = None  # which bucket
        self.num_buckets = 0
        self.engine = nccl_engine.NCCLWeightTransferEngine.__new__(nccl_engine.NCCLWeightTransferEngine)
        self.engine.device, self.engine.model, self.engine.parallel_config = torch.device("cpu"), Model(), self

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        if path == "/init_weight_transfer_engine":
            info = nccl_common.NCCLWeightTransferInitInfo(**body["init_info"])
            self.joined.append(info)
            self.engine.init_transfer_engine(info)
        elif path == "/update_weights" and path != self.broken_route:
            self.num_buckets += 1
            if self.num_buckets == self.breaks_at:
                return 500, b"out of memory"
            try:
                info = nccl_engine.NCCLWeightTransferUpdateInfo(**body["update_info"])
            except TypeError as error:  # vLLM's worker ends the session after any error in a chunk
                self._session = None
                return 500, str(error).encode()
            self.engine.receive_weights(info)
        else:
            return super().answer(path, body)
        self.routes.append(path)
        return 200, b"{}"


@pytest.fixture
def joined(monkeypatch):
    """Whoever opened the trainer's end, time after time."""
    wires: dict[int, Wire] = defaultdict(Wire)  # by the port where they meet
    joined: list[Any] = []

    def trainer_init(place):
        joined.append(place)
        return End(wires[place["master_port"]], 0, place["world_size"])

    def worker_init(info, _):
        return End(wires[info.master_port], info.rank_offset, info.world_size)

    monkeypatch.setattr(nccl_common, "trainer_init", trainer_init)
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", worker_init)
    stream = type("Stream", (), {"synchronize": lambda self: None})
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, number: tuple(stream() for _ in range(number)))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    return joined


@pytest.fixture
def servers(joined):
    with Server() as one, Server() as two:
        yield [one, two]


@pytest.fixture
def transport(servers, monkeypatch):
    monkeypatch.setattr(nccl, "BUCKET_BYTES", 160)
    transport = NCCLTransport([server.url for server in servers], timeout_s=30)
    yield transport
    transport.close()


def test_every_engine_loads_every_tensor_bit_for_bit_in_several_buckets(joined, servers, transport):
    for version in (1, 2):
        tensors = {name: tensor + version for name, tensor in TENSORS.items()}
        transport.push(tensors.items(), version)
        for server in servers:
            assert server.engine.model.loaded.keys() == tensors.keys()
            assert all(
                torch.equal(server.engine.model.loaded[name].view(tensor.dtype), tensor)
                for name, tensor in tensors.items()
            )
            assert (server.version, server.is_paused) == (str(version), False)
    assert servers[0].num_buckets == 2 * 2
    assert transport.last_push.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_servers_and_trainer_meet_once_as_ranks_of_one_group(joined, servers, transport):
    for version in (1, 2):
        transport.push(TENSORS.items(), version)
    (trainer,) = joined
    assert trainer["world_size"] == 3
    infos = [info for server in servers for info in server.joined]
    assert [info.rank_offset for info in infos] == [1, 2]
    assert {(info.world_size, info.master_address, info.master_port, info.packed) for info in infos} == {
        (3, "127.0.0.1", trainer["master_port"], True)
    }
    paths = servers[0].routes
    assert paths.index("/init_weight_transfer_engine") < paths.index("/pause") < paths.index("/start_weight_update")
    assert paths.index("/start_weight_update") < paths.index("/update_weights") < paths.index("/finish_weight_update")


def test_a_server_that_fails_in_the_middle_is_named_and_the_group_is_made_anew(joined, servers, transport):
    servers[1].breaks_at = 2
    with pytest.raises(WeightPushError, match=f"^{servers[1].url}: version 1 was not confirmed .*out of memory"):
        transport.push(TENSORS.items(), 1)
    assert transport.fenced
    assert all(server.is_paused for server in servers)
    transport.push(TENSORS.items(), 1)
    assert len(joined) == 2
    assert not transport.fenced
    assert [server.version for server in servers] == ["1", "1"]


def test_a_broadcast_that_does_not_end_is_an_error_in_time(joined, servers, transport, monkeypatch):
    transport.push(TENSORS.items(), 1)
    transport.timeout_s = 0.5
    never = threading.Event()
    monkeypatch.setattr(End, "broadcast", lambda *_, **__: never.wait(20))
    with pytest.raises(WeightPushError, match=r"could not broadcast within 0.5 s; the sampler stays paused"):
        transport.push(TENSORS.items(), 2)
    never.set()
    assert transport.fenced
    assert [server.version for server in servers] == ["1", "1"]


def test_beyond_loopback_the_network_must_be_said_to_be_trusted():
    with pytest.raises(ConfigError, match=r"master_address: expected loopback, got 10\.0\.0\.1: .*trusted_network"):
        NCCLTransport("http://127.0.0.1:1", master_address="10.0.0.1")
    NCCLTransport("http://127.0.0.1:1", master_address="10.0.0.1", trusted_network=True).close()


def test_a_sidecar_is_told_how_weights_come(tmp_path):
    command = Sidecar(tmp_path, tmp_path / "log", weight_transfer="nccl")._command
    with pytest.raises(ConfigError, match="weight_transfer: expected one of shared_memory, nccl, got 'ipc'"):
        Sidecar(tmp_path, tmp_path / "log", weight_transfer="ipc")
    assert '{"backend": "nccl"}' in command()
