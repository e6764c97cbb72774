"""Runs a recipe: a list of this package's own commands, one after another.

In: a YAML list of named commands. Out: their output on the terminal and, in ``<run_dir>/stages.json``, the seconds
and the peak memory of each. A stage that is recorded as finished is skipped, so a stopped recipe goes on where it was,
in the middle of a training stage too; ``--restart true`` forgets. What a stage that runs again has written is moved
aside, never overwritten. Nothing here knows what a command does.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import psutil
from rich.console import Console

from north_lightning.durable import replace_text
from north_lightning.errors import ConfigError, NorthError
from north_lightning.run_folders import MOVES_ASIDE
from north_lightning.signals import Ended, end_with_parent

SAMPLE_EVERY_S = 5.0


@dataclass(frozen=True)
class Stage:
    """One command of a recipe.

    Args:
        name: What the stage is called in ``stages.json``.
        command: Arguments of ``python -m north_lightning``.
    """

    name: str
    command: str


class StageFailedError(NorthError):
    """A stage's command ended with an error."""


def run_recipe(run_dir: Path, stages: list[Stage], restart: bool = False) -> None:
    """Run every stage that is not recorded as finished.

    Args:
        run_dir: Where ``stages.json`` is kept.
        stages: The commands, in order.
        restart: Forget what is recorded and run everything.

    Raises:
        StageFailedError: A command failed; the ones before it stay recorded.
    """
    names = [stage.name for stage in stages]
    if len(set(names)) != len(names):
        raise ConfigError(f"stages: names must differ, got {names}")
    run_dir.mkdir(parents=True, exist_ok=True)
    record_path = run_dir / "stages.json"
    record = {} if restart or not record_path.exists() else json.loads(record_path.read_text())
    console = Console(highlight=False)
    is_current = not restart  # until a stage runs: what comes after it is made from its output
    for number, stage in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        digest = _digest(stage)
        begun = record.get(stage.name, {})
        is_current = is_current and begun.get("digest", digest) == digest
        if is_current and "seconds" in begun:
            console.print(f"{title}: finished earlier ({record[stage.name]['seconds']:.0f} s)", style="dim")
            continue
        console.rule(title, align="left")
        console.print(f"python -m north_lightning {stage.command}", style="dim")
        record[stage.name] = {"command": stage.command, "digest": digest}
        replace_text(record_path, json.dumps(record, indent=2) + "\n")
        seconds, peak_bytes = _run(stage, _how_it_begins(stage, goes_on=is_current))
        record[stage.name] |= {"seconds": seconds, "peak_memory_bytes": peak_bytes}
        replace_text(record_path, json.dumps(record, indent=2) + "\n")
        is_current = False
    total = sum(record[name]["seconds"] for name in names)
    console.print(f"recipe finished: {total / 60:.1f} minutes in {len(stages)} stages")


def _digest(stage: Stage) -> str:
    """Of a stage's command and of the files it names, such as its config."""
    digest = sha256(stage.command.encode())
    for word in shlex.split(stage.command):
        if Path(word).is_file():
            digest.update(Path(word).read_bytes())
    return digest.hexdigest()[:16]


def _how_it_begins(stage: Stage, goes_on: bool) -> list[str]:
    """Arguments by which a command goes on, or moves aside what it has written before."""
    words = shlex.split(stage.command)
    is_known = " ".join(words[:2]) in MOVES_ASIDE or words[0] in MOVES_ASIDE
    if not is_known or any(word.startswith(("--resume", "--overwrite", "--help")) for word in words):
        return []
    if words[0] == "fit":
        return ["--resume=auto"] if goes_on else ["--resume=null", "--overwrite=true"]
    return ["--overwrite=true"]


def _run(stage: Stage, how_it_begins: list[str]) -> tuple[float, int]:
    """Run one command; returns its seconds and the peak memory of all its processes in bytes."""
    started = time.monotonic()
    # A group of its own, so that Ctrl-C reaches it through this process, once.
    process = subprocess.Popen(
        [sys.executable, "-m", "north_lightning", *shlex.split(stage.command), *how_it_begins],
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=end_with_parent,
    )
    peak = [0]
    finished = threading.Event()
    watcher = threading.Thread(target=_watch_memory, args=(process.pid, peak, finished), daemon=True)
    watcher.start()
    try:
        code = process.wait()
    except Ended as ended:
        process.send_signal(ended.signal)
        process.wait()  # it ends in its own way
        raise
    finally:
        finished.set()
        watcher.join()
    if code != 0:
        raise StageFailedError(
            f"stage {stage.name!r} failed with exit code {code}; its message is above. "
            f"To try it alone: python -m north_lightning {stage.command}"
        )
    return time.monotonic() - started, peak[0]


def _watch_memory(pid: int, peak: list[int], finished: threading.Event) -> None:
    # Proportional set size: memory shared by several processes counts once.
    while not finished.wait(SAMPLE_EVERY_S):
        try:
            root = psutil.Process(pid)
            processes = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        total = sum(_proportional_set_bytes(process.pid) for process in processes)
        peak[0] = max(peak[0], total)


def _proportional_set_bytes(pid: int) -> int:
    try:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # ended, or not ours to read
        return 0
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss:"))
