"""How a process ended, and whether the kernel may have killed it for want of memory.

A process that is killed so dies of SIGKILL like any other: only the kernel's own count tells. It counts the whole
machine, sandboxes included, whose programs the kernel takes first; so the cause is named as likely, not as proved.
"""

from __future__ import annotations

import signal
from pathlib import Path

VMSTAT = Path("/proc/vmstat")


def num_memory_kills() -> int:
    """Processes killed for want of memory on this machine since it was started; 0 where the kernel does not say."""
    try:
        counts = dict(line.split() for line in VMSTAT.read_text().splitlines())
    except OSError:
        return 0
    return int(counts.get("oom_kill", 0))


def how_it_ended(exit_code: int, num_kills_before: int) -> str:
    """For an error's message: the exit code or signal of a process at whose start ``num_memory_kills`` was so many."""
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    killed = f"was killed by {signal.Signals(-exit_code).name}"
    meanwhile = num_memory_kills() - num_kills_before
    if exit_code != -signal.SIGKILL or meanwhile < 1:
        return killed
    return f"{killed}, likely for want of memory (the kernel has killed {meanwhile} processes for it meanwhile)"
