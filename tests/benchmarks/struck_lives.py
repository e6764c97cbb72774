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
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml
from lightning.pytorch import Callback, Trainer

from north_lightning.run_folders import FINISHED, LOCK
from north_lightning.signals import end_at_once

MARK = "NORTH_LIGHTNING_STRUCK_RUNS"
"""Environment variable that everything a life starts has, and by which it is found."""
PATIENCE_S = 60.0
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130, signal.SIGKILL: 137}
FIRST = "imports, parsing"
EARLY = 0.2
"""Share of the strikes that may fall there."""


class Moments(Callback):
    """Writes down what a life is doing, and which groups its steps have trained.

    Args:
        folder: Where ``moment`` and ``book`` are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _now(self, moment: str) -> None:
        (self.folder / "moment").write_text(moment)

    def setup(self, *_: Any, **__: Any) -> None:
        self._now("tokenizing, loading the model")

    def on_fit_start(self, *_: Any) -> None:
        self._now("server start, restoring")

    def on_train_start(self, *_: Any) -> None:
        self._now("first push, rollout process")

    def on_train_batch_start(self, *_: Any) -> None:
        self._now("step")

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._now("push, checkpoint, rollouts")
        if groups := getattr(batch, "groups", None):
            with (self.folder / "book").open("a") as file:
                file.write(f"{trainer.global_step} {' '.join(str(group.group_id) for group in groups)}\n")

    def on_validation_start(self, *_: Any) -> None:
        self._now("validation")

    def on_train_end(self, *_: Any) -> None:
        self._now("release")

    def teardown(self, *_: Any, **__: Any) -> None:
        self._now("teardown")


class Striker:
    """Lives in folders of ``scratch``. ``struck`` counts by signal, by moment, and what came of it."""

    def __init__(self, scratch: Path, seed: int, forks: bool = True) -> None:
        self.scratch, self.forks = scratch, forks
        self.struck = {name: Counter[str]() for name in ("signal", "moment", "exit_code")}
        self.num_strikes = self.num_runs = 0
        self.begun_s = 0.0  # until a life is parsed
        self._noise = random.Random(seed)
        (scratch / "tmp").mkdir(exist_ok=True)
        self._shared = set(os.listdir("/dev/shm"))

    def whole(self, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, float]:
        """A run that nobody strikes, and the seconds it takes."""
        folder = self._folder(make)
        started, started_at = time.monotonic(), time.time()
        assert self._end(self._begin(folder), folder, None) == 0, _log(folder)
        self.begun_s = (folder / "run" / LOCK).stat().st_mtime - started_at
        return folder, time.monotonic() - started

    def run(
        self, make: Callable[[Path], dict[str, Any]], num_strikes: int, longest_s: float, check: Callable[[Path], None]
    ) -> Path:
        """A run that is struck up to ``num_strikes`` times, each within ``longest_s`` of its life's beginning."""
        folder = self._folder(make)
        left = num_strikes
        while True:
            (folder / "moment").unlink(missing_ok=True)
            child = self._begin(folder)
            number = self._noise.choice([*CODES]) if left > 0 else None
            if number is not None:
                left -= self._strike(child, folder, number, longest_s)
            code = self._end(child, folder, number)
            check(folder)
            if code == 0:
                assert (folder / "run" / FINISHED).is_file(), _log(folder)
                self._assert_nothing_left(folder)
                return folder

    def _strike(self, child: int, folder: Path, number: int, longest_s: float) -> bool:
        """Whether the life was still there."""
        is_early = self._noise.random() < EARLY  # while it parses; else from when it is set up
        delay_s = self._noise.uniform(0.0, self.begun_s if is_early else 0.5 * (longest_s - self.begun_s))
        until = time.monotonic() + delay_s
        while time.monotonic() < until or not (is_early or (folder / "moment").exists()):
            if not is_early and not (folder / "moment").exists():
                until = time.monotonic() + delay_s
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return False
            time.sleep(0.002)
        moment = folder / "moment"
        self.struck["moment"][moment.read_text() or FIRST if moment.exists() else FIRST] += 1
        self.struck["signal"][signal.Signals(number).name] += 1
        self.num_strikes += 1
        os.kill(child, number)
        return True

    def _end(self, child: int, folder: Path, number: int | None) -> int:
        """The exit code, once nothing that the life has started is there any more."""
        deadline = time.monotonic() + PATIENCE_S
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            assert number is None or time.monotonic() < deadline, f"does not end after {number}: {_log(folder)}"
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        code = 128 - code if code < 0 else code  # a signal before Python has come to our first line, or SIGKILL
        allowed = (0,) if number is None else (0, CODES[signal.Signals(number)])
        assert code in allowed, f"signal {number}: exit code {code}\n{_log(folder)}"
        self.struck["exit_code"][str(code)] += number is not None
        while left := list(self._processes()):
            assert time.monotonic() < deadline, f"still alive: {left}\n{_log(folder)}"
            time.sleep(0.02)
        if number != signal.SIGKILL:
            self._assert_nothing_left(folder)
        return code

    def _assert_nothing_left(self, folder: Path) -> None:
        """What a SIGKILL leaves, the next life removes."""
        tmp = self.scratch / "tmp"
        left = [path for path in tmp.iterdir() if path.name.startswith("north-")]
        mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(tmp) in line]
        shared = set(os.listdir("/dev/shm")) - self._shared
        assert not [*left, *mounts, *shared], f"left over: {left} {mounts} {shared}\n{_log(folder)}"

    def _folder(self, make: Callable[[Path], dict[str, Any]]) -> Path:
        folder = self.scratch / f"life{self.num_runs}"
        folder.mkdir()
        self.num_runs += 1
        config = make(folder) | {"resume": "auto", "num_threads": 1}
        config["trainer"]["callbacks"].append(
            {"class_path": "struck_lives.Moments", "init_args": {"folder": str(folder)}}
        )
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    def _begin(self, folder: Path) -> int:
        arguments = ["fit", "--config", str(folder / "config.yaml")]
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


def _log(folder: Path) -> str:
    return f"{folder}:\n{(folder / 'log').read_text()[-4000:]}"
