"""The planner against real peaks: training steps of small models on a CPU, each in a process of its own.

    python tests/benchmarks/bench_estimate.py [--output runs/bench/estimate.json]

Measured is the largest resident memory of two float32 steps (forward, chunked cross entropy, backward, clipping,
AdamW) above what the process had before the model was built. Each workload is dominated by another part of the
estimate. Also timed: the whole ``estimate`` command for the recipes of the released model, from the shell.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from north_lightning.model.config import NorthConfig
from north_lightning.planning import TrainingSetup, estimate_memory

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in (ROOT / "configs" / "north_mini").glob("*.yaml") if not p.stem.startswith("data_"))
WORKLOADS = {  # config: vocabulary, width, expert width, layers, heads, kv heads, head width, experts, top-k
    "weights and moments": (NorthConfig(1000, 384, 256, 9, 4, 2, 64, 32, 4, sliding_window=127), 512),
    "activations": (NorthConfig(1000, 128, 64, 9, 4, 2, 32, 16, 8, sliding_window=127), 6144),
    "global attention": (NorthConfig(1000, 64, 32, 5, 8, 2, 32, 8, 2, sliding_window=127), 3072),
    "vocabulary": (NorthConfig(131072, 128, 32, 5, 4, 2, 32, 8, 2, sliding_window=127), 2048),
}

PROGRAM = """
import json, sys, torch
from pathlib import Path
from north_lightning.losses import token_logprobs
from north_lightning.model import NorthConfig, NorthModel

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

config, num_tokens = NorthConfig.from_hf(json.loads(sys.argv[1])), int(sys.argv[2])
torch.set_num_threads(1)

def train(model, num_tokens, num_steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens, bounds = torch.randint(10, 1000, (num_tokens,)), torch.tensor([0, num_tokens], dtype=torch.int32)
    for _ in range(num_steps):
        hidden = model(tokens, bounds)
        logprobs, _ = token_logprobs(hidden[:-1], model.embedding_weight, tokens[1:], model.config.logit_scale)
        optimizer.zero_grad()
        (-logprobs.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

train(NorthModel(NorthConfig(1000, 16, 8, 5, 2, 1, 8, 4, 2)), 100, 1)  # imports, thread pools, allocator
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = resident("VmRSS")
train(NorthModel(config), num_tokens, 2)
print(resident("VmHWM") - before)
"""


def measure(config: NorthConfig, num_tokens: int) -> int:
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(config.to_hf()), str(num_tokens)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    return int(subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)


def time_command(config: Path, num_rounds: int = 5) -> dict[str, float]:
    """Median seconds of ``python -m north_lightning estimate``, on the wall and of CPU time."""
    command = [sys.executable, "-m", "north_lightning", "estimate", "--config", str(config)]
    walls, cpus = [], []
    for _ in range(num_rounds):
        used, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        walls.append(time.perf_counter() - wall)
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpus.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
    return {"wall_s": statistics.median(walls), "cpu_s": statistics.median(cpus)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/bench/estimate.json"))
    arguments = parser.parse_args()
    workloads = []
    for name, (config, num_tokens) in WORKLOADS.items():
        estimate = estimate_memory(TrainingSetup(config, num_tokens, on_gpu=False))
        peak = measure(config, num_tokens)
        ratio = estimate.total / peak
        parts = {part: size / 1e6 for part, size in asdict(estimate).items()}
        workloads.append(
            {"workload": name, "row_tokens": num_tokens, "peak_mb": peak / 1e6, "estimate_mb": estimate.total / 1e6,
             "estimate_over_peak": ratio, "parts_mb": parts}
        )  # fmt: skip
        largest = max(parts, key=lambda part: parts[part])
        print(
            f"{name:20s} peak {peak / 1e6:7.0f} MB, estimate {estimate.total / 1e6:7.0f} MB ({ratio:.2f} of it), "
            f"largest part {largest} {parts[largest]:.0f} MB",
            flush=True,
        )
    commands = {path.stem: time_command(path) for path in RECIPES}
    for name, times in commands.items():
        print(f"estimate {name:12s} {times['wall_s']:.2f} s on the wall, {times['cpu_s']:.2f} s of CPU time")
    report = {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {"python": platform.python_version()},
        "workloads": workloads,
        "command": commands,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
