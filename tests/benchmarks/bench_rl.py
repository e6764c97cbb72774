"""Asynchronous RL measured: the queue under 1,000,000 random steps, replayed rollout times, sync against async.

    python tests/benchmarks/bench_rl.py [queue] [replay] [samplers] [ray]    (all: 20 minutes)

Writes runs/bench/rl.json, each section as it is done, and runs/bench/rl_replay.png. ``replay`` and ``samplers`` run on
a virtual clock: their seconds are virtual, their order, ages and admissions are the real queue's.
"""

import json
import logging
import random
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import fmean, median, quantiles

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

sys.path.extend([str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "rollout")])
from queue_machine import QueueAgainstListModel
from rl_replay import Clock, Replay, Simulation, Trace, heavy_tailed_trace

from north_lightning.rollout import WindowedFIFOQueue
from north_lightning.rollout.ray import RayQueue
from north_lightning.rollout.ray.wire import pack
from north_lightning.types import Reward, Rollout, RolloutGroup

OUTPUT = Path("runs/bench/rl.json")
MEASURED = Path(__file__).with_name("results") / "async_cpu.json"
NUM_QUEUE_STEPS = 1_000_000
GROUPS_PER_BATCH, BATCHES_AHEAD, GROUP_SIZE, PUSH_EVERY_K = 64, 4, 8, 4  # 512 rollouts a step
MEDIAN_S, TASK_SIGMA, ATTEMPT_SIGMA = 20.0, 0.6, 0.6
NUM_STEPS = 400
ORDERS = {"strict_fifo": 1, "window_0.1": 0.1, "window_0.3": 0.3, "window_0.5": 0.5, "completion_order": "unbounded"}


def bench_queue() -> dict:
    """A Hypothesis state machine against plain lists; a violation raises with the schedule that leads to it."""
    QueueAgainstListModel.num_steps = 0
    examples = settings(
        max_examples=2_000,
        stateful_step_count=100,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    while QueueAgainstListModel.num_steps < NUM_QUEUE_STEPS:
        run_state_machine_as_test(QueueAgainstListModel, settings=examples)
    return {"steps": QueueAgainstListModel.num_steps, "violations": 0}


def replay(trace: Trace, order: str, step_s: float, num_steps: int = NUM_STEPS) -> tuple[Replay, int | None]:
    """The trace through one queue, and the queue's bound on the age."""
    setting = ORDERS[order]
    num_slots = (BATCHES_AHEAD + 1) * GROUPS_PER_BATCH
    window = int(setting * num_slots) if isinstance(setting, float) else setting
    clock = Clock()
    queue = WindowedFIFOQueue(GROUPS_PER_BATCH, BATCHES_AHEAD, window, clock=clock)
    return Simulation(queue, clock, trace, step_s, PUSH_EVERY_K).run(num_steps), queue.max_policy_lag(PUSH_EVERY_K)


def bench_replay() -> dict:
    """Four lengths of an optimizer step, from a trainer that mostly waits to one that mostly trains."""
    trace = heavy_tailed_trace(0, GROUP_SIZE, MEDIAN_S, TASK_SIGMA, ATTEMPT_SIGMA)
    by_step: dict[str, dict] = {}
    waits: dict[str, list[float]] = {}
    for step_s in (12.0, 24.0, 48.0, 96.0):
        rows = by_step[f"{step_s:g}"] = {}
        for order in ORDERS:
            result, bound = replay(trace, order, step_s)
            if step_s == 48.0:
                waits[order] = result.waits_s
            fifo = rows.get("strict_fifo", {}).get("wait_mean_s", fmean(result.waits_s))
            rows[order] = {
                "wait_mean_s": round(fmean(result.waits_s), 2),
                "wait_p90_s": round(quantiles(result.waits_s, n=10)[-1], 2),
                "wait_max_s": round(max(result.waits_s), 2),
                "wait_of_strict_fifo": round(fmean(result.waits_s) / fifo, 3),
                "short_bias_first_10_steps": round(result.short_bias(trace, 10 * GROUPS_PER_BATCH), 3),
                "short_bias_first_100_steps": round(result.short_bias(trace, 100 * GROUPS_PER_BATCH), 3),
                "age_max_steps": max(result.ages),
                "age_bound_steps": bound,
                "dropped": int(result.dropped),
            }
            assert bound is None or max(result.ages) <= bound
    plot(by_step, waits)
    times = sorted(max(trace(i)) for i in range(2000))
    return {
        "groups_per_batch": GROUPS_PER_BATCH,
        "batches_ahead": BATCHES_AHEAD,
        "push_every_k": PUSH_EVERY_K,
        "steps": NUM_STEPS,
        "group_time_s": {"p10": times[200], "p50": times[1000], "p90": times[1800], "p99": times[1980]},
        "by_step_s": by_step,
    }


def plot(by_step: dict, waits: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for order, values in waits.items():
        ordered = sorted(values)
        left.plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=order)
    left.set(xlabel="wait before a step [s], steps of 48 s", ylabel="share of steps", title="What the trainer waits")
    left.legend()
    for order in ORDERS:
        bias = [rows[order]["short_bias_first_10_steps"] for rows in by_step.values()]
        right.plot([float(step) for step in by_step], bias, marker="o", label=order)
    right.set(xlabel="length of a step [s]", ylabel="mean time dispatched / trained", title="Drift to short tasks")
    figure.tight_layout()
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT.with_name("rl_replay.png"), dpi=120)


def bench_samplers() -> dict:
    """64 samplers, one rollout each at a time; the trainer as fast as they are; a push stops both for a second.

    ``heavy_tailed`` is the trace of ``replay``; ``as_measured`` has the spread of the real run ``slow`` of
    ``bench_async.py``, which also says how far this simulation is from that run's seconds per step.
    """
    measured = json.loads(MEASURED.read_text())["slow"]["async"]["rollout_s"]
    spreads = {
        "heavy_tailed": (TASK_SIGMA, ATTEMPT_SIGMA),
        "as_measured": (measured["task_sigma"], measured["attempt_sigma"]),
    }
    return {name: speedups(*sigmas) for name, sigmas in spreads.items()}


def speedups(task_sigma: float, attempt_sigma: float) -> dict:
    num_samplers, push_s = 64, 1.0
    trace = heavy_tailed_trace(0, GROUP_SIZE, MEDIAN_S, task_sigma, attempt_sigma)
    mean_s = fmean(seconds for i in range(2000) for seconds in trace(i))
    results: dict = {"task_sigma": task_sigma, "attempt_sigma": attempt_sigma}
    for groups_per_batch in (8, 64):  # as many rollouts a step as samplers; the recipe's 512
        step_s = mean_s * groups_per_batch * GROUP_SIZE / num_samplers
        seconds = {}
        for name, ahead, window in (("sync", 0, "unbounded"), ("async", 4, None)):
            clock = Clock()
            queue = WindowedFIFOQueue(groups_per_batch, ahead, window, clock=clock)
            simulation = Simulation(queue, clock, trace, step_s, 1 if ahead == 0 else 4, num_samplers, push_s)
            result = simulation.run(200)
            seconds[name] = {
                "seconds_per_step": round(result.seconds / 200, 1),
                "trainer_idle": round(sum(result.waits_s) / result.seconds, 3),
                "samplers_idle": round(1 - result.busy_s / result.seconds / num_samplers, 3),
                "age_max_steps": max(result.ages),
            }
        speedup = seconds["sync"]["seconds_per_step"] / seconds["async"]["seconds_per_step"]
        results[f"{groups_per_batch * GROUP_SIZE}_rollouts_a_step"] = seconds | {"sync_over_async": round(speedup, 2)}
    return results


def bench_ray() -> dict:
    """The queue in a Ray actor beside the one in this process: a call, and a group of 8 rollouts of 128K tokens."""
    queues = {"in_process": WindowedFIFOQueue(1, 0), "ray": RayQueue(partial(WindowedFIFOQueue, 1, 0))}
    group = RolloutGroup(0, "task", "terminal", [long_rollout(index) for index in range(8)])
    results: dict[str, dict] = {}
    for name, queue in queues.items():
        queue.stats()
        started = time.monotonic()
        for _ in range(300):
            queue.stats()
        calls_s = 300 / (time.monotonic() - started)
        seconds = []
        for _ in range(6):
            started = time.monotonic()
            group.group_id = queue.admit()
            queue.complete(group)
            (taken,) = queue.take(1)
            queue.release([taken.group_id])
            seconds.append(time.monotonic() - started)
            assert taken.rollouts[-1].token_ids == group.rollouts[-1].token_ids
        results[name] = {"calls_per_s": round(calls_s), "group_s": round(median(seconds), 3)}
        queue.close()
    return results | {"group_mib": round(len(pack(group)) / 2**20, 1), "rollouts": 8, "tokens_each": 131072}


def long_rollout(index: int, num_tokens: int = 131072) -> Rollout:
    noise = random.Random(index)
    rollout = Rollout("task", "terminal", "family", 0, index, 0, reward=Reward(1.0))
    rollout.token_ids = [noise.randrange(262144) for _ in range(num_tokens)]
    rollout.loss_mask = [noise.random() < 0.3 for _ in range(num_tokens)]
    rollout.rollout_logprobs = [-noise.random() for _ in range(num_tokens)]
    rollout.policy_versions = [7] * num_tokens
    return rollout


SECTIONS = {
    "queue": bench_queue,
    "replay": bench_replay,
    "samplers": bench_samplers,
    "ray": bench_ray,
}


def main() -> None:
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for name in sys.argv[1:] or SECTIONS:
        result = SECTIONS[name]()
        results = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
        results[name] = result
        OUTPUT.write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(results[name], indent=2))


if __name__ == "__main__":
    main()
