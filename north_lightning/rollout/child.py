"""The rollout process: runs groups with asyncio, away from the trainer's interpreter.

In: (dispatch number, group id, task id) over a pipe. Out: groups, failures, and a sign of life every second. It ends
when the pipe closes, on SIGTERM, and when its parent dies, closing its sandboxes first; ten seconds later it is
killed.

It knows nothing of the queue, and imports neither torch nor lightning.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing.connection
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from north_lightning.errors import InfrastructureError, NorthError, PromptTooLongError, SandboxUnavailableError
from north_lightning.rollout.journal import Journal, Move
from north_lightning.rollout.runner import RolloutRunner
from north_lightning.sandbox.cpu_waits import slowdown
from north_lightning.signals import end_in_order, end_with_parent
from north_lightning.types import RolloutGroup, Task

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
EXIT_GRACE_S = 10.0
HEAVY_MODULES = ("torch", "lightning", "transformers", "vllm")


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What the process needs; pickled, so everything in it must be importable by name."""

    make_runner: Callable[[], RolloutRunner]
    tasks: Sequence[Task]
    group_size: int
    seed: int


# ---- messages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dispatch:
    """To the child: work on this group. Numbers are never reused, so a late answer can be told from a current one."""

    number: int
    group_id: int
    task_id: str


@dataclass(frozen=True, slots=True)
class CancelAll:
    """To the child: forget every dispatch; nothing about them will be answered."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """To the child: forget this dispatch; nothing about it will be answered."""

    number: int


@dataclass(frozen=True, slots=True)
class Ready:
    heavy_modules: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Alive:
    """The event loop turns.

    Args:
        at_s: Of the monotonic clock.
        moves: What the attempts have been busy with since the last message.
        retried: Error class -> attempts begun anew since then.
    """

    at_s: float
    moves: list[Move]
    retried: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Finished:
    number: int
    group: RolloutGroup


@dataclass(frozen=True, slots=True)
class Failed:
    """One group failed; others may not."""

    number: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Fatal:
    """A mistake that no retry mends (configuration, a bug in a plug-in): the run must stop."""

    error: Exception


# ---- process -------------------------------------------------------------------------------------------------------


def begin_child(parent_pid: int, name: str) -> None:
    """First of all in a process that makes attempts; ``name`` begins the lines that it logs."""
    end_with_parent()
    if os.getppid() != parent_pid:
        sys.exit(1)
    # Leads a process group of its own: a Ctrl-C in the trainer's terminal does not reach the sandboxes, and the trainer
    # can kill what a dead process leaves behind.
    os.setsid()
    # A handler instead of SIG_IGN: ignored signals are inherited by every program started in a sandbox, where Ctrl-C
    # must work. The trainer alone decides what Ctrl-C means for the run.
    end_in_order()  # until there is an event loop
    signal.signal(signal.SIGINT, lambda *_: None)
    logging.basicConfig(format=f"[{name}] %(levelname)s %(name)s: %(message)s")


def end_child(process: SpawnProcess, patience_s: float) -> int | None:
    """Let a process that makes attempts end by itself for a while, then kill it, with all that it has started; its
    exit code."""
    multiprocessing.connection.wait([process.sentinel], patience_s)
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
    process.kill()
    process.join()
    exit_code = process.exitcode
    process.close()
    return exit_code


def run_child(connection: Connection, pickled_spec: bytes, parent_pid: int) -> None:
    """Entry point of the process."""
    begin_child(parent_pid, "rollouts")
    try:
        spec: ChildSpec = pickle.loads(pickled_spec)  # from our own parent
        runner = spec.make_runner()
    except Exception as error:
        connection.send(Fatal(portable(error)))
        return
    asyncio.run(_Worker(connection, spec, runner).run())


class _Worker:
    def __init__(self, connection: Connection, spec: ChildSpec, runner: RolloutRunner) -> None:
        self._connection = connection
        self._runner = runner
        self._group_size = spec.group_size
        self._seed = spec.seed
        self._tasks = {task.id: task for task in spec.tasks}
        self._jobs: dict[int, asyncio.Task[None]] = {}  # by number of the dispatch
        self._journal = Journal()
        self._stopping = asyncio.Event()
        self._sender = ThreadPoolExecutor(1, "send")  # a large group must not hold the event loop

    async def run(self) -> None:
        loop = asyncio.get_running_loop()

        def terminate(*_: object) -> None:
            signal.alarm(round(exit_grace_s()))
            with contextlib.suppress(RuntimeError):  # the loop is closed: it is ending already
                loop.call_soon_threadsafe(self._stopping.set)

        signal.signal(signal.SIGTERM, terminate)
        loop.add_reader(self._connection.fileno(), self._receive)
        await self._send(Ready(tuple(name for name in HEAVY_MODULES if name in sys.modules)))
        beating = asyncio.create_task(self._beat())
        await self._stopping.wait()
        signal.alarm(round(exit_grace_s()))
        loop.remove_reader(self._connection.fileno())
        beating.cancel()
        for job in self._jobs.values():
            job.cancel()
        await asyncio.gather(beating, *self._jobs.values(), return_exceptions=True)
        await self._runner.close()
        self._sender.shutdown(wait=False, cancel_futures=True)

    def _receive(self) -> None:
        try:
            while self._connection.poll():
                self._handle(self._connection.recv())
        except (EOFError, OSError):
            self._stopping.set()

    def _handle(self, message: Dispatch | Cancel | CancelAll) -> None:
        if isinstance(message, Dispatch):
            job = asyncio.create_task(self._work(message))
            self._jobs[message.number] = job
            job.add_done_callback(lambda _: self._jobs.pop(message.number))
            return
        numbers = [message.number] if isinstance(message, Cancel) else list(self._jobs)
        for number in numbers:
            if number in self._jobs:
                self._jobs[number].cancel()

    async def _work(self, dispatch: Dispatch) -> None:
        answer: Finished | Failed | Fatal
        try:
            task = self._tasks[dispatch.task_id]
            with self._journal.of_dispatch(dispatch.number):
                group = await self._runner.run_group(task, dispatch.group_id, self._group_size, self._seed)
            answer = Finished(dispatch.number, group)
        except SandboxUnavailableError as error:
            answer = Fatal(portable(error))
        except (InfrastructureError, PromptTooLongError) as error:
            answer = Failed(dispatch.number, portable(error))
        except Exception as error:
            answer = Fatal(portable(error))
        await self._tell_moves()  # those of this dispatch come before its end
        await self._send(answer)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._tell_moves()

    async def _tell_moves(self) -> None:
        retried = dict(self._runner.retried)
        self._runner.retried.clear()
        await self._send(Alive(self._journal.clock(), self._journal.take(), retried))

    async def _send(self, message: object) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._sender, self._send_now, message)
        except OSError:
            self._stopping.set()

    def _send_now(self, message: object) -> None:
        try:
            data = pickle.dumps(message)
        except Exception as error:
            assert isinstance(message, Finished), message
            unsendable = InfrastructureError(f"group {message.group.group_id} cannot be pickled: {error}")
            data = pickle.dumps(Failed(message.number, unsendable))
        self._connection.send_bytes(data)


def exit_grace_s() -> float:
    """Seconds in which the process puts its sandboxes away before it is killed; they grow with the load."""
    return EXIT_GRACE_S * slowdown()


def portable(error: Exception) -> Exception:
    """The error, or one of the same meaning that survives pickling, with this process's traceback as a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        kind = InfrastructureError if isinstance(error, InfrastructureError) else NorthError
        copy = kind(f"{type(error).__name__}: {error}")
    copy.add_note(f"In the rollout process:\n{trace}")
    assert isinstance(copy, Exception)
    return copy
