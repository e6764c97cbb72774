"""Servers of this machine are reached directly, also where the environment names a proxy."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from north_lightning.sampling.loopback import loopback_client


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch, url: str, name: str) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    with loopback_client(url, 5.0) as client:
        assert client.get("/weight_info").text == "/weight_info"


def test_a_client_loads_no_certificates() -> None:
    times = []
    for _ in range(5):
        started = time.thread_time()
        loopback_client("", 1.0).close()
        times.append(time.thread_time() - started)
    assert min(times) < 0.01  # with certificates 0.027 s
