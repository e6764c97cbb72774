"""Asks Harbor itself which of our test directories are tasks.

python3.12 -m venv peer && peer/bin/pip install harbor==0.25.0
peer/bin/python tests/tasks/record_harbor_verdicts.py tests/tasks/harbor_verdicts.json
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

from harbor.models.task.task import Task
from harbor_directories import DIRECTORIES, write_directory


def verdict(name: str) -> bool:
    """Whether Harbor takes the directory and loads it."""
    with tempfile.TemporaryDirectory() as parent:
        directory = write_directory(name, Path(parent))
        try:
            Task(directory)
        except (OSError, ValueError, RuntimeError):
            return False
        return Task.is_valid_dir(directory)


def main() -> None:
    warnings.simplefilter("ignore")
    verdicts = {name: verdict(name) for name in DIRECTORIES}
    Path(sys.argv[1]).write_text(json.dumps(verdicts, indent=1) + "\n")


if __name__ == "__main__":
    main()
