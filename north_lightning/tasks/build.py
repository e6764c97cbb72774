"""Builds the generated task sets: ``python -m north_lightning tasks --config ...``.

Out: ``<output_dir>/<split>-<environment>/`` directories of Harbor tasks. The same settings give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from rich.progress import track

from north_lightning.tasks.harbor import write_task
from north_lightning.tasks.names import Split
from north_lightning.tasks.software import software_task
from north_lightning.tasks.terminal import terminal_task

GENERATORS = {"terminal": terminal_task, "swe": software_task}


def build(output_dir: Path, environment: str, split: Split, count: int, first: int = 0, seed: int = 0) -> Path:
    """Write tasks ``first .. first + count - 1`` of one environment and split; returns their directory."""
    directory = output_dir / f"{split}-{environment}"
    for index in track(range(first, first + count), description=f"tasks {split}-{environment}"):
        write_task(GENERATORS[environment](index, seed, split), directory)
    return directory
