"""Stages of an attempt that must end: each under a time limit, each failure an error of its own boundary.

In: an awaitable of a plug-in (sandbox, harness, sampler, verifier). Out: its result, or a typed
``InfrastructureError``. It retries nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from north_lightning.errors import ConfigError, InfrastructureError, NorthError
from north_lightning.types import Positive, Task, TaskStep

log = logging.getLogger(__name__)

T = TypeVar("T")

CANCEL_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds that an attempt and each of its stages may take; beyond them the attempt fails as infrastructure.

    What a model or a task takes is limited elsewhere, and shorter: a turn by ``max_turn_tokens``, a command by its
    harness, the commands and the tests of a task by the task.

    All limits here, and those of commands and tests, are wall time: on a machine that others use too, set them longer.

    Args:
        attempt_s: A whole attempt, beside what its task allows its commands and its tests; at least every stage.
        open_s: Opening a sandbox, and the harness in it.
        sample_s: One turn of any sampler or server: its queue, every retry of the request, ``max_turn_tokens`` tokens.
            A turn that fails is sampled with the same seed again, and takes as long again.
        act_s: One action; must exceed the harness's own limit of one command.
        snapshot_s: Copying ``/work``.
        verify_s: The verifier, beside the limit that a task sets for its tests; must exceed the verifier's own limit.
        close_s: Closing a session or a sandbox.
    """

    attempt_s: Positive = 3600.0
    open_s: Positive = 60.0
    sample_s: Positive = 600.0
    act_s: Positive = 180.0
    snapshot_s: Positive = 60.0
    verify_s: Positive = 300.0
    close_s: Positive = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"timeouts.{field.name}: expected a positive number of seconds, got {value}")
            if value > self.attempt_s:
                raise ConfigError(
                    f"timeouts.{field.name}: expected at most timeouts.attempt_s, {self.attempt_s:g}, got {value:g}"
                )

    def of_attempt(self, task: Task) -> float:
        """Seconds for an attempt at ``task``."""
        parts = [step.task for step in task.steps] or [task]
        return self.attempt_s + sum((one.agent_timeout_s or 0) + (one.verifier_timeout_s or 0) for one in parts)

    def of_verifying(self, task: Task) -> float:
        """Seconds for the verification of ``task``."""
        return self.verify_s + (task.verifier_timeout_s or 0.0)

    def of_preparing(self, step: TaskStep) -> float:
        """Seconds until ``step`` of a task can begin: its files, its ``setup.sh``, the tries of its healthcheck."""
        check = step.healthcheck
        waiting_s = (check.retries + 1) * (check.timeout_s + check.interval_s) if check else 0.0
        return self.open_s + self.act_s + waiting_s


async def within(
    timeout_s: float, failure: type[InfrastructureError], what: str, work: Awaitable[T], key: str = ""
) -> T:
    """The result of ``work``; a time-out or an unexpected exception is raised as ``failure``.

    ``key`` is the setting that limits it. ``NorthError`` passes unchanged. Work that ignores its cancellation is left
    behind after a few seconds, so that no plug-in can hold an attempt.
    """
    task = asyncio.ensure_future(work)
    try:
        finished, _ = await asyncio.wait({task}, timeout=timeout_s)
    except asyncio.CancelledError:
        await _abandon(task, what)
        raise
    if not finished:
        await _abandon(task, what)
        raise failure(f"{what}: expected an end within {timeout_s:g} s{key and f' ({key})'}, got none")
    try:
        return task.result()
    except NorthError:
        raise
    except (Exception, asyncio.CancelledError) as error:
        raise failure(f"{what} raised {type(error).__name__}: {error}") from error


async def clean_up(timeout_s: float, what: str, closing: Awaitable[None]) -> None:
    """Run ``closing`` to its end, also when the caller is cancelled meanwhile. A failure is logged: the attempt's own
    outcome stands."""
    task = asyncio.ensure_future(closing)
    try:
        await asyncio.wait_for(asyncio.shield(task), timeout_s)
    except asyncio.CancelledError:
        await asyncio.wait({task}, timeout=timeout_s)
        raise
    except Exception as error:
        log.warning("%s failed: %s: %s", what, type(error).__name__, error)


async def _abandon(task: asyncio.Future[Any], what: str) -> None:
    task.cancel()
    task.add_done_callback(lambda late: late.cancelled() or late.exception())  # retrieved, so that asyncio stays quiet
    _, still_running = await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
    if still_running:
        log.warning("%s ignores its cancellation; left behind", what)
