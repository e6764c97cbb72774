"""Scratch directories of killed processes are deleted by the next run; those of living ones never."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from north_lightning.harnesses import ReActTerminalHarness
from north_lightning.rollout.settings import AttemptSettings
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.sandbox.scratch import Kind, Scratch, delete_stale_scratch
from north_lightning.verifiers import UnitTestVerifier

OWNER = """
import sys
from typing import get_args
from north_lightning.sandbox.scratch import Kind, Scratch
for kind in get_args(Kind):
    scratch = Scratch(kind)
    (scratch.path / "work").mkdir()
    (scratch.path / "work" / "file").write_text("left behind")
    globals()[kind] = scratch
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def settings() -> AttemptSettings:
    sandboxes = BubblewrapProvider()
    sandboxes.check()  # its own directory must be where other users can look, unlike a test's
    harnesses = {"terminal": ReActTerminalHarness()}
    return AttemptSettings(harnesses=harnesses, verifier=UnitTestVerifier(), sandboxes=sandboxes)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    return directory


def start_owner(temporary: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_next_run_deletes_what_a_killed_process_left_and_nothing_of_a_living_one(
    settings: AttemptSettings, temporary: Path
) -> None:
    killed, living = start_owner(temporary), start_owner(temporary)
    try:
        assert len(list(temporary.glob("north-*/work/file"))) == 2 * len(get_args(Kind))
        delete_stale_scratch()
        assert len(list(temporary.glob("north-*/work/file"))) == 2 * len(get_args(Kind))
        killed.kill()
        killed.wait()
        settings.prepare([])
        left = sorted(path.parent.name.rsplit("-", 1)[0] for path in temporary.glob("north-*/work"))
        assert left == sorted(f"north-{kind}" for kind in get_args(Kind))
    finally:
        living.kill()
        living.wait()
    delete_stale_scratch()
    assert list(temporary.glob("north-*/work")) == []


def test_a_directory_without_a_lock_and_one_of_this_process_are_left_alone(temporary: Path) -> None:
    (temporary / "north-attempt-unlocked").mkdir()
    mine = Scratch("attempt")
    delete_stale_scratch()
    assert sorted(temporary.iterdir()) == sorted([mine.path, temporary / "north-attempt-unlocked"])
    mine.delete()
    assert list(temporary.iterdir()) == [temporary / "north-attempt-unlocked"]
