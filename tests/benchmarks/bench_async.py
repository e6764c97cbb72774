"""The same RL run asynchronous and synchronous, real vLLM on two cores: seconds per step, and held-out reward.

    python tests/benchmarks/bench_async.py [--quickstart runs/quickstart] [--steps 24] [SECTION]...

Needs the SFT checkpoint and the tasks of `make quickstart`. Both runs are the shipped configs/quickstart/rl.yaml, from
the same checkpoint with the same seeds: the same tasks in the same wording, attempts with the same seeds. The
synchronous one samples a batch, trains on it and pushes, in turns (no batch ahead, a push every step): nothing is ever
off-policy. It gets both cores for each of the two, since they never work at the same time, or one: the faster counts.

``quick`` is the quickstart's workload, whose attempts take a second or two; in ``slow`` the verifier's tests take as
long as real repositories' do against an optimizer step (``SlowUnitTests``). ``reward_quick`` and ``reward_slow`` are
pass@1 of their checkpoints over the 120 held-out tasks x 8 seeds. Writes runs/bench/async.json, section by section.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, quantiles

import yaml
from rl_calibration import durations, simulated_step_s, spread

from north_lightning.history import read_history

HERE = Path(__file__).parent
OUTPUT = Path("runs/bench/async.json")
CONFIGS = Path("configs/quickstart")
WARM_UP_STEPS = 4
SYNCHRONOUS = {"max_batches_ahead": 0, "push_every": 1}
RUNS = {
    "quick": {
        "sync_2_threads": {**SYNCHRONOUS, "threads": 2},
        "sync_1_thread": {**SYNCHRONOUS, "threads": 1},
        "async": {"max_batches_ahead": 1, "push_every": 4, "threads": 1},
    },
    "slow": {
        "sync_2_threads": {**SYNCHRONOUS, "threads": 2},
        "async": {"max_batches_ahead": 3, "push_every": 4, "threads": 1},
    },
}
SLOW = {"class_path": "slow_tests.SlowUnitTests", "init_args": {"median_s": 0.5, "sigma": 1.0}}


def config_of(workload: str, run: dict, quickstart: Path, folder: Path, num_steps: int) -> dict:
    """The shipped config with another queue and pace."""
    config = yaml.safe_load((CONFIGS / "rl.yaml").read_text())
    config["num_threads"] = run["threads"]
    trainer = config["trainer"]
    trainer |= {"default_root_dir": str(folder), "max_steps": num_steps}
    trainer["logger"] = [{"class_path": "JSONLHistory", "init_args": {"save_dir": str(folder)}}]
    trainer["callbacks"] = [one for one in trainer["callbacks"] if one["class_path"] != "OnlineEvaluation"]
    callbacks = init_args_of(config)
    callbacks["SidecarCallback"]["sidecar"]["init_args"]["num_threads"] = run["threads"]
    callbacks["SamplerMetrics"]["every_s"] = 0.25
    callbacks["WeightSyncCallback"]["every_n_steps"] = run["push_every"]
    producer = callbacks["RolloutProducerCallback"]
    producer["task_sets"] = [str(quickstart / "tasks" / "rl.jsonl")]
    queue = config["data"]["init_args"]["queue"]["init_args"]
    queue["max_batches_ahead"] = run["max_batches_ahead"]
    if workload == "slow":
        producer["rollouts"]["verifier"] = copy.deepcopy(SLOW)
        producer["max_concurrent_groups"] = queue["groups_per_batch"] * (run["max_batches_ahead"] + 1)
    config["data"]["init_args"]["num_batches"] = num_steps
    config["model"]["init_args"]["checkpoint"] = str(quickstart / "sft_stage2" / "checkpoint")
    return config


def init_args_of(config: dict) -> dict[str, dict]:
    return {one["class_path"]: one.setdefault("init_args", {}) for one in config["trainer"]["callbacks"]}


def north_lightning(command: str, config: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{command}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    search = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    arguments = [sys.executable, "-m", "north_lightning", command, "--config", str(path)]
    subprocess.run(arguments, check=True, env=os.environ | {"PYTHONPATH": search})


def train(workload: str, name: str, quickstart: Path, num_steps: int) -> dict:
    """One run, and what its history and accounts say, without the first steps."""
    folder = folder_of(workload, name)
    run = RUNS[workload][name]
    config = config_of(workload, run, quickstart, folder, num_steps)
    north_lightning("fit", config, folder)
    history = read_history(folder / "history.jsonl")[WARM_UP_STEPS:]
    steps = [line["speed/step_s"] for line in history]
    waits = [line["speed/wait_s"] for line in history]
    busy = [(line["sampler/busy"], line["speed/step_s"]) for line in history if "sampler/busy" in line]
    accounts = json.loads((folder / "time.json").read_text())
    groups = durations(folder / "rollouts.jsonl")
    producer = init_args_of(config)["RolloutProducerCallback"]
    num_samplers = producer["max_concurrent_groups"] * producer["group_size"]
    queue = config["data"]["init_args"]["queue"]["init_args"]
    work_s = fmean(steps) - fmean(waits)
    simulated = simulated_step_s(groups, queue, num_samplers, work_s, run["push_every"], num_steps)
    return {
        "step_mean_s": round(fmean(steps), 3),
        "step_mean_s_of_simulation": round(simulated, 3),
        "rollout_s": {key: round(value, 3) for key, value in spread(groups).items()},
        "step_p90_s": round(quantiles(steps, n=10)[-1], 3),
        "wait_mean_s": round(fmean(waits), 3),
        "wait_p90_s": round(quantiles(waits, n=10)[-1], 3),
        "policy_lag_max": max(line["policy_lag/max"] for line in history),
        "trained_tokens_mean": round(fmean(line["rollout/trained_tokens"] for line in history)),
        "sampler_busy_by_vllm": round(sum(b * s for b, s in busy) / sum(s for _, s in busy), 3),
        "shares": {half: shares_of(seconds) for half, seconds in halves_of(accounts).items()},
    }


def halves_of(accounts: dict) -> dict[str, dict[str, float]]:
    (sampler,) = accounts["samplers_s"]
    return {"trainer": accounts["trainer_s"], "sampler": sampler, "generated_for": accounts["generated_for_s"]}


def shares_of(seconds: dict[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    return {name: round(value / total, 3) for name, value in seconds.items()}


def bench_times(workload: str, quickstart: Path, num_steps: int) -> dict:
    results = {name: train(workload, name, quickstart, num_steps) for name in RUNS[workload]}
    fastest = min((name for name in results if name != "async"), key=lambda name: results[name]["step_mean_s"])
    speedup = results[fastest]["step_mean_s"] / results["async"]["step_mean_s"]
    simulated = [results[name]["step_mean_s_of_simulation"] for name in (fastest, "async")]
    return {
        "steps": num_steps,
        **results,
        "fastest_sync": fastest,
        "sync_over_async": round(speedup, 2),
        "sync_over_async_of_simulation": round(simulated[0] / simulated[1], 2),
    }


def bench_reward(workload: str, quickstart: Path) -> dict:
    """Pass@1 with its interval, asynchronous less synchronous over the same tasks and seeds."""
    config = yaml.safe_load((CONFIGS / "eval.yaml").read_text())
    sync = json.loads(OUTPUT.read_text())[workload]["fastest_sync"]
    output = OUTPUT.parent / "async" / f"reward_{workload}"
    config |= {
        "checkpoints": {
            "sync": str(folder_of(workload, sync) / "checkpoint"),
            "async": str(folder_of(workload, "async") / "checkpoint"),
        },
        "baseline": "sync",
        "task_sets": [str(quickstart / "tasks" / name) for name in ("heldout-terminal", "heldout-swe")],
        "output_dir": str(output),
    }
    north_lightning("test", config, output)
    summary = json.loads((output / "summary.json").read_text())
    gain = summary["paired"]["async - sync"]
    return {
        "pass@1": {name: checkpoint["pass@1"] for name, checkpoint in summary["checkpoints"].items()},
        "async_less_sync": {key: gain[key] for key in ("pass@1", "ci95", "num_tasks")},
    }


def folder_of(workload: str, name: str) -> Path:
    return OUTPUT.parent / "async" / f"{workload}_{name}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", default=["quick", "reward_quick", "slow", "reward_slow"])
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--steps", type=int, default=24)
    arguments = parser.parse_args()
    checkpoint = arguments.quickstart / "sft_stage2" / "checkpoint"
    if not checkpoint.exists():
        print(f"{checkpoint} is not there: run `make quickstart` first. Nothing measured.")
        return
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.sections:
        if name.startswith("reward_"):
            result = bench_reward(name.removeprefix("reward_"), arguments.quickstart.absolute())
        else:
            result = bench_times(name, arguments.quickstart.absolute(), arguments.steps)
        results = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
        results[name] = result
        OUTPUT.write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
