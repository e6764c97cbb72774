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
from north_lightning.evaluation.evaluate import Planned, Served, plan_attempts, run_attempts
from north_lightning.evaluation.serve import SidecarFactory, checkpoint_server
from north_lightning.evaluation.works import Works
from north_lightning.rollout import ChatServer
from north_lightning.rollout.runner import AttemptRunner
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.types import Rollout, Task

NO_SERVER = "http://127.0.0.1:9"
"""URL for a runner that samples nothing."""


def attempt_with_each(
    checkpoints: Mapping[str, Path],
    tasks: Sequence[Task],
    rollouts: RolloutSettings,
    sidecar: SidecarFactory,
    logs: tuple[Path, Path],
    num_samples: int,
    concurrency: int,
    seed: int,
    works: Works | None = None,
) -> dict[str, list[Attempt]]:
    """Name -> ``num_samples`` attempts at every task. ``logs`` are the files of the attempts and of the server, which
    is started if there are attempts to make.

    Raises:
        ConfigError, SandboxUnavailableError: before anything is started.
    """
    rollouts.prepare(tasks)
    log, server_log = logs
    plans = plan_each(checkpoints, {}, tasks, rollouts, log, num_samples, seed, works)
    paths = {one: checkpoints[one.checkpoint] for one in plans}
    asked = {one: path for one, path in paths.items() if any(each.action == "RERUN" for each in plans[one])}
    limits = (num_samples, log, concurrency, seed)
    results = {}
    for one in paths.keys() - asked.keys():
        runner = rollouts.make_runner(paths[one], NO_SERVER)
        results[one.checkpoint] = attempt_all(runner, tasks, one, *limits, works=works)
    if asked:
        with checkpoint_server(list(asked.values()), rollouts, sidecar, server_log) as server:
            for one, path in asked.items():
                server.serve(path)
                results[one.checkpoint] = attempt_all(server.runner, tasks, one, *limits, works=works)
    return {name: results[name] for name in checkpoints}


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
    everyone = [
        *(
            (rollouts.make_runner(path, NO_SERVER), Served(name, weights_digest(path)))
            for name, path in checkpoints.items()
        ),
        *((rollouts.make_chat_runner(server), _served_by(name, server)) for name, server in servers.items()),
    ]
    return {
        served: plan_attempts(runner, tasks, served, range(num_samples), recorded, works, seed)
        for runner, served in everyone
    }


def _served_by(name: str, server: ChatServer) -> Served:
    return Served(name, f"{server.model} at {server.url}")


def attempt_with_servers(
    servers: Mapping[str, ChatServer],
    tasks: Sequence[Task],
    rollouts: RolloutSettings,
    log: Path,
    num_samples: int,
    concurrency: int,
    seed: int,
    works: Works | None = None,
) -> dict[str, list[Attempt]]:
    """The same for models behind OpenAI-compatible servers; an attempt is known by the model's name and the URL."""
    if servers:
        rollouts.prepare(tasks)
    results: dict[str, list[Attempt]] = {}
    for name, server in servers.items():
        served, runner = _served_by(name, server), rollouts.make_chat_runner(server)
        results[name] = attempt_all(runner, tasks, served, num_samples, log, concurrency, seed, works=works)
    return results


def attempt_all(
    runner: AttemptRunner,
    tasks: Sequence[Task],
    served: Served,
    num_samples: int,
    log: Path,
    concurrency: int,
    seed: int,
    on_rollout: Callable[[Rollout], None] = lambda rollout: None,
    first_sample: int = 0,
    works: Works | None = None,
) -> list[Attempt]:
    """``run_attempts`` under a progress bar that shows the pass rate so far; the runner is closed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    solved = done = 0
    with Progress(*columns) as progress:
        bar = progress.add_task(served.checkpoint, total=len(tasks) * num_samples)

        def show(attempt: Attempt) -> None:
            nonlocal solved, done
            done += attempt.reward is not None
            solved += attempt.solved
            progress.update(bar, advance=1, description=f"{served.checkpoint} pass@1 {solved / max(1, done):.1%}")

        async def attempt() -> list[Attempt]:
            try:
                limits = (num_samples, log, concurrency, seed)
                return await run_attempts(runner, tasks, served, *limits, show, on_rollout, first_sample, works)
            finally:
                await runner.close()

        return asyncio.run(attempt())
