"""Builds generated task sets: ``python -m north_lightning tasks --config ...``.

Out: one directory of Harbor tasks per set, ``<output_dir>/<name>``. The same settings give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.progress import track

from north_lightning.durable import remove_folder, unfinished_name
from north_lightning.errors import ConfigError
from north_lightning.run_folders import claim
from north_lightning.tasks.harbor import write_task
from north_lightning.tasks.names import Split
from north_lightning.tasks.software import software_task
from north_lightning.tasks.terminal import terminal_task
from north_lightning.types import Count, Whole
from north_lightning.untrusted import check_name

GENERATORS = {"terminal": terminal_task, "swe": software_task}


@dataclass(frozen=True)
class TaskSetSettings:
    """One generated set.

    Args:
        name: Directory of the set.
        environment: Terminal tasks or software tasks.
        split: Whose names to draw from; the two splits share none.
        count: How many tasks.
        first: Index of the first task; sets of one split that must not overlap start apart.
    """

    name: str
    environment: Literal["terminal", "swe"]
    split: Split
    count: Count
    first: Whole = 0


def build_task_sets(output_dir: Path, sets: list[TaskSetSettings], seed: int = 0, overwrite: bool = False) -> None:
    """Write every set; a set is there whole or not at all.

    Args:
        output_dir: Parent of the sets' directories.
        sets: What to generate.
        seed: Another seed, other names.
        overwrite: Move an earlier set aside, to NAME.1, instead of refusing to replace it.
    """
    if not sets:
        raise ConfigError("sets: expected at least one, got none")
    names = [one.name for one in sets]
    if len(set(names)) != len(names):
        raise ConfigError(f"sets: names must differ, got {names}")
    for one in sets:
        check_name(one.name, "sets: name", ConfigError)
        for other in sets[: sets.index(one)]:
            is_alike = (one.environment, one.split) == (other.environment, other.split)
            if is_alike and one.first < other.first + other.count and other.first < one.first + one.count:
                raise ConfigError(f"sets.first: expected no task twice, '{other.name}' and '{one.name}' overlap")
    claim("output_dir", [output_dir / one.name for one in sets], overwrite)
    for one in sets:
        directory = unfinished_name(output_dir / one.name)
        remove_folder(directory)
        for index in track(range(one.first, one.first + one.count), description=f"tasks {one.name}"):
            write_task(GENERATORS[one.environment](index, seed, one.split), directory)
        directory.rename(output_dir / one.name)
