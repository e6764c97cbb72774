"""A verifier and a sandbox provider that fail as planned, around real ones or around none.

In: a plug-in and a ``FaultPlan``. Out: the same plug-in, some of whose calls raise, hang, or return what they must not.
They know nothing of how that is borne.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import time
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from north_lightning.errors import SandboxError
from north_lightning.faults.plan import FaultPlan
from north_lightning.interfaces import RewardVerifier, Sandbox, SandboxProvider
from north_lightning.types import CommandResult, Reward, Rollout, RootFileSystem, Task

VERIFIER_FAULTS = (
    "verifier_raises",
    "verifier_hangs",
    "verifier_nan",
    "verifier_wrong_type",
    "verifier_blocks_process",
    "verifier_ends_process",
)
SANDBOX_FAULTS = ("sandbox_cannot_start", "sandbox_hangs")
COMMAND_FAULTS = ("command_hangs", "command_floods")


class FaultyVerifier(RewardVerifier):
    """A verifier whose calls fail as planned; a call is (group id, index of the attempt).

    ``verifier_raises``, ``verifier_hangs``, ``verifier_nan`` and ``verifier_wrong_type`` are what a plug-in's bug does.
    ``verifier_blocks_process`` holds the event loop for good, ``verifier_ends_process`` is a crash of the interpreter:
    both take the whole rollout process with them.

    Args:
        inner: What verifies where nothing fails.
        plan: Which calls fail; of the first four kinds some may last.
    """

    def __init__(self, inner: RewardVerifier, plan: FaultPlan) -> None:
        self.inner = inner
        self.plan = plan

    def limit_s(self, task: Task) -> float | None:
        return self.inner.limit_s(task)

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        fault = self.plan.strike(VERIFIER_FAULTS[:4], rollout.group_id, rollout.index, may_last=True)
        match fault or self.plan.strike(VERIFIER_FAULTS[4:], rollout.group_id, rollout.index):
            case "verifier_raises":
                raise RuntimeError("a planned fault")
            case "verifier_hangs":
                await asyncio.Event().wait()
            case "verifier_nan":
                return Reward(math.nan)
            case "verifier_wrong_type":
                return "1.0"  # type: ignore[return-value]
            case "verifier_blocks_process":
                time.sleep(1e6)  # noqa: ASYNC251
            case "verifier_ends_process":
                os._exit(3)
        return await self.inner.verify(task, rollout, workdir, sandboxes)


class FaultySandboxes(SandboxProvider):
    """A provider whose sandboxes fail as planned; a call is (the image's path, how often it was opened before).

    ``sandbox_cannot_start`` raises ``SandboxError``, ``sandbox_hangs`` never opens. ``command_hangs`` and
    ``command_floods`` run something worse in place of a command: ``inner`` has to end it, and to cap what it prints.

    Args:
        inner: What opens the sandboxes.
        plan: Which calls fail.
    """

    def __init__(self, inner: SandboxProvider, plan: FaultPlan) -> None:
        self.inner = inner
        self.plan = plan
        self._num_opened: Counter[str] = Counter()

    @property
    def open_limit_s(self) -> float | None:
        return self.inner.open_limit_s

    def check(self) -> None:
        self.inner.check()

    def check_root(self, root: RootFileSystem) -> None:
        self.inner.check_root(root)

    async def open(
        self,
        image: Path | None,
        read_only: Mapping[str, Path] | None = None,
        writable: Mapping[str, Path] | None = None,
        root: RootFileSystem | None = None,
    ) -> Sandbox:
        name, number = str(image), self._num_opened[str(image)]
        self._num_opened[name] += 1
        match self.plan.strike(SANDBOX_FAULTS, name, number):
            case "sandbox_cannot_start":
                raise SandboxError("a planned fault: the sandbox cannot start")
            case "sandbox_hangs":
                await asyncio.Event().wait()
        return _FaultySandbox(await self.inner.open(image, read_only, writable, root), self.plan, (name, number))


class _FaultySandbox(Sandbox):
    def __init__(self, inner: Sandbox, plan: FaultPlan, opened: tuple[str, int]) -> None:
        self._inner = inner
        self._plan = plan
        self._opened = opened
        self._num_commands = 0

    async def spawn(self, argv: Sequence[str]) -> Process:
        return await self._inner.spawn(argv)

    async def run(self, command: str, timeout_s: float) -> CommandResult:
        self._num_commands += 1
        match self._plan.strike(COMMAND_FAULTS, *self._opened, self._num_commands):
            case "command_hangs":
                command = "trap '' TERM INT HUP; while :; do sleep 1000; done"
            case "command_floods":
                command = "yes flood"
        return await self._inner.run(command, timeout_s)

    async def snapshot(self, destination: Path) -> None:
        await self._inner.snapshot(destination)

    async def close(self) -> None:
        await self._inner.close()


class NoSandboxes(SandboxProvider):
    """Runs nothing, and so isolates nothing: every command succeeds without output, and a snapshot is the image."""

    def check(self) -> None: ...

    async def open(
        self, image: Path | None, read_only: object = None, writable: object = None, root: object = None
    ) -> Sandbox:
        if image is None or not await asyncio.to_thread(image.is_dir):
            raise SandboxError(f"the image: expected a directory, got {image}")
        return _NoSandbox(image)


class _NoSandbox(Sandbox):
    def __init__(self, image: Path) -> None:
        self._image = image

    async def spawn(self, argv: Sequence[str]) -> Process:
        raise SandboxError("NoSandboxes runs no programs")

    async def run(self, command: str, timeout_s: float) -> CommandResult:
        return CommandResult("", 0)

    async def snapshot(self, destination: Path) -> None:
        shutil.copytree(self._image, destination, symlinks=True)

    async def close(self) -> None: ...
