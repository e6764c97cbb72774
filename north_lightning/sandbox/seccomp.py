"""The system-call filter of sandboxed programs: a classic BPF program that narrows the kernel's attack surface.

Refused with EPERM: key rings, io_uring, bpf, userfaultfd, perf events, ptrace (debuggers do not work), and every call
of another architecture's table. Everything else is left to the namespaces.
"""

from __future__ import annotations

import errno
import platform
import struct

_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_X32_CALLS = 0x40000000
_ANYWHERE = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}

# Machine -> (audit number, call numbers), from the kernel's uapi headers.
_TABLES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "ptrace": 101,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "perf_event_open": 298,
            "bpf": 321,
            "userfaultfd": 323,
            **_ANYWHERE,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "ptrace": 117,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "perf_event_open": 241,
            "bpf": 280,
            "userfaultfd": 282,
            **_ANYWHERE,
        },
    ),
}


def seccomp_filter(machine: str | None = None) -> bytes | None:
    """``struct sock_filter[]`` for ``machine`` (this one by default); None for one without a table."""
    table = _TABLES.get(machine or platform.machine())
    if table is None:
        return None
    architecture, calls = table
    refused = sorted(calls.values())
    num_checks = len(refused) + 1
    program = [
        (_LOAD_WORD, 0, 0, 4),  # seccomp_data.arch
        (_JUMP_EQUAL, 0, num_checks + 2, architecture),
        (_LOAD_WORD, 0, 0, 0),  # seccomp_data.nr
        (_JUMP_AT_LEAST, num_checks, 0, _X32_CALLS),
    ]
    for position, call in enumerate(refused):
        program.append((_JUMP_EQUAL, len(refused) - position, 0, call))
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
