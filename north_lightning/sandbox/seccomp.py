"""The system-call filter of sandboxed programs, which narrows the kernel's attack surface: for bubblewrap a classic BPF
program, for container engines a profile.

Refused with EPERM: key rings, io_uring, bpf, userfaultfd, perf events, ptrace (debuggers do not work), sockets that no
network namespace holds (to the hypervisor) or that reach into the kernel's ciphers, and every call of another
architecture's table. Everything else is left to the namespaces.
"""

from __future__ import annotations

import errno
import platform
import struct

_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_X32_CALLS = 0x40000000
_SOCKET_FAMILIES = {"AF_ALG": 38, "AF_VSOCK": 40}
_CALL, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the argument's low half
_ANYWHERE = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}

# Machine -> (audit number, the number of socket(), refused call numbers), from the kernel's uapi headers.
_TABLES: dict[str, tuple[int, int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        41,
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
        198,
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
    architecture, open_socket, calls = table
    refused, families = sorted(calls.values()), sorted(_SOCKET_FAMILIES.values())
    allow = 6 + len(refused) + len(families)  # the last instructions: allow, refuse
    program: list[tuple[int, int, int, int]] = []

    def add(code: int, value: int, if_true: int | None = None, if_false: int | None = None) -> None:
        """Jumps are to positions in the program; None is the next instruction."""
        here = len(program) + 1
        program.append((code, (if_true or here) - here, (if_false or here) - here, value))

    add(_LOAD_WORD, _ARCHITECTURE)
    add(_JUMP_EQUAL, architecture, if_false=allow + 1)
    add(_LOAD_WORD, _CALL)
    add(_JUMP_AT_LEAST, _X32_CALLS, if_true=allow + 1)
    for call in refused:
        add(_JUMP_EQUAL, call, if_true=allow + 1)
    add(_JUMP_EQUAL, open_socket, if_false=allow)
    add(_LOAD_WORD, _FIRST_ARGUMENT)
    for family in families:
        add(_JUMP_EQUAL, family, if_true=allow + 1)
    add(_RETURN, _ALLOW)
    add(_RETURN, _REFUSE)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


# What Docker's documentation lists as refused by its default profile, and what the kernel has got since then. Without
# capabilities most of it would fail all the same; user namespaces would not.
_REFUSED_IN_CONTAINERS = (
    *("acct", "add_key", "bpf", "clock_adjtime", "clock_settime", "create_module", "delete_module", "finit_module"),
    *("fsconfig", "fsmount", "fsopen", "fspick", "get_kernel_syms", "get_mempolicy", "init_module", "io_uring_enter"),
    *("io_uring_register", "io_uring_setup", "ioperm", "iopl", "kcmp", "kexec_file_load", "kexec_load", "keyctl"),
    *("lookup_dcookie", "mbind", "mount", "mount_setattr", "move_mount", "move_pages", "name_to_handle_at"),
    *("nfsservctl", "open_by_handle_at", "open_tree", "perf_event_open", "personality", "pivot_root"),
    *("process_vm_readv", "process_vm_writev", "ptrace", "query_module", "quotactl", "reboot", "request_key"),
    *("set_mempolicy", "setns", "settimeofday", "stime", "swapoff", "swapon", "sysfs", "_sysctl", "umount", "umount2"),
    *("unshare", "uselib", "userfaultfd", "ustat", "vm86", "vm86old"),
)
_CLONE_NEWUSER = 0x10000000


def container_profile() -> dict[str, object]:
    """The seccomp profile of a container, as Docker and Podman read it. ``clone3`` does not exist, so that ``clone``,
    whose flags a filter can read, is used instead."""
    new_user = {"index": 0, "value": _CLONE_NEWUSER, "valueTwo": _CLONE_NEWUSER, "op": "SCMP_CMP_MASKED_EQ"}
    refuse = {"action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM}
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": list(_REFUSED_IN_CONTAINERS), **refuse},
            {"names": ["clone"], "args": [new_user], **refuse},
            *(
                {"names": ["socket"], "args": [{"index": 0, "value": family, "op": "SCMP_CMP_EQ"}], **refuse}
                for family in _SOCKET_FAMILIES.values()
            ),
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
        ],
    }
