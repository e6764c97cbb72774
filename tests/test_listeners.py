"""The instrument that counts listeners finds those it should; the RL test uses it."""

import os
import socket

import pytest
from listeners import beyond_loopback, listeners_of_tree


@pytest.mark.parametrize(
    ("family", "kind", "address", "is_beyond"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, "127.0.0.1", False),
        (socket.AF_INET, socket.SOCK_STREAM, "0.0.0.0", True),
        (socket.AF_INET6, socket.SOCK_STREAM, "::", True),
        (socket.AF_INET6, socket.SOCK_STREAM, "::1", False),
        (socket.AF_INET, socket.SOCK_DGRAM, "0.0.0.0", True),
    ],
)
def test_a_listener_is_found_and_its_address_told(family: int, kind: int, address: str, is_beyond: bool) -> None:
    with socket.socket(family, kind) as listener:
        try:
            listener.bind((address, 0))
        except OSError:
            pytest.skip(f"no {address} here")
        if kind == socket.SOCK_STREAM:
            listener.listen()
        port = listener.getsockname()[1]
        found = listeners_of_tree(os.getpid())
        assert [one[1] for one in found if one[2] == port] == [address]
        assert (port in {one[2] for one in beyond_loopback(found)}) == is_beyond
