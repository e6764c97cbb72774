"""Trajectories told by other harnesses: calls of every pair of harnesses executed in both versions and compared.

    python tests/benchmarks/bench_translation.py [--tasks 11] [--output runs/bench/translation.json]

Sources are generated tasks that the scripted solver solved through ReAct and SWE-agent, told in each source's words
first. Every told trajectory is then played by the plain agent loop, and graded. It fails unless every call of every
pair gives the observation that was told, and the verdict of the original.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "harnesses")]

from test_translation import HARNESSES, record, turns_of  # noqa: E402

from north_lightning.data.sources import read_samples  # noqa: E402
from north_lightning.errors import RetellingError  # noqa: E402
from north_lightning.harnesses.translation import translate  # noqa: E402
from north_lightning.harnesses.variation import find_opening  # noqa: E402
from north_lightning.rollout.settings import AttemptSettings  # noqa: E402
from north_lightning.rollout.trajectories import record_trajectories  # noqa: E402
from north_lightning.sandbox import BubblewrapProvider  # noqa: E402
from north_lightning.tasks import load_task_sets  # noqa: E402
from north_lightning.tasks.build import TaskSetSettings, build_task_sets  # noqa: E402
from north_lightning.verifiers import UnitTestVerifier  # noqa: E402

SANDBOXES = BubblewrapProvider()
CONCURRENCY = 3


def recorded(directory, count):
    """Tasks by id, and a solved trajectory of each."""
    names = ("terminal", "swe")
    build_task_sets(directory, [TaskSetSettings(name, name, "train", count) for name in names])
    sets = [directory / name for name in names]
    harnesses = {"terminal": HARNESSES["react_terminal"], "swe": HARNESSES["swe_agent"]}
    settings = AttemptSettings(harnesses=harnesses, verifier=UnitTestVerifier(), sandboxes=SANDBOXES)
    record_trajectories(sets, directory / "data", settings, 0.5)
    samples = [sample for name in names for sample in read_samples(directory / "data" / f"{name}.jsonl")]
    return {task.id: task for task in load_task_sets(sets)}, samples


async def tell_all(samples, tasks, target, slots):
    """Each sample told by ``target`` (its own as they are), and why others could not be."""
    refused = Counter()

    async def one(sample):
        source = HARNESSES[sample.harness]
        if source.name == target:
            return sample
        found = find_opening(sample, source)
        async with slots:
            try:
                return await translate(
                    sample, found.num_messages, tasks[sample.task_id], source, HARNESSES[target], SANDBOXES
                )
            except RetellingError as error:
                refused[error.reason] += 1
                return None

    told = await asyncio.gather(*map(one, samples))
    return [sample for sample in told if sample is not None], refused


async def play_all(told, tasks, slots):
    """How many calls were made, gave what was told, and how many trajectories were solved."""

    async def one(sample):
        async with slots:
            harness = HARNESSES[sample.harness]
            rollout = await record(tasks[sample.task_id], harness, turns_of(sample), SANDBOXES, UnitTestVerifier())
        seen = zip(observations(sample.messages), observations(rollout.messages), strict=True)
        same = [a == b for a, b in seen]
        return len(same), sum(same), rollout.reward.solved

    return [sum(column) for column in zip(*await asyncio.gather(*map(one, told)), strict=True)]


def observations(messages):
    start = next(i for i, message in enumerate(messages) if message.role == "assistant")
    return [message.content for message in messages[start:] if message.role != "assistant"]


async def measure(tasks, samples):
    slots = asyncio.Semaphore(CONCURRENCY)
    sources = {name: (await tell_all(samples, tasks, name, slots))[0] for name in HARNESSES}
    pairs = {}
    for source, target in itertools.permutations(HARNESSES, 2):
        started = time.monotonic()
        told, refused = await tell_all(sources[source], tasks, target, slots)
        calls, identical, solved = await play_all(told, tasks, slots)
        pairs[f"{source} -> {target}"] = {
            "trajectories": len(sources[source]),
            "told": len(told),
            "refused": dict(refused),
            "calls": calls,
            "identical": identical,
            "solved": solved,
            "seconds": round(time.monotonic() - started, 1),
        }
        print(source, "->", target, pairs[f"{source} -> {target}"], flush=True)
    return pairs


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=int, default=11, help="of each kind")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/translation.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        pairs = asyncio.run(measure(*recorded(Path(directory), arguments.tasks)))
    total = {
        key: sum(pair[key] for pair in pairs.values())
        for key in ("trajectories", "told", "calls", "identical", "solved")
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"total": total, "pairs": pairs}, indent=2) + "\n")
    print(total)
    assert total["identical"] == total["calls"] > 0, total
    assert total["solved"] == total["told"], total


if __name__ == "__main__":
    main()
