"""What a push asks of a server, without a server: the requests as they leave."""

import httpx
import pytest

from north_lightning.sampling.transport import HTTPTransport


class NoTensors(HTTPTransport):
    """A push of nothing, and the requests it consists of."""

    def __init__(self, **settings) -> None:
        super().__init__("http://server", **settings)
        self.requests: list[httpx.Request] = []
        self._clients = [httpx.Client(base_url="http://server", transport=httpx.MockTransport(self.answer))]

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(200, json={"weight_version": "4"})

    def _send(self, tensors):
        return self._pause(), 0


@pytest.mark.parametrize(("prefix_cache", "clears"), [("cleared", "true"), ("kept", "false"), ("salted", "false")])
def test_a_push_clears_the_prefixes_only_where_it_says_so(prefix_cache, clears):
    transport = NoTensors(prefix_cache=prefix_cache)
    transport.push([], version=4)
    asked = [(request.url.path, dict(request.url.params)) for request in transport.requests if request.method == "POST"]
    assert asked[0] == ("/pause", {"mode": "keep", "clear_cache": clears})
    assert [path for path, _ in asked[1:]] == ["/start_weight_update", "/finish_weight_update", "/resume"]
    assert not transport.fenced
    transport.close()
