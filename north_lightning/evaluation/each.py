"""Attempts at tasks by checkpoints, one after the other on one sidecar: what ``test`` and ``calibrate`` both do.

In: named checkpoints, tasks, how attempts are made. Out: the attempts of each, recorded as they end; a progress bar.
Not here: what the attempts say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from north_lightning.evaluation.attempts import Attempt, read_attempts, weights_digest
from north_lightning.evaluation.evaluate import Planned, Served, carry_out, plan_attempts
from north_lightning.evaluation.serve import SidecarFactory, checkpoint_server
from north_lightning.evaluation.works import Works
from north_lightning.rollout import ChatServer
from north_lightning.rollout.runner import AttemptRunner
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.types import Rollout, Task

NO_SERVER = "http://127.0.0.1:9"
"""URL for a runner that samples nothing."""


def plan_each(
    checkpoints: Mapping[str, Path],
    servers: Mapping[str, ChatServer],
    tasks: Sequence[Task],
    rollouts: RolloutSettings,
    log: Path,
    num_samples: int,
    seed: int,
    works: Works | None = None,
) -> dict[Served, list[Planned]]:
    """What is done about every attempt, by checkpoint or server. Nothing is asked."""
    recorded = read_attempts(log)
    runners: dict[Served, AttemptRunner] = {
        Served(name, weights_digest(path)): rollouts.make_runner(path, NO_SERVER) for name, path in checkpoints.items()
    }
    for name, server in servers.items():  # known by the model's name and the URL
        runners[Served(name, f"{server.model} at {server.url}")] = rollouts.make_chat_runner(server)
    return {
        served: plan_attempts(runner, tasks, served, range(num_samples), recorded, works, seed)
        for served, runner in runners.items()
    }


def attempt_each(
    plans: Mapping[Served, Sequence[Planned]],
    checkpoints: Mapping[str, Path],
    servers: Mapping[str, ChatServer],
    rollouts: RolloutSettings,
    sidecar: SidecarFactory | None,
    logs: tuple[Path, Path],
    concurrency: int,
    seed: int,
    works: Works | None = None,
) -> dict[str, list[Attempt]]:
    """Name -> the attempts of its plan. ``logs`` are the files of the attempts and of the sidecar, which is started if
    there are attempts of checkpoints to make.

    Raises:
        ConfigError, SandboxUnavailableError: before anything is started.
    """
    rollouts.prepare({one.task.id: one.task for plan in plans.values() for one in plan}.values())
    limits = (logs[0], concurrency, seed)
    results, asked = {}, {}
    for served, plan in plans.items():
        name = served.checkpoint
        if name in servers:
            runner: AttemptRunner = rollouts.make_chat_runner(servers[name])
        elif any(one.action == "RERUN" for one in plan):
            asked[name] = plan
            continue
        else:
            runner = rollouts.make_runner(checkpoints[name], NO_SERVER)
        results[name] = attempt_all(runner, name, plan, *limits, works=works)
    if asked:
        assert sidecar is not None, "checkpoints come with a sidecar"
        with checkpoint_server([checkpoints[name] for name in asked], rollouts, sidecar, logs[1]) as server:
            for name, plan in asked.items():
                server.serve(checkpoints[name])
                results[name] = attempt_all(server.runner, name, plan, *limits, works=works)
    return {served.checkpoint: results[served.checkpoint] for served in plans}


def attempt_all(
    runner: AttemptRunner,
    name: str,
    plan: Sequence[Planned],
    log: Path,
    concurrency: int,
    seed: int,
    on_rollout: Callable[[Rollout], None] = lambda rollout: None,
    works: Works | None = None,
) -> list[Attempt]:
    """``carry_out`` under a progress bar that shows the pass rate so far; the runner is closed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    solved = done = 0
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=len(plan))

        def show(attempt: Attempt) -> None:
            nonlocal solved, done
            done += attempt.reward is not None
            solved += attempt.solved
            progress.update(bar, advance=1, description=f"{name} pass@1 {solved / max(1, done):.1%}")

        async def attempt() -> list[Attempt]:
            try:
                return await carry_out(runner, plan, log, concurrency, seed, show, on_rollout, works)
            finally:
                await runner.close()

        return asyncio.run(attempt())
