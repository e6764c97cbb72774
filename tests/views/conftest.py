"""The folder of a recipe run that has ended, as its commands leave it."""

import json
from pathlib import Path

import pytest
import yaml
from evaluated import write_evaluation

from north_lightning.views.page import CHARTS

RATES = {"": 0.5, "/low": 0.25, "/high": 0.75}
"""Of every point on held-out tasks, and its interval."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    stages = {
        name: {"seconds": 60.0, "peak_memory_bytes": 2**30} for name in ("sft_stage1", "sft_stage2", "rl", "eval")
    }
    stages["rl"]["peak_memory_bytes"] = 3 * 2**30
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    for seed, name in enumerate(("sft_stage1", "sft_stage2", "rl")):
        write_evaluation(tmp_path / "eval", name, rate=seed, seed=seed)
    gain = {"pass@1": 0.25, "ci95": [0.2, 0.3], "num_tasks": 120}
    path = tmp_path / "eval" / "summary.json"
    summary = json.loads(path.read_text()) | {"paired": {"rl - sft_stage2": gain}}
    for checkpoint in summary["checkpoints"].values():
        checkpoint["by_family"] = {"delete_named": 0.5, "wrong_key": 0.3}
    path.write_text(json.dumps(summary))
    names = {name for chart in CHARTS for _, stage, name in chart.curves if stage == "rl"}
    rows = [{"step": step, **dict.fromkeys(names, 0.5), "policy_lag/bound": 5.0} for step in range(20)]
    for step, row in enumerate(rows):
        row |= {"train/mismatch_kl": 0.001 * step, "policy_lag/max": float(step % 4), "weights/version": step // 4}
        row["train/loss"] = 1.0 / (1 + step)
    rows[8]["weights/push_s"], rows[12]["weights/push_s"] = 0.1, 0.3
    for stage in ("sft_stage1", "sft_stage2", "rl"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "history.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 2')
    heldout = {f"eval/{one}pass@1{end}": rate for one in ("", "terminal/", "swe/") for end, rate in RATES.items()}
    (tmp_path / "rl" / "eval").mkdir()
    points = "".join(json.dumps({"step": step, **heldout}) + "\n" for step in (0, 8, 16))
    (tmp_path / "rl" / "eval" / "points.jsonl").write_text(points)
    for stage in ("sft_stage1", "sft_stage2", "rl"):
        (tmp_path / stage / "config.yaml").write_text(yaml.safe_dump(config_of(stage), sort_keys=False))
        (tmp_path / stage / "summary.json").write_text(json.dumps({"steps": 20, "seconds": 90.0}))
    return tmp_path


def config_of(stage: str) -> dict:
    """The part of a stage's config that is told."""
    model = {"checkpoint": None, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}}}
    if stage != "rl":
        sources = {"terminal": {"files": ["a.jsonl"], "share": 1.0}, "swe": {"files": ["b.jsonl"], "share": 3.0}}
        return {"model": {"init_args": model}, "data": {"init_args": {"sources": sources, "row_tokens": 2048}}}
    model |= {"checkpoint": "runs/x/sft_stage2/checkpoint", "loss": {"class_path": "north_lightning.losses.CISPOLoss"}}
    rollouts = {"group_size": 8, "environment_weights": {"terminal": 0.35, "swe": 0.65}}
    callbacks = [
        {"class_path": "north_lightning.callbacks.WeightSyncCallback", "init_args": {"every_n_steps": 4}},
        {"class_path": "north_lightning.callbacks.RolloutProducerCallback", "init_args": rollouts},
    ]
    queue = {"class_path": "north_lightning.rollout.WindowedFIFOQueue", "init_args": {"groups_per_batch": 16}}
    data = {"init_args": {"queue": queue, "groups_per_batch": None}}
    return {"trainer": {"callbacks": callbacks}, "model": {"init_args": model}, "data": data}
