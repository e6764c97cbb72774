"""A push to several servers: none samples before all have confirmed, all agree on the probe, a failing one is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from north_lightning.errors import WeightPushError
from north_lightning.faults import FakeVLLM
from north_lightning.sampling.transport import SharedMemoryTransport

TENSORS = {"one": torch.arange(4.0), "two": torch.ones(3, 2)}
order: list[tuple[int, str]] = []


class Server(FakeVLLM):
    """Writes into ``order`` who was asked for what."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        order.append((self.index, path))
        return super().answer(path, body)


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    order.clear()
    with Server(0) as one, Server(1) as two, Server(2) as three:
        yield [one, two, three]


@pytest.fixture
def transport(servers: list[Server]) -> Iterator[SharedMemoryTransport]:
    transport = SharedMemoryTransport([server.url for server in servers], timeout_s=30, max_staged_gib=2e-8)
    yield transport
    transport.close()


def test_every_server_reads_every_tensor_and_none_samples_before_all_have_the_version(
    servers: list[Server], transport: SharedMemoryTransport
) -> None:
    transport.push(TENSORS.items(), 7)
    for server in servers:
        assert server.weights == {name: tensor.numpy().tobytes() for name, tensor in TENSORS.items()}
        assert (server.version, server.is_paused) == ("7", False)
    paths = [path for _, path in order]
    last = {path: len(paths) - 1 - paths[::-1].index(path) for path in paths}
    assert last["/pause"] < paths.index("/update_weights")
    assert last["/finish_weight_update"] < paths.index("/resume")
    assert last["/resume"] < paths.index("/inference/v1/generate")
    assert paths.count("/inference/v1/generate") == 3
    assert transport.last_push is not None
    assert transport.last_push.version == 7
    assert not transport.fenced


@pytest.mark.parametrize("path", ["/pause", "/update_weights", "/finish_weight_update"])
def test_a_server_that_fails_is_named_and_all_stay_paused_until_a_push_succeeds(
    path: str, servers: list[Server], transport: SharedMemoryTransport
) -> None:
    servers[1].broken_route = path
    with pytest.raises(WeightPushError, match=f"^{servers[1].url}: version 1 was not confirmed .*{path} answered 500"):
        transport.push(TENSORS.items(), 1)
    assert transport.fenced
    assert transport.last_push is None
    assert [server.is_paused for server in servers] == [True, path != "/pause", True]
    servers[1].broken_route = ""
    transport.push(TENSORS.items(), 1)
    assert [(server.version, server.is_paused) for server in servers] == [("1", False)] * 3
    assert not transport.fenced


def test_an_engine_that_serves_another_version_than_was_pushed_is_named(
    servers: list[Server], transport: SharedMemoryTransport
) -> None:
    servers[2].answer = lambda path, body: (200, b"{}")  # type: ignore[method-assign]
    with pytest.raises(WeightPushError, match=f"{servers[2].url}: pushed version 1, but the engine serves 0"):
        transport.push(TENSORS.items(), 1)
    assert transport.fenced


def test_a_server_whose_log_probabilities_differ_is_named_and_all_are_paused_again(
    servers: list[Server], transport: SharedMemoryTransport
) -> None:
    servers[1].logprob_offset = 0.05
    with pytest.raises(WeightPushError, match=f"^{servers[1].url}: version 1 .* 0.05 from those of {servers[0].url}"):
        transport.push(TENSORS.items(), 1)
    assert transport.fenced
    assert transport.last_push is None
    assert all(server.is_paused for server in servers)
    servers[1].logprob_offset = 0.01
    transport.push(TENSORS.items(), 1)
    assert not transport.fenced


def test_a_server_that_cannot_be_probed_is_named_and_all_are_paused_again(
    servers: list[Server], transport: SharedMemoryTransport
) -> None:
    servers[2].broken_route = "/inference/v1/generate"
    with pytest.raises(WeightPushError, match=f"version 1 could not be probed: {servers[2].url}"):
        transport.push(TENSORS.items(), 1)
    assert transport.fenced
    assert all(server.is_paused for server in servers)
