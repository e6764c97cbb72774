"""What the virtual clock of ``rl_replay`` says of a real run, and the spread of that run's rollout times."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pvariance

from rl_replay import Clock, Simulation, Trace

from north_lightning.rollout import WindowedFIFOQueue


def durations(rollouts: Path) -> list[list[float]]:
    """Seconds of each rollout of a run's ``rollouts.jsonl``, group by group."""
    by_group = defaultdict(list)
    for line in rollouts.read_text().splitlines():
        row = json.loads(line)
        by_group[row["group_id"]].append(row["duration_s"])
    return [by_group[group_id] for group_id in sorted(by_group)]


def replayed(groups: Sequence[Sequence[float]]) -> Trace:
    """The recorded times by group id; groups that the run dispatched and did not record are like earlier ones."""
    return lambda group_id: groups[group_id % len(groups)]


def simulated_step_s(
    groups: Sequence[Sequence[float]], queue: dict, num_samplers: int, work_s: float, push_every: int, num_steps: int
) -> float:
    """Seconds per step as the simulation has them, if a step works ``work_s`` and waits as the real queue makes it."""
    clock = Clock()
    simulation = Simulation(
        WindowedFIFOQueue(**queue, clock=clock), clock, replayed(groups), work_s, push_every, num_samplers
    )
    return simulation.run(num_steps).seconds / num_steps


def spread(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median, and log-normal sigmas between tasks and between attempts at the same task (analysis of variance)."""
    logs = [[math.log(seconds) for seconds in group] for group in groups]
    attempt = fmean(pvariance(group) * len(group) / (len(group) - 1) for group in logs)
    between = pvariance([fmean(group) for group in logs]) - attempt / fmean(map(len, logs))
    return {
        "median_s": math.exp(fmean(x for group in logs for x in group)),
        "task_sigma": math.sqrt(max(between, 0.0)),
        "attempt_sigma": math.sqrt(attempt),
    }
