import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from north_lightning.interfaces import Harness
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.types import AssistantAction, Step, Task, ToolCall

Calls = list[AssistantAction]


@pytest.fixture(scope="session")
def sandboxes() -> BubblewrapProvider:
    return BubblewrapProvider()


@pytest.fixture
def task(tmp_path: Path) -> Task:
    """A git repository of one module below ``/work``."""
    files = tmp_path / "task" / "environment" / "files"
    (files / "pkg").mkdir(parents=True)
    (files / "calc.py").write_text("def add(a, b):\n    return a - b\n")
    (files / "pkg" / "deep.txt").write_text("deep\n")
    commit = "git init -q && git add -A && git -c user.name=n -c user.email=n@localhost commit -qm initial"
    subprocess.run(["bash", "-c", commit], cwd=files, check=True)
    return Task("calc", "swe", "tiny", "add must add", tmp_path / "task", 8)


@pytest.fixture
def play(task: Task, sandboxes: BubblewrapProvider) -> Callable[..., list[Step]]:
    """Carries out actions, one after the other, in one session of a harness; returns the steps."""

    def run(harness: Harness, *actions: AssistantAction) -> list[Step]:
        async def session() -> list[Step]:
            sandbox = await sandboxes.open(task.directory / "environment" / "files")
            try:
                opened = await harness.open(task, sandbox)
                try:
                    return [await opened.act(action) for action in actions]
                finally:
                    await opened.close()
                    await opened.close()
            finally:
                await sandbox.close()

        return asyncio.run(session())

    return run


@pytest.fixture
def call() -> Callable[..., AssistantAction]:
    return lambda tool, **arguments: AssistantAction(tool_calls=(ToolCall("0", tool, arguments),))
