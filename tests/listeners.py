"""Who listens where, by the kernel's socket tables: the sockets of a process and of all it has started."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import sys
from pathlib import Path

import psutil

TCP_LISTEN, UDP_UNCONNECTED = "0A", "07"
TABLES = {"tcp": TCP_LISTEN, "tcp6": TCP_LISTEN, "udp": UDP_UNCONNECTED, "udp6": UDP_UNCONNECTED}


def listeners_of_tree(pid: int) -> set[tuple[str, str, int]]:
    """(table, address, port) of every socket of ``pid`` and its descendants that takes what anybody sends to it."""
    found = set()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(OSError):  # it has ended meanwhile, or belongs to another user
            inodes = _socket_inodes(process.pid)
            for table, state in TABLES.items():
                for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == state and fields[9] in inodes:
                        address, port = fields[1].split(":")
                        found.add((table, _address(address), int(port, 16)))
    return found


def beyond_loopback(listeners: set[tuple[str, str, int]]) -> set[tuple[str, str, int]]:
    """Those that another machine could reach."""
    return {found for found in listeners if not _is_loopback(found[1])}


def _is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    for descriptor in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor.path))
            inodes |= {match[1]} if match else set()
    return inodes


def _address(hexadecimal: str) -> str:
    """The kernel prints words of four bytes in this machine's byte order."""
    words = [bytes.fromhex(hexadecimal[i : i + 8]) for i in range(0, len(hexadecimal), 8)]
    return str(ipaddress.ip_address(b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)))
