"""Runs that are struck by signals at any moment of their lives, and started again by the same command until they end.

In: the config of a run with ``resume: auto``, and how often to strike. Out: what struck when, and a run's folder, to be
compared with that of a run that nobody struck. Anything that is not as it must be raises: an exit code that is not
documented, a process, a mount, a file in the temporary directory or in /dev/shm that outlives its run.

A life is ``python -m north_lightning``: a new process, or a fork of this one, which has imported everything; what takes
seconds is then over, and most moments that are left are a run's own.
"""

from __future__ import annotations

import atexit
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from scripted_vllm import ScriptedSidecar

from north_lightning.run_folders import FINISHED, LOCK
from north_lightning.sampling.transport import SharedMemoryTransport
from north_lightning.signals import end_at_once

MARK = "NORTH_LIGHTNING_STRUCK_RUNS"
"""Environment variable that everything a life starts has, and by which it is found."""
PATIENCE_S = 60.0
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130, signal.SIGKILL: 137}
FIRST = "imports, parsing"
BEFORE = "before the first line of north_lightning"
ENDING = "ending, after another signal"
SETUP, STARTING, FIRST_PUSH = (
    "tokenizing, loading the model",
    "server start, restoring",
    "training start, rollout process",
)
STEP, STEP_END, PUSH, SAVING = "step", "end of a step", "push", "checkpoint write"
WAITING, VALIDATION, RELEASE, TEARDOWN = "waiting for rollouts", "validation", "release", "teardown"
IN_SFT = (SETUP, STARTING, STEP, STEP_END, SAVING, SAVING, VALIDATION, RELEASE, TEARDOWN)
IN_RL = (SETUP, STARTING, STARTING, FIRST_PUSH, WAITING, STEP, STEP, PUSH, PUSH, SAVING, RELEASE, TEARDOWN)
IN_VLLM = (*(2 * (STARTING, TEARDOWN, PUSH, STEP)), FIRST_PUSH, WAITING, SAVING, RELEASE)
"""Moments that strikes are aimed at, in turn."""
ONCE = (SETUP, STARTING, FIRST_PUSH, RELEASE, TEARDOWN)
LAST = (RELEASE, TEARDOWN)
"""What waits for another moment strikes here."""
EARLY, AIMED, TWICE = 0.1, 0.7, 0.25
"""Shares of the strikes: while a life parses; in a chosen moment, where the others come at any time; followed by
another while the life ends."""
TENSOR_S = 0.003


class Moments(Callback):
    """Writes down what a life is doing and since when, and which groups its steps have trained.

    Args:
        folder: Where ``moments`` and ``book`` are.
    """

    folder: Path

    def __init__(self, folder: Path) -> None:
        Moments.folder = folder

    def setup(self, *_: Any, **__: Any) -> None:
        now(SETUP)

    def on_fit_start(self, *_: Any) -> None:
        now(STARTING)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        now(FIRST_PUSH)
        if hasattr(data := trainer.datamodule, "add_check"):
            data.add_check(lambda: now(WAITING))

    def on_train_batch_start(self, *_: Any) -> None:
        now(STEP)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now(STEP_END)
        if groups := getattr(batch, "groups", None):
            with (self.folder / "book").open("a") as file:
                file.write(f"{trainer.global_step} {' '.join(str(group.group_id) for group in groups)}\n")

    def on_save_checkpoint(self, *_: Any) -> None:
        now(SAVING)

    def on_validation_start(self, *_: Any) -> None:
        now(VALIDATION)

    def on_validation_end(self, *_: Any) -> None:
        now(STEP_END)

    def on_train_end(self, *_: Any) -> None:
        now(RELEASE)

    def teardown(self, *_: Any, **__: Any) -> None:
        now(TEARDOWN)


def now(moment: str) -> None:
    if moment != _moment(Moments.folder):
        with (Moments.folder / "moments").open("a") as file:
            file.write(f"{time.monotonic()} {moment}\n")


class SlowTransport(SharedMemoryTransport):
    """A push that takes long enough to be struck."""

    def push(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        before = _moment(Moments.folder)
        now(PUSH)
        super().push(self._slowed(tensors), version)
        now(before)

    def _slowed(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for named in tensors:
            time.sleep(TENSOR_S)
            yield named


class SlowSidecar(ScriptedSidecar):
    """A server that plays a script, and takes a while to start."""

    def start(self) -> None:
        time.sleep(0.3)
        super().start()
        time.sleep(0.2)


class Striker:
    """Lives in folders of ``scratch``. ``struck`` counts by signal, by moment, and what came of it."""

    def __init__(self, scratch: Path, seed: int, aims: Sequence[str], forks: bool = True) -> None:
        self.scratch, self.aims, self.forks = scratch, aims, forks
        self.early, self.aimed = (0.0, 1.0) if aims is IN_VLLM else (EARLY if forks else 1 - EARLY, AIMED)
        self.struck = {name: Counter[str]() for name in ("signal", "moment", "exit_code")}
        self.num_strikes = self.num_runs = 0
        self.begun_s = 0.0  # until a life is parsed
        self.lasts_s: dict[str, float] = {}  # moment -> seconds, where nobody strikes
        self._is_before = False
        self._numbers: list[signal.Signals] = []
        self._aims: list[str] = []
        self._noise = random.Random(seed)
        (scratch / "tmp").mkdir(exist_ok=True)
        self._shared = set(os.listdir("/dev/shm"))
        self._left_by_kill: set[str] = set()  # until a life has come to its end

    def whole(self, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, float]:
        """A run that nobody strikes, and the seconds it takes."""
        folder = self._folder(make)
        started, started_at = time.monotonic(), time.time()
        assert self._end(self._begin(folder), folder, []) == 0, _log(folder)
        ended = time.monotonic()
        self.begun_s = (folder / "run" / LOCK).stat().st_mtime - started_at
        lines = [line.split(" ", 1) for line in (folder / "moments").read_text().splitlines()]
        times = [*(float(since) for since, _ in lines), ended]
        seconds = defaultdict[str, list[float]](list)
        for (_, moment), since, until in zip(lines, times, times[1:], strict=False):
            seconds[moment].append(until - since)
        self.lasts_s = {moment: median(values) for moment, values in seconds.items()}
        return folder, ended - started

    def run(
        self, make: Callable[[Path], dict[str, Any]], num_strikes: int, longest_s: float, check: Callable[[Path], None]
    ) -> Path:
        """A run that is struck up to ``num_strikes`` times, each within ``longest_s`` of its life's beginning."""
        folder = self._folder(make)
        left = num_strikes
        while True:
            (folder / "moments").unlink(missing_ok=True)
            child = self._begin(folder)
            numbers = self._strike(child, folder, longest_s) if left > 0 else []
            left -= len(numbers)
            code = self._end(child, folder, numbers)
            check(folder)
            if code == 0:
                assert (folder / "run" / FINISHED).is_file(), _log(folder)
                self._left_by_kill.clear()
                self._assert_nothing_left(folder)
                return folder

    def command(self, folder: Path, words: Sequence[str]) -> float:
        """Seconds of a command that nobody strikes."""
        started = time.monotonic()
        assert self._end(self._begin(folder, words), folder, []) == 0, _log(folder)
        self._left_by_kill.clear()
        self._assert_nothing_left(folder)
        return time.monotonic() - started

    def struck_command(self, folder: Path, words: Sequence[str], name: str, seconds: float) -> int:
        """Exit code of a command that is struck once, if it is still there then."""
        child = self._begin(folder, words)
        is_there = self._still_there_after(self._noise.uniform(0.0, seconds), child, folder)
        return self._end(child, folder, [self._kill(child, name if _is_ours(child) else BEFORE)] if is_there else [])

    def _strike(self, child: int, folder: Path, longest_s: float) -> list[int]:
        """What has struck while the life was there."""
        kind = self._noise.random()
        is_early = kind < self.early
        aim = self._aim() if self.forks and kind > 1 - self.aimed else None
        if is_early:
            is_there = self._still_there_after(self._noise.uniform(0.0, self.begun_s), child, folder)
        else:
            while _moment(folder) == FIRST and not _has_ended(child):
                time.sleep(0.0005)
            delay_s = 0.0 if aim in ONCE else self._noise.uniform(0.0, 0.4 * (longest_s - self.begun_s))
            is_there = self._still_there_after(delay_s, child, folder, LAST)
        if aim:
            while _moment(folder) not in (aim, *([] if aim == TEARDOWN else LAST)) and not _has_ended(child):
                time.sleep(0.0005)
            is_there = self._still_there_after(self._noise.uniform(0.0, self.lasts_s[aim]), child, folder)
        if not is_there:
            return []
        numbers = [self._kill(child, _moment(folder) if _is_ours(child) else BEFORE)]
        is_twice = numbers[0] != signal.SIGKILL and self._noise.random() < TWICE
        if is_twice and self._still_there_after(self._noise.uniform(0.0, 0.5), child, folder):
            numbers.append(self._kill(child, ENDING))
        return numbers

    def _aim(self) -> str:
        self._aims = self._aims or self._noise.sample(self.aims, len(self.aims))
        return self._aims.pop()

    def _still_there_after(self, delay_s: float, child: int, folder: Path, or_in: tuple[str, ...] = ()) -> bool:
        until = time.monotonic() + delay_s
        while not (ended := _has_ended(child)) and time.monotonic() < until and _moment(folder) not in or_in:
            time.sleep(0.0005)
        return not ended

    def _kill(self, child: int, moment: str) -> int:
        self._numbers = self._numbers or self._noise.sample([*CODES], len(CODES))
        number = self._numbers.pop()
        self.struck["moment"][moment] += 1
        self.struck["signal"][signal.Signals(number).name] += 1
        self.num_strikes += 1
        self._is_before = moment == BEFORE
        os.kill(child, number)
        return number

    def _end(self, child: int, folder: Path, numbers: list[int]) -> int:
        """The exit code, once nothing that the life has started is there any more."""
        deadline = time.monotonic() + PATIENCE_S
        while not _has_ended(child):
            assert not numbers or time.monotonic() < deadline, f"does not end after {numbers}: {_log(folder)}"
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        deadline = time.monotonic() + PATIENCE_S
        code = 128 - code if code < 0 else code  # SIGKILL, or a signal before Python has come to our first line
        allowed = {0, *(CODES[signal.Signals(number)] for number in numbers)}
        if numbers and self._is_before:
            allowed |= {128 + numbers[0]}
        assert code in allowed, f"signals {numbers}: exit code {code}\n{_log(folder)}"
        self.struck["exit_code"][str(code)] += len(numbers) > 0
        while left := list(self._processes()):
            assert time.monotonic() < deadline, f"still alive: {left}\n{_log(folder)}"
            time.sleep(0.02)
        if code == 137:
            self._left_by_kill |= self._left()
        self._assert_nothing_left(folder)
        return code

    def _left(self) -> set[str]:
        tmp = self.scratch / "tmp"
        mounts = (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if str(tmp) in line)
        return {*map(str, tmp.iterdir()), *mounts, *(set(os.listdir("/dev/shm")) - self._shared)}

    def _assert_nothing_left(self, folder: Path) -> None:
        """What a SIGKILL leaves, the next life removes, if it comes that far."""
        left = self._left() - self._left_by_kill
        assert not left, f"left over: {left}\n{_log(folder)}"

    def folder(self) -> Path:
        folder = self.scratch / f"life{self.num_runs}"
        folder.mkdir()
        self.num_runs += 1
        return folder

    def _folder(self, make: Callable[[Path], dict[str, Any]]) -> Path:
        folder = self.folder()
        config = make(folder) | {"resume": "auto", "num_threads": 1}
        moments = {"class_path": "struck_lives.Moments", "init_args": {"folder": str(folder)}}
        config["trainer"]["callbacks"].insert(0, moments)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    def _begin(self, folder: Path, words: Sequence[str] = ()) -> int:
        arguments = [*(words or ("fit", "--config", str(folder / "config.yaml")))]
        environment = {MARK: str(self.scratch), "TMPDIR": str(self.scratch / "tmp"), "OMP_NUM_THREADS": "1"}
        if not self.forks:
            path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
            with (folder / "log").open("a") as log:
                return subprocess.Popen(
                    [sys.executable, "-m", "north_lightning", *arguments],
                    stdout=log,
                    stderr=log,
                    env=os.environ | environment | {"PYTHONPATH": path},
                ).pid
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            end_at_once()
            log_fd = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log_fd, 1), os.dup2(log_fd, 2)
            os.environ.update(environment)
            tempfile.tempdir = None
            # A rollout process that is spawned here would run the main script's imports again, and needs none of them.
            vars(sys.modules["__main__"]).update(__file__=None, __spec__=None)
            from north_lightning import cli

            code = cli.main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            atexit._run_exitfuncs()
            os._exit(code)

    def _processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.scratch) and process.status() != psutil.STATUS_ZOMBIE:
                    yield process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _is_ours(child: int) -> bool:
    """Whether our handlers are in place: before, a signal means what the system makes of it."""
    caught = Path(f"/proc/{child}/status").read_text().split("SigCgt:")[1].split()[0]
    return bool(int(caught, 16) & 1 << (signal.SIGUSR1 - 1))


def _moment(folder: Path) -> str:
    path = folder / "moments"
    lines = path.read_text().split("\n") if path.exists() else []
    return lines[-2].split(" ", 1)[1] if len(lines) > 1 else FIRST


def _log(folder: Path) -> str:
    return f"{folder}:\n{(folder / 'log').read_text()[-4000:]}"
