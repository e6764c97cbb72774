"""What evaluation during RL costs the trainer: steps while a point is measured, against the steps between two points.

    python tests/benchmarks/bench_online_evaluation.py [--steps 72] [--quickstart DIR]    (6 minutes, two idle cores)

One run of the shipped configs/quickstart/rl.yaml, from the checkpoint and the tasks of the quickstart. The steps of a
point are paired with those between its end and the next point. Both alternate in one run, so that neither what the
model has learned nor a busy machine takes sides. Writes runs/bench/online_evaluation.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

import numpy as np
import yaml

from north_lightning.history import History, read_history

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart" / "rl.yaml"
OUTPUT = Path("runs/bench/online_evaluation.json")
WARM_UP_STEPS = 2


def run(quickstart: Path, num_steps: int, folder: Path) -> None:
    config = yaml.safe_load(CONFIG.read_text())
    trainer = config["trainer"]
    trainer |= {"default_root_dir": str(folder), "max_steps": num_steps, "logger": {"class_path": "JSONLHistory"}}
    parts = {one["class_path"]: one.setdefault("init_args", {}) for one in trainer["callbacks"]}
    tasks = quickstart / "tasks"
    calibrated = tasks / "rl.jsonl"
    training = [calibrated] if calibrated.exists() else [tasks / "rl-terminal", tasks / "rl-swe"]
    parts["RolloutProducerCallback"]["task_sets"] = [str(path) for path in training]
    parts["OnlineEvaluation"]["task_sets"] = [str(tasks / "heldout-terminal"), str(tasks / "heldout-swe")]
    config["model"]["init_args"]["checkpoint"] = str(quickstart / "sft_stage2" / "checkpoint")
    (folder / "rl.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    subprocess.run([sys.executable, "-m", "north_lightning", "fit", "--config", str(folder / "rl.yaml")], check=True)


def windows(history: History) -> list[tuple[list[float], list[float]]]:
    """For each point that ended before the next began: seconds of the steps meanwhile, and of those after it."""
    ends = {int(line["eval/step"]): int(line["step"]) for line in history if "eval/step" in line}
    seconds = {int(line["step"]): line["speed/step_s"] for line in history if "speed/step_s" in line}
    pairs = []
    for begins, next_begins in zip(sorted(ends), [*sorted(ends)[1:], max(seconds) + 1], strict=True):
        steps = [step for step in range(begins, next_begins) if step >= WARM_UP_STEPS and step in seconds]
        during = [seconds[step] for step in steps if step <= ends[begins]]
        after = [seconds[step] for step in steps if step > ends[begins]]
        if during and after:
            pairs.append((during, after))
    return pairs


def cost(pairs: list[tuple[list[float], list[float]]]) -> float:
    """By how much all steps together take longer than if each were one between two points."""
    during, after = ([one for pair in pairs for one in pair[side]] for side in (0, 1))
    return fmean([*during, *after]) / fmean(after) - 1


def bootstrap(pairs: list[tuple[list[float], list[float]]]) -> list[float]:
    """95% interval of ``cost`` over steps drawn again within their windows."""
    draw = np.random.default_rng(0)
    again = [[tuple(draw.choice(side, len(side)).tolist() for side in pair) for pair in pairs] for _ in range(2000)]
    return [float(one) for one in np.quantile([cost(pairs) for pairs in again], (0.025, 0.975))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-online-") as name:
        folder = Path(name)
        load = [os.getloadavg()[0]]
        run(arguments.quickstart, arguments.steps, folder)
        load.append(os.getloadavg()[0])
        history, points = read_history(folder / "history.jsonl"), read_history(folder / "eval" / "points.jsonl")
        attempts = [json.loads(line) for line in (folder / "eval" / "attempts.jsonl").read_text().splitlines()]
    versions = {one["weights"]: one["eval/policy_version"] for one in points}
    assert len(versions) == len(points), "two points of the same weights"
    pairs = windows(history)
    result = {
        "cpus": len(os.sched_getaffinity(0)),
        "load_before_and_after": load,
        "steps": len(history),
        "points": [
            {key: one[key] for key in ("step", "eval/policy_version", "eval/pass@1", "eval/num_errors", "eval/seconds")}
            for one in points
        ],
        "attempts": len(attempts),
        "step_s_while_a_point_is_measured": fmean(one for pair in pairs for one in pair[0]) if pairs else None,
        "step_s_between_points": fmean(one for pair in pairs for one in pair[1]) if pairs else None,
        "windows": [{"during": len(during), "after": len(after)} for during, after in pairs],
        "slowdown": cost(pairs) if pairs else None,
        "slowdown_ci95": bootstrap(pairs) if pairs else None,
    }
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
