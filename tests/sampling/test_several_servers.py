"""A push to several servers: none samples before all have confirmed, all agree on the probe, a failing one is named."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors import safe_open

from north_lightning.errors import WeightPushError
from north_lightning.sampling.transport import SharedMemoryTransport

TENSORS = {"one": torch.arange(4.0), "two": torch.ones(3, 2)}
order: list[tuple[int, str]] = []


class FakeServer:
    """Reads what it is told to, and fails where it is told to: ``broken_at`` a path, or ``offset`` in its scores."""

    def __init__(self, index: int) -> None:
        self.broken_at, self.offset = "", 0.0
        self.version, self.is_paused, self.seen = "0", False, {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply({"weight_version": server.version})

            def do_POST(self) -> None:
                path = self.path.split("?")[0]
                size = int(self.headers.get("Content-Length") or 0)
                order.append((index, path))
                self.reply(server.answer(path, json.loads(self.rfile.read(size) or b"{}")), server.broken_at == path)

            def reply(self, body: dict, is_broken: bool = False) -> None:
                data = json.dumps(body).encode()
                self.send_response(500 if is_broken else 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str, body: dict) -> dict:
        if path == "/pause":
            self.is_paused = True
        elif path == self.broken_at:
            return {}
        elif path == "/resume":
            self.is_paused = False
        elif path == "/update_weights":
            with safe_open(body["update_info"]["path"], "pt") as file:
                self.seen |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        elif path == "/finish_weight_update":
            self.version = body["weight_version"]
        elif path == "/inference/v1/generate":
            scores = [{str(token): {"logprob": -1.0 * token - self.offset}} for token in body["token_ids"]]
            return {"prompt_logprobs": [None, *scores[1:]]}
        return {}


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    order.clear()
    started = [FakeServer(index) for index in range(3)]
    yield started
    for server in started:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture
def transport(servers: list[FakeServer]) -> Iterator[SharedMemoryTransport]:
    transport = SharedMemoryTransport([server.url for server in servers], timeout_s=30, max_staged_gib=2e-8)
    yield transport
    transport.close()


def test_every_server_reads_every_tensor_and_none_samples_before_all_have_the_version(
    servers: list[FakeServer], transport: SharedMemoryTransport
) -> None:
    transport.push(TENSORS.items(), 7)
    for server in servers:
        assert server.seen.keys() == TENSORS.keys()
        assert all(torch.equal(server.seen[name], tensor) for name, tensor in TENSORS.items())
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
    path: str, servers: list[FakeServer], transport: SharedMemoryTransport
) -> None:
    servers[1].broken_at = path
    with pytest.raises(WeightPushError, match=f"^{servers[1].url}: version 1 was not confirmed .*{path} answered 500"):
        transport.push(TENSORS.items(), 1)
    assert transport.fenced
    assert transport.last_push is None
    assert [server.is_paused for server in servers] == [True] * 3
    servers[1].broken_at = ""
    transport.push(TENSORS.items(), 1)
    assert [(server.version, server.is_paused) for server in servers] == [("1", False)] * 3
    assert not transport.fenced


def test_an_engine_that_serves_another_version_than_was_pushed_is_named(
    servers: list[FakeServer], transport: SharedMemoryTransport
) -> None:
    servers[2].answer = lambda path, body: {}  # type: ignore[method-assign]
    with pytest.raises(WeightPushError, match=f"{servers[2].url}: pushed version 1, but the engine serves 0"):
        transport.push(TENSORS.items(), 1)
    assert transport.fenced


def test_a_server_whose_log_probabilities_differ_is_named_and_all_are_paused_again(
    servers: list[FakeServer], transport: SharedMemoryTransport
) -> None:
    servers[1].offset = 0.05
    with pytest.raises(WeightPushError, match=f"^{servers[1].url}: version 1 .* 0.05 from those of {servers[0].url}"):
        transport.push(TENSORS.items(), 1)
    assert transport.fenced
    assert transport.last_push is None
    assert all(server.is_paused for server in servers)
    servers[1].offset = 0.01
    transport.push(TENSORS.items(), 1)
    assert not transport.fenced


def test_a_server_that_cannot_be_probed_is_named_and_all_are_paused_again(
    servers: list[FakeServer], transport: SharedMemoryTransport
) -> None:
    servers[2].broken_at = "/inference/v1/generate"
    with pytest.raises(WeightPushError, match=f"version 1 could not be probed: {servers[2].url}"):
        transport.push(TENSORS.items(), 1)
    assert transport.fenced
    assert all(server.is_paused for server in servers)
