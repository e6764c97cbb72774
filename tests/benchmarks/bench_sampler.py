"""How fast a quickstart-size model samples through HTTP: tokens per second, and CPU of client, server and engine.

    python tests/benchmarks/bench_sampler.py [--output runs/bench/sampler.json]

Two workloads: unrelated prompts of 300 tokens answered with about 25, and what RL asks for, groups of 8 rollouts of
four short turns whose prompts grow. CPU per request is what to compare on a machine that is not idle.
"""

import argparse
import asyncio
import json
import random
import resource
import tempfile
import time
from pathlib import Path

import psutil
import torch
from bench_weight_push import QUICKSTART

from north_lightning.model import NorthConfig, NorthModel, save_checkpoint
from north_lightning.sampling import Sidecar, VLLMSampler
from north_lightning.types import SamplingParams


def random_ids(rng, size):
    return [rng.randrange(10, QUICKSTART["vocab_size"]) for _ in range(size)]


class Load:
    """Requests of one workload, at most ``concurrency`` at a time."""

    def __init__(self, url, concurrency):
        self.sampler = VLLMSampler(url, timeout_s=300)
        self.slots = asyncio.Semaphore(concurrency)
        self.num_requests = self.num_tokens = 0

    async def ask(self, prompt, rng):
        answer = await self.sampler.generate(prompt, SamplingParams(max_tokens=rng.randint(15, 35)))
        self.num_requests += 1
        self.num_tokens += len(answer.token_ids)
        return answer.token_ids

    async def single_turn(self, seed):
        rng = random.Random(seed)
        async with self.slots:
            await self.ask(random_ids(rng, 300), rng)

    async def rollout(self, group, index):
        """Four turns on a prompt of 300 tokens, two thirds of it shared by all groups."""
        prompt = random_ids(random.Random(-1), 200) + random_ids(random.Random(group), 100)
        rng = random.Random(1000 * group + index)
        async with self.slots:
            for _ in range(4):
                prompt += await self.ask(prompt, rng) + random_ids(rng, 35)


def cpu_seconds(processes):
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def measure(sidecar, name, concurrency):
    server = psutil.Process(sidecar.pid)
    engine = [child for child in server.children(recursive=True) if child.name().startswith("VLLM")]
    load = Load(sidecar.url, concurrency)
    if name == "single_turn":
        work = [load.single_turn(seed) for seed in range(4 * concurrency)]
    else:
        work = [load.rollout(group, index) for group in range(concurrency // 4) for index in range(8)]

    def read():
        own = resource.getrusage(resource.RUSAGE_SELF)
        return [time.monotonic(), own.ru_utime + own.ru_stime, cpu_seconds([server]), cpu_seconds(engine)]

    before = read()
    await asyncio.gather(*work)
    wall, own, http, model = (now - then for now, then in zip(read(), before, strict=True))
    await load.sampler.close()
    return {
        "workload": name,
        "concurrency": concurrency,
        "tokens_per_s": round(load.num_tokens / wall),
        "tokens_per_engine_cpu_s": round(load.num_tokens / model),
        "cpu_ms_per_request": {
            "client": round(1e3 * own / load.num_requests, 2),
            "http": round(1e3 * http / load.num_requests, 2),
            "engine": round(1e3 * model / load.num_requests, 2),
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/sampler.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(NorthModel(NorthConfig(**QUICKSTART)), Path(folder) / "checkpoint")
        with Sidecar(Path(folder) / "checkpoint", Path(folder) / "server.log", max_num_seqs=128) as sidecar:
            for name in ("single_turn", "rollouts"):
                for concurrency in (16, 32, 64, 128):
                    results.append(asyncio.run(measure(sidecar, name, concurrency)))
                    print(json.dumps(results[-1]), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
