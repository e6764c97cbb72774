"""The system-call filter of sandboxed programs, which narrows the kernel's attack surface: for bubblewrap a classic BPF
program, for container engines a profile.

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
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
        ],
    }
