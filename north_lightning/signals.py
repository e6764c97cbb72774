"""What Ctrl-C, SIGTERM and SIGUSR1 mean at every moment of a command.

    while it imports and parses   it ends at once: nothing is to be put away yet
    while it works                ``Ended`` is raised in the main thread: every ``with`` and ``finally`` puts away
    while a run trains            the step is ended and saved (``callbacks.SaveOnTermination``)
    when it is over               nothing: the process is about to end

The exit code is 130 after Ctrl-C, 143 after SIGTERM and SIGUSR1, which SLURM sends before it ends a job.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PUTTING_AWAY_S = 10.0
"""Further signals within this time change nothing, but for a second Ctrl-C."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Ended(SystemExit):
    """A signal asks the command to end."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        self.exit_code = exit_code(number)
        super().__init__(self.exit_code)


def exit_code(number: int) -> int:
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def end_at_once() -> None:
    """From now on a signal ends the process as it is."""
    _install(_exit)


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(exit_code(number))


def _ignore(number: int, frame: FrameType | None) -> None:
    """The command is over; what is registered to be put away at exit is."""


def end_in_order() -> None:
    """From now on a signal raises ``Ended``."""
    owner, since = os.getpid(), -PUTTING_AWAY_S

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if frame is None:  # no signal: Lightning's handler, which calls those before it, is called by our own
            return
        if os.getpid() != owner:  # a forked helper
            os._exit(exit_code(number))
        before, since = since, time.monotonic()
        if number == signal.SIGINT or since >= before + PUTTING_AWAY_S:
            raise Ended(number)

    _install(end)


@contextmanager
def as_before() -> Iterator[None]:
    """Afterwards signals mean what they mean now; where that is the process's end, they are ignored until it ends."""
    handlers = {number: signal.getsignal(number) for number in NUMBERS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, _ignore if handler is _exit else handler)


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, however it dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def requeue_slurm_job() -> None:
    """Have SLURM start this job again, with the same command, if it runs under SLURM."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not re.fullmatch(r"[0-9_]+", job):
        return
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"the SLURM job {job} could not be requeued: {error}", file=sys.stderr)


def _install(handler: Callable[[int, FrameType | None], None]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number in NUMBERS:
            signal.signal(number, handler)
