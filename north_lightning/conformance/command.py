"""``python -m north_lightning plugins check FILE...``: one line per promise of the plug-in's interface, kept or broken.

In: files with one plug-in class each (a reward verifier, a policy loss or a rollout queue). Out: lines, and an error if
a promise is broken. The plug-in runs in child processes only (``child``): one that hangs is killed at the time limit
and one that takes its process down is replaced, and the remaining checks go on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from north_lightning.errors import ConfigError, NorthError
from north_lightning.sandbox.scratch import delete_stale_scratch
from north_lightning.types import Positive

LOADS = "loads"
"""The first check: the class is found and built as a config builds it."""


class PluginError(NorthError):
    """A plug-in breaks a promise of its interface."""


def check_plugins(
    files: list[Path],
    class_name: str | None = None,
    init_args: str = "{}",
    timeout_s: Positive = 60.0,
) -> None:
    """Run plug-ins against everything their interface promises.

    Args:
        files: One class each: a RewardVerifier, a PolicyLoss or a RolloutQueue.
        class_name: Which class, where a file holds several.
        init_args: Its constructor's arguments, as in a config (YAML or JSON).
        timeout_s: Seconds that one check may take.
    """
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s: expected a positive number of seconds, got {timeout_s}")
    arguments = yaml.safe_load(init_args)
    if not isinstance(arguments, dict):
        raise ConfigError(f"init_args: expected arguments by name, got {init_args!r}")
    num_broken = 0
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file}: not a file")
        for name, problem in run_checks(file, class_name, arguments, timeout_s):
            num_broken += problem is not None
            print(f"{file}: {name}: {'ok' if problem is None else problem}", flush=True)
    delete_stale_scratch()
    if num_broken:
        raise PluginError(f"{num_broken} checks failed")


def run_checks(
    file: Path, class_name: str | None, init_args: dict[str, Any], timeout_s: float
) -> Iterator[tuple[str, str | None]]:
    """Every check with what is wrong, or None; a plug-in that does not load has one check."""
    request = {"file": str(file.resolve()), "class_name": class_name, "init_args": init_args}
    num_done, checks = 0, [LOADS]
    while num_done < len(checks):
        with _Child({**request, "first": max(num_done - 1, 0)}) as child:
            answer = child.answer(timeout_s)
            if "checks" in answer:
                checks = [LOADS, *answer["checks"]]
            if num_done == 0:
                yield LOADS, answer["problem"]
                num_done = 1
            while answer["problem"] is None and num_done < len(checks):
                answer = child.answer(timeout_s)
                yield checks[num_done], answer["problem"]
                num_done += 1
                if not answer.get("is_alive", True):
                    break
                answer["problem"] = None  # of this check; the next one runs all the same
            else:
                return


class _Child:
    """A child process that has been told what to check, in a session of its own; what is left of it is killed."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._reader, writer = os.pipe()
        self._buffer = b""
        command = [sys.executable, "-m", "north_lightning.conformance.child", str(writer), json.dumps(request)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=[writer], stdin=subprocess.DEVNULL, start_new_session=True
        )
        os.close(writer)

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The next line of the child, or what kept it from writing one."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([self._reader], [], [], max(deadline - time.monotonic(), 0))
            if not readable:
                return {"problem": f"hangs: expected an end within {timeout_s:g} s, got none", "is_alive": False}
            data = os.read(self._reader, 65536)
            if not data:
                return {"problem": f"ended its process (exit code {self._process.wait()})", "is_alive": False}
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._reader)
