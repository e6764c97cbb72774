"""Folders as ``test`` leaves them, without sampling anything."""

import json
import math
from pathlib import Path

import numpy as np

from north_lightning.evaluation.attempts import Attempt, append_attempts
from north_lightning.evaluation.summary import summarise

SETS = {"terminal": 30, "swe": 24}


def protocol_of(weights: str = "w", num_samples: int = 3, **changes) -> dict:
    tasks = {f"{name}-{number}": name for name, size in SETS.items() for number in range(size)}
    return {
        "harness": {"terminal": "react-1"},
        "settings": "s1",
        "sampling": "temperature 1, top_p 0.95",
        "limits": "8 turns",
        "verifier": "UnitTestVerifier-1",
        "graders": ["swebench 5.0.2, tests 0a1b2c3d"],
        "weights": weights,
        "num_samples": num_samples,
        "first_seed": 0,
        "task_sets": tasks,
    } | changes


def attempts_of(name: str, rate: float, seed: int, protocol: dict, tests: dict | None = None) -> list[Attempt]:
    """Tasks have their own rate, the same for every model but for a shift; every solve ends by itself."""
    rng, hard = np.random.default_rng(seed), np.random.default_rng(0).normal(0, 2, 99)
    attempts = []
    for number, task in enumerate(protocol["task_sets"]):
        for sample in range(protocol["num_samples"]):
            solved = bool(rng.random() < 1 / (1 + math.exp(-hard[number] - rate)))
            attempts.append(
                Attempt(
                    name, protocol["weights"], task, "text", "terminal", "family", protocol["harness"]["terminal"],
                    sample, float(solved), protocol["settings"], solved, None,
                    "finished" if solved or rng.random() < 0.5 else "max_turns", int(rng.integers(2, 9)), 40,
                    int(rng.integers(0, 2)), False, 1.0, (tests or {}).get(task, "tests"), protocol["verifier"],
                )
            )  # fmt: skip
    return attempts


def write_evaluation(folder: Path, name="rl", rate=0.0, seed=0, tests=None, extra=(), attempts=None, **changes) -> str:
    protocol = protocol_of(f"w{seed}", **changes)
    attempts = attempts_of(name, rate, seed, protocol, tests) if attempts is None else attempts
    append_attempts(folder / "attempts.jsonl", [*extra, *attempts])
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {"checkpoints": {}}
    repositories = {task: f"repository {task[-1]}" for task in protocol["task_sets"] if task.startswith("swe")}
    row = summarise(attempts, repositories) | {"protocol": protocol}
    path.write_text(
        json.dumps(summary | {"repositories": repositories} | {"checkpoints": summary["checkpoints"] | {name: row}})
    )
    return str(folder)
