"""How much a silent process works, or would if it had a CPU: a busy machine is not a fault.

In: process ids. Out: seconds that threads ran, and that they were ready to run while others ran, as the kernel counts
them (``/proc/PID/task/TID/schedstat``). A process that is stopped or deadlocked has neither.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

WORKS_FROM = 0.3
"""Share of the time that a silent process must run, or wait for a CPU, to be taken for a busy one. Threads that only
wake now and then wait for some of it on a busy machine."""
MAX_SILENT_WORK_S = 300.0
"""CPU time that it may use before it is taken for one that turns in circles."""


class Work(NamedTuple):
    ran_s: float
    waited_s: float  # for a CPU


def slowdown() -> float:
    """By what factor a time limit of an idle machine has to be longer here, at least 1: the load of each CPU."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


class WorkMeter:
    """Measures the work of processes from when it is made, or last asked."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._before, self._at = _threads(self._pids), time.monotonic()

    def measure(self) -> tuple[float, Work]:
        """Seconds since the last time, and the work of the busiest thread in them."""
        before, at = self._before, self._at
        self._before, self._at = _threads(self._pids), time.monotonic()
        works = [
            Work(*(now - then for now, then in zip(work, before.get(thread, Work(0.0, 0.0)), strict=True)))
            for thread, work in self._before.items()
        ]
        return self._at - at, max(works, key=sum, default=Work(0.0, 0.0))


def _threads(pids: Iterable[int]) -> dict[int, Work]:
    """Work of every thread since it started; none of a process that is gone."""
    works = {}
    for path in (path for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/schedstat")):
        with contextlib.suppress(OSError):
            ran_ns, waited_ns, _ = path.read_text().split()
            works[int(path.parent.name)] = Work(int(ran_ns) / 1e9, int(waited_ns) / 1e9)
    return works
