"""Does a bfloat16 checkpoint train as the same weights in float32 do? Held-out loss of a small SFT run, by precision.

    python tests/benchmarks/bench_bf16_training.py [--steps 200] [--seeds 3] [--output runs/bench/bf16_training.json]

One random model is stored twice, in bfloat16 and, with the same values, in float32. Each arm trains it on generated
conversations (copying of names, sums) at the quickstart's learning rate, with several orders of the data. The spread of
the float32 arm over its orders is the noise that the others are judged by: two minutes on two idle cores.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything

sys.path.insert(0, str(Path(__file__).parents[1]))
from small_runs import MODEL, conversation, quiet_trainer, words, write_run_inputs

from north_lightning.data import SFTDataModule, SFTSource, write_samples
from north_lightning.model import NorthConfig, NorthModel, load_checkpoint, save_checkpoint
from north_lightning.modules import SFTModule

LR = 3e-3
ARMS = {  # base, trainer.precision
    "float32 base, 32-true": ("fp32", "32-true"),
    "bfloat16 base, 32-true": ("bf16", "32-true"),
    "bfloat16 base, bf16-mixed": ("bf16", "bf16-mixed"),
    "bfloat16 base, bf16-true, stochastic rounding": ("bf16", "bf16-true"),
}
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 32,
    "num_experts": 8,
    "initializer_range": 0.125,
}


def make_inputs(folder: Path) -> None:
    write_run_inputs(folder)
    written = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(written | MODEL | SHAPE | {"eos_token_id": written["eos_token_id"]}))
    samples = [conversation(f"call {name} by name", f"hello {name}", "names") for name in words(400)]
    samples += [conversation(f"add {i} and {i + 1}", f"that is {2 * i + 1}", "sums") for i in range(400)]
    write_samples(folder / "train.jsonl", [s for i, s in enumerate(samples) if i % 8])
    write_samples(folder / "held_out.jsonl", samples[::8])
    torch.manual_seed(0)
    model = NorthModel(NorthConfig.load(folder / "model.json"))
    save_checkpoint(model, folder / "bf16", dtype=torch.bfloat16, tokenizer_dir=folder / "tokenizer")
    same = load_checkpoint(folder / "bf16")
    save_checkpoint(same, folder / "fp32", dtype=torch.float32, tokenizer_dir=folder / "tokenizer")


def make_optimizer(precision: str, parameters: Any) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.0}
    if precision != "bf16-true":
        return torch.optim.AdamW(parameters, **settings)
    from torchao.optim import _AdamW

    return _AdamW(parameters, bf16_stochastic_round=True, **settings)


def train(folder: Path, base: str, precision: str, seed: int, steps: int) -> dict[str, float]:
    """Loss on held-out conversations before and after, and seconds."""
    seed_everything(seed, verbose=False)
    module = SFTModule(checkpoint=folder / base, optimizer=lambda parameters: make_optimizer(precision, parameters))
    sources = {"all": SFTSource([folder / "train.jsonl"])}
    data = SFTDataModule(folder / "tokenizer", sources, 512, validation_files=[folder / "held_out.jsonl"], seed=seed)
    settings: dict[str, Any] = {"max_steps": steps, "precision": precision, "limit_val_batches": 1.0}
    trainer = quiet_trainer(folder / "run", check_val_every_n_epoch=None, val_check_interval=10**9, **settings)
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    started = time.perf_counter()
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step; its arithmetic is the same without
        trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - started
    (after,) = trainer.validate(module, datamodule=data, verbose=False)
    return {"before": before["val/loss"], "after": after["val/loss"], "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/bf16_training.json"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for arm, (base, precision) in ARMS.items():
            runs = [train(Path(folder), base, precision, seed, arguments.steps) for seed in range(arguments.seeds)]
            losses = [run["after"] for run in runs]
            results[arm] = {"runs": runs, "mean": statistics.mean(losses), "stdev": statistics.stdev(losses)}
            print(f"{arm:<48} {results[arm]['mean']:.4f} +- {results[arm]['stdev']:.4f}", flush=True)
    reference = results["float32 base, 32-true"]
    for arm, result in results.items():
        result["difference"] = result["mean"] - reference["mean"]
        print(f"{arm:<48} differs by {result['difference']:+.4f}; noise {reference['stdev']:.4f}")
    record = {"steps": arguments.steps, "torch": torch.__version__, "machine": platform.processor(), "arms": results}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
