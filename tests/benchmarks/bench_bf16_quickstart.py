"""Does the quickstart learn from a bfloat16 base as from float32? Its second SFT stage, RL and evaluation, from both.

    python tests/benchmarks/bench_bf16_quickstart.py [--rl_steps 32] [--num_samples 3]     (25 minutes, two idle cores)

Tasks, data, tokenizer and first stage are the quickstart's, with its configs, below the current directory. The first
stage's checkpoint is stored twice, as it was trained and in bfloat16, and each is the base of an arm: SFT stage 2, RL
(fewer steps than the quickstart's), held-out tasks (fewer attempts). Training holds float32 master weights, as is the
default; what it writes, and vLLM serves, is bfloat16 in the bfloat16 arm. What is done is not run again. Writes
runs/bench/bf16_quickstart.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from north_lightning.history import read_history
from north_lightning.model import load_checkpoint, save_checkpoint
from north_lightning.model.files import stored_dtype

OUTPUT = Path("runs/bench/bf16_quickstart.json")
CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"
RUN = Path("runs/quickstart")
ARMS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREPARATION = {
    "tasks": RUN / "tasks" / "heldout-swe",
    "trajectories": RUN / "data" / "swe.jsonl",
    "tokenizer": RUN / "tokenizer",
    "sft_stage1": RUN / "sft_stage1" / "checkpoint",
}


def north(done: Path, *arguments: object) -> None:
    if not done.exists():
        command = [sys.executable, "-m", "north_lightning", *map(str, arguments)]
        print("$", *command[2:], flush=True)
        subprocess.run(command, check=True)


def config(name: str, folder: Path) -> Path:
    """A config of the quickstart with what its stages write in ``folder``."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    for stage in ("sft_stage1", "sft_stage2", "rl", "eval"):
        text = text.replace(f"runs/quickstart/{stage}", str(folder / stage))
    (path := folder / f"{name}.yaml").write_text(text)
    return path


def train(folder: Path, dtype: torch.dtype, rl_steps: int, num_samples: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (base := folder / "sft_stage1" / "checkpoint").exists():
        model = load_checkpoint(PREPARATION["sft_stage1"], dtype=torch.float32)
        save_checkpoint(model, base, dtype=dtype, tokenizer_dir=PREPARATION["tokenizer"])
    sft, rl = folder / "sft_stage2" / "checkpoint", folder / "rl" / "checkpoint"
    north(sft, "fit", "--config", config("sft_stage2", folder))
    listing = RUN / "tasks" / "rl.jsonl"  # both arms train on what the first one's model solves sometimes
    north(listing, "calibrate", "--config", config("calibrate", folder))
    north(rl, "fit", "--config", config("rl", folder), "--trainer.max_steps", rl_steps)
    settings = yaml.safe_load(config("eval", folder).read_text()) | {"num_samples": num_samples}
    settings["checkpoints"] = {"sft_stage2": str(sft), "rl": str(rl)}
    (folder / "eval.yaml").write_text(yaml.safe_dump(settings))
    north(folder / "eval" / "summary.json", "test", "--config", folder / "eval.yaml")


def figures(folder: Path) -> dict[str, object]:
    summary = json.loads((folder / "eval" / "summary.json").read_text())
    sft = [line["train/loss"] for line in read_history(folder / "sft_stage2" / "history.jsonl") if "train/loss" in line]
    rl = read_history(folder / "rl" / "history.jsonl")
    mismatch = [line["train/mismatch_kl"] for line in rl if "train/mismatch_kl" in line]
    return {
        "written": {
            name: str(stored_dtype(folder / name / "checkpoint")) for name in ("sft_stage1", "sft_stage2", "rl")
        },
        "sft_loss_last_20": sum(sft[-20:]) / 20,
        "rl_mismatch_kl_mean": sum(mismatch) / len(mismatch),
        "pass@1": {
            name: (one["pass@1"], one["pass@1_ci95"], one["num_tasks"], one["num_attempts"])
            for name, one in summary["checkpoints"].items()
        },
        "rl_gain": summary["paired"]["rl - sft_stage2"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rl_steps", type=int, default=32)
    parser.add_argument("--num_samples", type=int, default=3, help="attempts per held-out task")
    arguments = parser.parse_args()
    started = time.monotonic()
    for name, done in PREPARATION.items():
        north(done, "fit" if name.startswith("sft") else name, "--config", CONFIGS / f"{name}.yaml")
    results: dict[str, object] = vars(arguments) | {"torch": torch.__version__}
    for name, dtype in ARMS.items():
        folder = Path("runs/bf16_quickstart") / name
        train(folder, dtype, arguments.rl_steps, arguments.num_samples)
        results[name] = figures(folder)
        print(name, json.dumps(results[name], indent=2), flush=True)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(results | {"minutes": round((time.monotonic() - started) / 60, 1)}, indent=2) + "\n")
    print(f"written to {OUTPUT}")


if __name__ == "__main__":
    main()
