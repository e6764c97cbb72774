"""A world around the target of a hostile input: files that must stay as they are and must not be read, a secret in the
environment, and a command that must not run."""

from __future__ import annotations

import hashlib
import os
import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SECRET_VARIABLE = "CANARY_API_KEY"


@dataclass
class World:
    """``outside`` is not the target's; ``target`` is where a command may write; ``said`` is what it printed."""

    root: Path
    secret: str = field(default_factory=lambda: f"canary-{secrets.token_hex(12)}")
    said: str = ""

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    @property
    def target(self) -> Path:
        return self.root / "target"

    @property
    def private(self) -> Path:
        return self.outside / "private" / "key.txt"

    @property
    def marker(self) -> Path:
        """The file that a command of the stranger would make."""
        return self.root / "ran"

    @property
    def command(self) -> str:
        return f"touch {self.marker}"

    def repository(self, name: str, files: dict[str, str] | None = None, inside: str = "input") -> Path:
        """A git repository of one commit."""
        root = self.root / inside / name
        for path, text in (files or {"a.py": "A = 1\n", "tests/test_a.py": "B = 2\n"}).items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        git(root, "init", "-q", "-b", "main")
        git(root, "add", "-A")
        git(root, "commit", "-q", "-m", "first")
        return root


def git(root: Path, *arguments: str, stdin: str | bytes | None = None) -> str:
    content = stdin.encode() if isinstance(stdin, str) else stdin
    identity = [
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "core.fsmonitor=false",
        "-c",
        "core.hooksPath=/dev/null",
    ]
    done = subprocess.run(["git", *identity, *arguments], cwd=root, input=content, check=True, capture_output=True)
    return done.stdout.decode().strip()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[World]:
    world = World(tmp_path)
    world.private.parent.mkdir(parents=True)
    world.private.write_text(f"{world.secret}\n")
    for path in ("home/.bashrc", "home/.gitconfig", "work/notes.txt", "work/deep/er/results.json"):
        (world.outside / path).parent.mkdir(parents=True, exist_ok=True)
        (world.outside / path).write_text(f"# {path}\n")
    world.target.mkdir()
    (world.root / "input").mkdir()
    monkeypatch.setenv("HOME", str(world.outside / "home"))
    monkeypatch.setenv(SECRET_VARIABLE, world.secret)
    monkeypatch.chdir(world.target)
    before = _snapshot(world.outside)
    old = time.time() - 10 * 86400  # an access time before the last change: the next read moves it (relatime)
    os.utime(world.private, (old, os.stat(world.private).st_mtime))
    accessed = os.stat(world.private).st_atime
    yield world
    world.said += "".join(capfd.readouterr())
    assert os.stat(world.private).st_atime == accessed, "a file outside was read"
    assert _snapshot(world.outside) == before, "something outside was changed"
    assert sorted(path.name for path in world.root.iterdir()) == ["input", "outside", "target"], "written beside it"
    assert world.secret not in world.said
    for path in world.target.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert world.secret.encode() not in path.read_bytes(), f"{path} holds what is outside"


def _snapshot(root: Path) -> dict[str, tuple[int, str]]:
    found = {}
    for path in sorted(root.rglob("*")):
        is_other = path.is_symlink() or not path.is_file() or path.name == "key.txt"
        content = "" if is_other else hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(root))] = (path.lstat().st_mode, content)
    return found


@pytest.fixture
def reads_are_noticed(tmp_path: Path) -> None:
    """Skips nothing, but fails where access times are not kept: then no test here would notice a read."""
    probe = tmp_path / "probe"
    probe.write_text("x")
    os.utime(probe, (0, os.stat(probe).st_mtime))
    probe.read_text()
    noticed = os.stat(probe).st_atime > 0
    probe.unlink()
    if not noticed:
        pytest.skip("this file system keeps no access times")
