"""How much of its time a silent process works, or would if it had a CPU: a busy machine is not a fault.

In: process ids. Out: seconds that their threads ran, and seconds that they were ready to run while others ran, as the
kernel accounts them (``/proc/PID/task/TID/schedstat``). A process that is stopped or deadlocked has neither. It ends
no process and knows no time limits.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Work(NamedTuple):
    """Of the busiest thread of a process."""

    ran_s: float
    waited_s: float
    """For a CPU."""

    @property
    def seconds(self) -> float:
        return self.ran_s + self.waited_s


def seconds_waited(pids: Iterable[int]) -> float:
    """For a CPU since the processes started. Less these, a wall-clock time is what it would be on an idle machine."""
    return sum(max((work.waited_s for work in _threads(pid).values()), default=0.0) for pid in pids)


def slowdown() -> float:
    """By what factor a time limit of an idle machine has to be longer here, at least 1: the load of each CPU."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


class WorkMeter:
    """Measures the work of processes from when it is made, or last asked."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._before = {pid: _threads(pid) for pid in pids}
        self._measured_at = time.monotonic()

    def measure(self) -> tuple[float, dict[int, Work]]:
        """Seconds since the last time, and the work of each process in them."""
        now = time.monotonic()
        after = {pid: _threads(pid) for pid in self._before}
        works = {pid: _busiest(self._before[pid], threads) for pid, threads in after.items()}
        seconds, self._before, self._measured_at = now - self._measured_at, after, now
        return seconds, works


def _busiest(before: dict[int, Work], after: dict[int, Work]) -> Work:
    none = Work(0.0, 0.0)
    works = [
        Work(work.ran_s - before.get(thread, none).ran_s, work.waited_s - before.get(thread, none).waited_s)
        for thread, work in after.items()
    ]
    return max(works, key=lambda work: work.seconds, default=none)


def _threads(pid: int) -> dict[int, Work]:
    """Of the process's threads, since each was started; empty if it is gone or the kernel keeps no such account."""
    works = {}
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                ran_ns, waited_ns, _ = (thread / "schedstat").read_text().split()
                works[int(thread.name)] = Work(int(ran_ns) / 1e9, int(waited_ns) / 1e9)
    return works
