"""Output folders: nothing finished is overwritten, and the same command goes on where it was.

In: where a command is about to write. Out: the same places, free to be written, with what was there beside them as
``NAME.1``, ``NAME.2``; the checkpoint that a run goes on from; or a refusal that names the choices. Nothing is deleted.
Not here: what is written, and what is in a checkpoint. Free of Lightning.
"""

from __future__ import annotations

import itertools
import os
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from north_lightning.durable import replace_text
from north_lightning.errors import CheckpointError, ConfigError
from north_lightning.history import HISTORY

LOCK, INTERRUPTED, CONFIG, FINISHED = ".lock", "interrupted.ckpt", "config.yaml", "finished.json"
LOGGERS = "loggers.json"
SHARDED_REST, SHARDED_METADATA = "trainer.pt", ".metadata"
"""In the folder of a sharded checkpoint: everything but weights and moments, and torch's table of contents, which it
writes last."""

RESULTS = (
    *(CONFIG, FINISHED, HISTORY, "summary.json", "rollouts.jsonl", "time.json"),
    *("checkpoint", "checkpoints", "lightning_logs", "resume", "*.ckpt"),
)
"""What says that a run has been in a folder."""

LIMITS = ("max_steps", "max_epochs", "max_time", "num_batches")
"""Keys that say how long a run goes on; a finished one whose config changes only these may go on."""

MOVES_ASIDE = ("fit", "tasks", "trajectories", "tokenizer", "data filter", "data blocklist", "human-eval prepare")
"""Commands that refuse to replace earlier work unless ``--overwrite true`` moves it aside. The others go on with it."""

_NOT_SETTINGS = ("resume", "overwrite", "ckpt_path", "num_threads")


class Checkpoint(NamedTuple):
    """A training checkpoint and the optimizer steps that it holds."""

    path: Path
    step: int


# ---- any output ------------------------------------------------------------------------------------------------------


def check_writable(folder: Path, key: str) -> None:
    """``ConfigError`` if ``folder`` cannot be made or written in; it is not made here."""
    if "$" in str(folder) or str(folder).startswith("~"):
        raise ConfigError(f"{key}: expected a path as it is, got '{folder}': neither variables nor ~ are filled in")
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: expected a folder that can be written, got '{folder}' ('{there}' is not one)")


def claim(key: str, paths: Iterable[Path], overwrite: bool) -> None:
    """Make sure that no work is at ``paths``, files and folders alike: move it aside, or refuse.

    Raises:
        ConfigError: something is there and ``overwrite`` is false; names the choices.
    """
    used = [path for path in paths if _is_used(path)]
    if used and not overwrite:
        raise ConfigError(
            f"{key}: '{used[0]}' holds the work of an earlier run. Choose one:\n"
            f"  --overwrite true       move it aside, to '{_free_name(used[0])}'\n"
            f"  another --{key}"
        )
    for path in used:
        set_aside(path)


def set_aside(path: Path) -> Path:
    """Rename ``path`` to the first free of ``NAME.1``, ``NAME.2``, ..., and say so."""
    free = _free_name(path)
    path.rename(free)
    _say(f"'{path}' is kept as '{free}'")
    return free


def set_contents_aside(folder: Path, paths: Iterable[Path]) -> None:
    """Move ``paths``, which lie in ``folder``, to their places in ``NAME.1``, and say so."""
    aside = _free_name(folder)
    for path in sorted(paths):
        (aside / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside / path.relative_to(folder))
    if aside.exists():
        _say(f"the earlier work in '{folder}' is kept in '{aside}'")


def write_result(path: Path, text: str) -> None:
    """Write a file whole or not at all; an earlier one that says something else is set aside."""
    if path.exists() and path.read_bytes() != text.encode("utf-8", "backslashreplace"):
        set_aside(path)
    replace_text(path, text)


def _free_name(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


# ---- training runs ---------------------------------------------------------------------------------------------------


def results_in(folder: Path) -> list[Path]:
    """What an earlier run has left in its folder."""
    found = (path for pattern in RESULTS for path in folder.glob(pattern))
    return sorted(path for path in found if not path.name.startswith("."))


def claim_run(folder: Path, elsewhere: Iterable[Path], overwrite: bool, may_write: bool = True) -> None:
    """Make sure that a run which begins at step 0 finds nothing in its folder, nor where else it writes.

    Args:
        folder: ``trainer.default_root_dir``.
        elsewhere: Folders of checkpoints, and files, that the config puts outside of it.
        overwrite: Move what is there aside.
        may_write: False on the processes that only look.

    Raises:
        ConfigError: it is used and ``overwrite`` is false; names the choices.
    """
    others = [place for place in elsewhere if _is_used(place)]
    used = [*results_in(folder), *others]
    if used and not overwrite:
        raise ConfigError(
            f"trainer.default_root_dir: '{used[0]}' is the work of an earlier run. Choose one:\n"
            "  --resume auto          go on from its newest checkpoint\n"
            f"  --overwrite true       move it aside, to '{_free_name(used[0] if used[0] in others else folder)}'\n"
            "  another --trainer.default_root_dir (and other places, where the config names them)"
        )
    if used and may_write:
        for place in others:
            set_aside(place)
        if len(used) > len(others):
            set_run_aside(folder)


def set_run_aside(folder: Path) -> None:
    """Move all that is in a run's folder to ``NAME.1``, but for its lock and the folders of other runs in it."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"trainer.default_root_dir: expected a folder of the run's own, got '{folder}', which this command works "
            "in: what is there cannot be moved aside"
        )
    set_contents_aside(folder, [path for path in folder.iterdir() if path.name != LOCK and not _is_run(path)])


def newest_checkpoint(folders: Iterable[Path], weights_only: bool = True, quiet: bool = False) -> Checkpoint | None:
    """The complete checkpoint of the most steps in any of ``folders``; None if there is none. Says which are torn."""
    found: list[tuple[int, int, Path]] = []
    torn: list[Path] = []
    for path in sorted({path for folder in folders for path in folder.glob("*.ckpt") if path.name[0] != "."}):
        try:
            found.append((step_of(path, weights_only), path.stat().st_mtime_ns, path))
        except CheckpointError:
            torn.append(path)
    chosen = None
    for step, _, path in sorted(found, reverse=True):
        if _is_whole(path):
            chosen = Checkpoint(path, step)
            break
        torn.append(path)
    for path in [] if quiet else torn:
        _say(f"'{path}' is torn and left out")
    return chosen


def step_of(path: Path, weights_only: bool = True) -> int:
    """Optimizer steps of a training checkpoint, a file or a sharded folder; ``CheckpointError`` if it is none."""
    import torch

    file = path / SHARDED_REST if path.is_dir() else path
    try:
        if path.is_dir() and not (path / SHARDED_METADATA).is_file():
            raise CheckpointError(f"no {SHARDED_METADATA}")
        saved = torch.load(file, map_location="cpu", weights_only=weights_only, mmap=True)
        return int(saved["global_step"])
    except Exception as error:  # the reader raises many kinds for a damaged file
        raise CheckpointError(
            f"resume: expected a complete training checkpoint, got '{path}', which cannot be read "
            f"({type(error).__name__}): give another, or --resume auto"
        ) from error


def _is_whole(path: Path) -> bool:
    """Whether every byte is as it was written, as far as that can be known."""
    files = [path] if path.is_file() else [path / SHARDED_REST]
    try:
        for file in files:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    return False
        return path.is_file() or all(part.stat().st_size for part in path.glob("*.distcp"))
    except (zipfile.BadZipFile, OSError):
        return False


def changed_settings(folder: Path, config: str) -> list[str]:
    """Keys in which ``config`` (YAML) differs from the one that the run in ``folder`` was started with."""
    path = folder / CONFIG
    if not path.is_file():
        return []
    then, now = (_flat(yaml.safe_load(text) or {}) for text in (path.read_text(), config))
    keys = sorted({*then, *now} - {key for key in {*then, *now} if key.split(".")[0] in _NOT_SETTINGS})
    return [key for key in keys if then.get(key) != now.get(key)]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {prefix: value}
    return {path: leaf for key, one in items for path, leaf in _flat(one, f"{prefix}.{key}".lstrip(".")).items()}


def _is_used(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in (LOCK, CONFIG))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
