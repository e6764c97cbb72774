"""Lightning's flags, callbacks, schedules and loggers: each works as Lightning documents it, or is refused in one line.

A row of ``TABLE`` is a flag and what is seen of it: a check of what was run, or the words of the refusal; for
reinforcement learning another one where it differs. Runs of a few steps, in fine-tuning, RL, LoRA and two processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from flag_runs import EPOCH, LR, Flag, Seen, run, run_all, write_inputs
from launch import run_processes
from lightning.pytorch import callbacks as c
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.optim import lr_scheduler as schedules

from north_lightning.callbacks import HFCheckpoint, JSONLHistory
from north_lightning.model import load_checkpoint

Expected = str | Callable[[Seen], Any]
KINDS = ("sft", "rl", "lora")
FAST = {
    "accumulate 0", "overfit", "val_check_interval", "clip", "precision 16-mixed", "EarlyStopping", "EarlyStopping misspelt",
    "ModelCheckpoint misspelt", "OneCycleLR too short", "LambdaLR below 0", "plateau", "EMA first", "SWA", "log_every_n_steps",
}  # fmt: skip
"""Rows of the default run; the others are marked long."""


def steps(count: int) -> Callable[[Seen], bool]:
    return lambda seen: seen.steps == count


def trains(seen: Seen) -> bool:
    return seen.steps == 4 and seen.logged == [0, 1, 2, 3] and all(math.isfinite(x["train/loss"]) for x in seen.history)


def fact(**facts: Any) -> Callable[[Seen], bool]:
    return lambda seen: trains(seen) and all(seen.facts[name] == value for name, value in facts.items())


def prints(text: str) -> Callable[[Seen], bool]:
    return lambda seen: trains(seen) and text in seen.printed


def logs(name: str) -> Callable[[Seen], bool]:
    return lambda seen: trains(seen) and any(name in key for line in seen.history for key in line)


def saves(*names: str) -> Callable[[Seen], bool]:
    return lambda seen: seen.checkpoints() == list(names)


def rates(*expected: float) -> Callable[[Seen], bool]:
    return lambda seen: seen.lr == pytest.approx([LR * rate for rate in expected])


def repeats_two_rows(seen: Seen) -> bool:
    return len(seen.rows) == 6 and len(set(seen.rows)) == 2 and seen.rows[:2] * 3 == seen.rows


def validates_twice(seen: Seen) -> bool:
    return seen.validated == [2, 4]


def schedule(make: Callable[[Any], Any]) -> Flag:
    return Flag(module={"lr_scheduler": make})


def callback(*made: Any, **trainer: Any) -> Flag:
    return Flag(trainer=trainer, callbacks=list(made))


def short(**trainer: Any) -> dict[str, Any]:
    return {"max_steps": -1, **trainer}


Row = tuple[Callable[[], Flag], Expected] | tuple[Callable[[], Flag], Expected, Expected]


def table() -> dict[str, Row]:
    """Name -> how the flag is made, what is expected, and what in RL where that differs."""

    def flag(**trainer: Any) -> Callable[[], Flag]:
        return lambda: Flag(trainer=trainer)

    no_validation = "is for validation, which CISPOModule with RolloutDataModule does not have here: leave it out"
    clip = "set model.max_grad_norm instead"
    rows: dict[str, Row] = {
        "max_steps": (flag(max_steps=3), steps(3)),
        "max_steps 0": (flag(max_steps=0), "trains nothing"),
        "max_epochs": (flag(**short(max_epochs=2)), lambda s: (s.steps, s.epochs) == (2 * EPOCH, 2)),
        "max_epochs 0": (flag(**short(max_epochs=0)), "trains nothing"),
        "min_steps": (flag(min_steps=8, **short(max_epochs=1)), lambda s: s.steps >= EPOCH),
        "min_steps above": (flag(min_steps=9), "trainer.min_steps: expected at most max_steps"),
        "min_epochs": (flag(min_epochs=1), steps(4)),
        "max_time": (flag(max_steps=10**6, max_time={"seconds": 2}), lambda s: 0 < s.steps < 10**5 and s.seconds < 60),
        "limit_train_batches": (flag(limit_train_batches=2), lambda s: (s.steps, s.epochs, len(set(s.rows))) == (4, 2, 4)),
        "limit_train_batches half": (flag(limit_train_batches=0.5, **short(max_epochs=1)), steps(EPOCH // 2)),
        "limit_train_batches 0": (flag(limit_train_batches=0), "trains nothing"),
        "limit_val_batches": (
            flag(limit_val_batches=1, val_check_interval=2), lambda s: s.validation_batches == 2, no_validation
        ),
        "limit_test_batches": (flag(limit_test_batches=2), "fit does not use"),
        "limit_predict_batches": (flag(limit_predict_batches=2), "fit does not use"),
        "overfit": (flag(overfit_batches=2, max_steps=6), repeats_two_rows, "a rollout is trained once"),
        "val_check_interval": (flag(val_check_interval=2, limit_val_batches=1), validates_twice, no_validation),
        "val_check_interval too long": (flag(val_check_interval=99), "must be less than or equal", no_validation),
        "check_val_every_n_epoch": (
            flag(check_val_every_n_epoch=2, limit_val_batches=1, **short(max_epochs=2)),
            lambda s: s.validated == [2 * EPOCH], no_validation,
        ),
        "check_val_every_n_epoch None": (
            flag(check_val_every_n_epoch=None, val_check_interval=2, limit_val_batches=1), validates_twice, no_validation
        ),
        "num_sanity_val_steps": (
            flag(num_sanity_val_steps=1), lambda s: s.validated == [0] and s.validation_batches == 1, no_validation
        ),
        "validation without data": (
            lambda: Flag(trainer={"val_check_interval": 2}, validation=False), "set data.validation_files", no_validation
        ),
        "reload": (flag(reload_dataloaders_every_n_epochs=1), "a new loader would begin it again"),
        "fast_dev_run": (flag(fast_dev_run=2), steps(2)),
        "clip": (flag(gradient_clip_val=1.0), clip),
        "clip negative": (flag(gradient_clip_val=-1.0), clip),
        "clip algorithm": (flag(gradient_clip_algorithm="value"), "to model.max_grad_norm"),
        "accumulate 0": (flag(accumulate_grad_batches=0), "trainer.accumulate_grad_batches: got 0, expected at least 1"),
        "accumulate -1": (flag(accumulate_grad_batches=-1), "expected at least 1"),
        "accumulate 2": (
            flag(accumulate_grad_batches=2, max_steps=3), lambda s: (s.steps, len(s.rows)) == (3, 6), "expected 1"
        ),
        "detect_anomaly": (flag(detect_anomaly=True), fact(anomaly=True)),
        "barebones": (
            flag(barebones=True, logger=None, log_every_n_steps=None, num_sanity_val_steps=None, enable_model_summary=None,
                 enable_progress_bar=None), lambda s: s.steps == 4 and not s.history,
        ),
        "barebones with logger": (flag(barebones=True), "Logging can impact raw speed"),
        "sync_batchnorm": (flag(sync_batchnorm=True), "no batch normalization"),
        "use_distributed_sampler": (flag(use_distributed_sampler=True), "deals its rows out"),
        "benchmark": (flag(benchmark=True), fact(benchmark=True)),
        "inference_mode": (flag(inference_mode=False), "no_grad anyway"),
        "log_every_n_steps": (flag(log_every_n_steps=2), lambda s: [line["step"] for line in s.history] == [1, 3]),
        "log_every_n_steps 0": (flag(log_every_n_steps=0), lambda s: s.steps == 4 and not s.history),
        "deterministic": (flag(deterministic=True), fact(deterministic=True, deterministic_warns=False)),
        "deterministic warn": (flag(deterministic="warn"), fact(deterministic=True, deterministic_warns=True)),
        "enable_checkpointing": (flag(enable_checkpointing=True), saves("epoch=0-step=4.ckpt")),
        "enable_checkpointing False": (flag(enable_checkpointing=False), saves()),
        "enable_model_summary": (flag(enable_model_summary=True), prints("Trainable params")),
        "enable_progress_bar": (flag(enable_progress_bar=True), prints("Epoch 0")),
        "model_registry": (flag(model_registry="name"), "stay in the run's folder"),
        "profiler simple": (flag(profiler="simple"), prints("run_training_batch")),
        "profiler advanced": (flag(profiler="advanced"), prints("Profile stats for")),
        "profiler pytorch": (flag(profiler="pytorch"), lambda s: any("trace.json" in name for name in s.files)),
        "profiler xla": (flag(profiler="xla"), "torch_xla"),
        "accelerator auto": (flag(accelerator="auto"), trains),
        "accelerator gpu": (flag(accelerator="gpu"), "No supported gpu backend found"),
        "accelerator tpu": (flag(accelerator="tpu"), "torch_xla"),
        "devices 0": (flag(devices="0"), "not a valid input"),
        "devices -1": (flag(devices=-1), "should be an int > 0"),
        "num_nodes 0": (flag(num_nodes=0), "must be a positive integer"),
        "strategy fsdp": (flag(strategy="fsdp"), "requires a GPU accelerator"),
        "strategy deepspeed": (flag(strategy="deepspeed"), "DeepSpeed"),
        "strategy ddp_spawn": (flag(strategy="ddp_spawn"), "use ddp or NorthStrategy"),
        "strategy unknown": (flag(strategy="dp"), "invalid strategy name"),
    }  # fmt: skip
    for value in ("32-true", "32", 32):
        rows[f"precision {value!r}"] = flag(precision=value), fact(dtype={torch.float32}, autocast=False)
    for value in ("bf16-mixed", "bf16"):
        rows[f"precision {value}"] = flag(precision=value), fact(autocast=True)
    for value in ("64-true", 64, "16-mixed", "16-true", "16", 16, "transformer-engine", "transformer-engine-float16"):
        rows[f"precision {value}"] = flag(precision=value), "expected one of 32-true, bf16-mixed|transformer_engine"
    early = lambda **settings: c.EarlyStopping(patience=1, min_delta=9.0, **settings)  # noqa: E731
    epochs: dict[str, Any] = {"limit_train_batches": 2, "max_steps": 20, "limit_val_batches": 1}
    in_rl = {**epochs, "limit_val_batches": None}
    rows |= {
        "EarlyStopping": (lambda: callback(early(monitor="train/loss"), max_steps=6), "EarlyStopping looks at the end of an epoch"),
        "EarlyStopping epochs": (lambda: callback(early(monitor="train/loss"), **in_rl), steps(4)),
        "EarlyStopping validation": (
            lambda: callback(early(monitor="val/loss"), val_check_interval=2, max_steps=20, limit_val_batches=1), steps(4), no_validation
        ),
        "EarlyStopping misspelt": (lambda: callback(early(monitor="train/los"), **in_rl), "did you mean 'train/loss'?"),
        "EarlyStopping mode": (lambda: Flag(callbacks=lambda _: [early(monitor="x", mode="mni")]), "`mode` can be min, max"),
        "ModelCheckpoint": (
            lambda: callback(c.ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)),
            saves("epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"),
        ),
        "ModelCheckpoint monitor": (
            lambda: callback(c.ModelCheckpoint(monitor="train/loss", every_n_train_steps=1, save_top_k=1)),
            lambda s: s.checkpoints() == [f"epoch=0-step={1 + min(range(4), key=lambda i: s.history[i]['train/loss'])}.ckpt"],
        ),
        "ModelCheckpoint misspelt": (
            lambda: callback(c.ModelCheckpoint(monitor="train/los", every_n_train_steps=1)), "did you mean 'train/loss'?"
        ),
        "ModelCheckpoint misspelt validation": (
            lambda: callback(c.ModelCheckpoint(monitor="val/los"), val_check_interval=2, limit_val_batches=1),
            "did you mean 'val/loss'?", no_validation,
        ),
        "ModelCheckpoint time": (
            lambda: callback(c.ModelCheckpoint(train_time_interval=timedelta(0), save_top_k=-1)),
            lambda s: len(s.checkpoints()) == 4, "train_time_interval is ignored",
        ),
        "ModelCheckpoint epochs": (
            lambda: callback(c.ModelCheckpoint(every_n_epochs=1, save_top_k=-1), limit_train_batches=2),
            saves("epoch=0-step=2.ckpt", "epoch=1-step=4.ckpt"),
        ),
        "ModelCheckpoint last": (
            lambda: callback(c.ModelCheckpoint(save_last=True, every_n_train_steps=2)),
            saves("epoch=0-step=4.ckpt", "last.ckpt"),
        ),
        "OnExceptionCheckpoint": (lambda: Flag(callbacks=lambda folder: [c.OnExceptionCheckpoint(folder)]), trains),
        "TensorBoardLogger": (
            flag(logger=lambda folder: [JSONLHistory(folder), TensorBoardLogger(folder)]),
            lambda s: trains(s) and sum("events.out.tfevents" in name for name in s.files) == 1,
        ),
        "CSVLogger": (
            flag(logger=lambda folder: [JSONLHistory(folder), CSVLogger(folder)]),
            lambda s: trains(s) and sum(name.endswith("metrics.csv") for name in s.files) == 1,
        ),
        "LearningRateMonitor step": (lambda: callback(c.LearningRateMonitor("step")), logs("lr-AdamW")),
        "LearningRateMonitor epoch": (lambda: callback(c.LearningRateMonitor("epoch")), logs("lr-AdamW")),
        "LearningRateMonitor alone": (lambda: callback(c.LearningRateMonitor(), logger=False), "no logger"),
        "EMA first": (lambda: callback(c.EMAWeightAveraging(decay=0.5), HFCheckpoint()), trains),
        "WeightAveraging": (lambda: callback(HFCheckpoint(), c.WeightAveraging()), trains),
        "SWA": (lambda: callback(c.StochasticWeightAveraging(1e-3, 1)), "use WeightAveraging or EMAWeightAveraging"),
        "BackboneFinetuning": (lambda: callback(c.BackboneFinetuning()), "use model.lora"),
        "BatchSizeFinder": (lambda: callback(c.BatchSizeFinder()), "data.row_tokens"),
        "LearningRateFinder": (lambda: callback(c.LearningRateFinder()), "lr in model.optimizer"),
        "GradientAccumulationScheduler": (
            lambda: callback(c.GradientAccumulationScheduler({1: 2})), "set that, for the whole run"
        ),
        "ModelPruning": (lambda: callback(c.ModelPruning("l1_unstructured", amount=0.5)), "a pruned model"),
        "SpikeDetection": (lambda: callback(SpikeDetection()), "SpikeDetection is not supported"),
        "DeviceStatsMonitor": (lambda: callback(c.DeviceStatsMonitor(cpu_stats=True)), logs("cpu_percent")),
        "Timer": (lambda: callback(c.Timer({"seconds": 2}), max_steps=10**6), lambda s: 0 < s.steps < 10**5),
        "Timer malformed": (lambda: Flag(callbacks=lambda _: [c.Timer("soon")]), "not a valid duration"),
        "RichProgressBar": (lambda: callback(c.RichProgressBar(), enable_progress_bar=True), prints("Epoch 0")),
        "TQDMProgressBar": (lambda: callback(c.TQDMProgressBar(), enable_progress_bar=True), prints("Epoch 0")),
        "ModelSummary": (lambda: callback(c.ModelSummary(), enable_model_summary=True), prints("Trainable params")),
        "RichModelSummary": (lambda: callback(c.RichModelSummary(), enable_model_summary=True), prints("Trainable params")),
        "LambdaCallback": (lambda: callback(c.LambdaCallback(on_train_start=lambda *_: print("begins"))), prints("begins")),
        "ThroughputMonitor": (lambda: callback(c.ThroughputMonitor(lambda batch: 1)), lambda s: any("|batches" in key or "/batches" in key for line in s.history for key in line)),
        "OneCycleLR": (
            lambda: schedule(lambda o: schedules.OneCycleLR(o, LR, total_steps=4, pct_start=0.5, anneal_strategy="linear")),
            rates(1 / 25, 1.0, 1 - 0.5 * (1 - 1 / 250000) - 0.02 + 0.02, 1 / 250000),
        ),
        "OneCycleLR too short": (lambda: schedule(lambda o: schedules.OneCycleLR(o, LR, total_steps=3)), "OneCycleLR fails after step 4"),
        "OneCycleLR too short, epochs": (
            lambda: Flag(trainer=short(max_epochs=1), module={"lr_scheduler": lambda o: schedules.OneCycleLR(o, LR, total_steps=EPOCH - 1)}),
            f"fails after step {EPOCH} of {EPOCH}: make it longer",
        ),
        "OneCycleLR of a sequence": (
            lambda: schedule(lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o), schedules.OneCycleLR(o, LR, total_steps=2)], [1])),
            "SequentialLR fails after step 4",
        ),
        "LambdaLR of a list": (lambda: schedule(lambda o: schedules.LambdaLR(o, [1.0, 0.5, 0.1].__getitem__)), "LambdaLR fails after step 3"),
        "LambdaLR below 0": (lambda: schedule(lambda o: schedules.LambdaLR(o, lambda step: 1 - step / 2)), "LambdaLR: expected rates of at least 0, got -0.0005 for step 3"),
        "PolynomialLR": (lambda: schedule(lambda o: schedules.PolynomialLR(o, 4)), rates(1, 0.75, 0.5, 0.25)),
        "PolynomialLR too short": (lambda: schedule(lambda o: schedules.PolynomialLR(o, 2)), "the rate is 0 after step 2"),
        "SequentialLR": (
            lambda: schedule(lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o, 0.5, 2), schedules.StepLR(o, 1)], [2])),
            rates(0.5, 0.5, 1, 0.1),
        ),
        "CosineAnnealingWarmRestarts": (lambda: schedule(lambda o: schedules.CosineAnnealingWarmRestarts(o, 2)), rates(1, 0.5, 1, 0.5)),
        "StepLR": (lambda: schedule(lambda o: schedules.StepLR(o, 2)), rates(1, 1, 0.1, 0.1)),
        "CosineAnnealingLR": (lambda: schedule(lambda o: schedules.CosineAnnealingLR(o, 4)), rates(1, *[0.5 + 0.5 * math.cos(math.pi * i / 4) for i in (1, 2, 3)])),
        "LambdaLR": (lambda: schedule(lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step))), rates(1, 1 / 2, 1 / 3, 1 / 4)),
        "LinearLR": (lambda: schedule(lambda o: schedules.LinearLR(o, 0.5, total_iters=2)), rates(0.5, 0.75, 1, 1)),
        "CyclicLR": (lambda: schedule(lambda o: schedules.CyclicLR(o, LR / 2, LR, 2, cycle_momentum=False)), rates(0.5, 0.75, 1, 0.75)),
        "plateau": (
            lambda: schedule(lambda o: ReduceLROnPlateau(o, monitor="train/loss", patience=0, threshold=9.0, threshold_mode="abs")),
            rates(1, 1, 0.1, 0.01),
        ),
        "plateau validation": (
            lambda: Flag(
                trainer={"val_check_interval": 1, "limit_val_batches": 1},
                module={"lr_scheduler": lambda o: ReduceLROnPlateau(o, monitor="val/loss", patience=0, threshold=9.0, threshold_mode="abs")},
            ),
            rates(1, 1, 0.1, 0.01), no_validation,
        ),
        "plateau misspelt": (lambda: schedule(lambda o: ReduceLROnPlateau(o, monitor="train/los")), "'train/los' is not logged"),
        "plateau of torch": (lambda: schedule(lambda o: schedules.ReduceLROnPlateau(o)), "lightning.pytorch.cli.ReduceLROnPlateau"),
    }  # fmt: skip
    return rows


TABLE = table()


def check(seen: Seen, row: Row, kind: str) -> None:
    expected = row[-1] if kind == "rl" else row[1]
    if isinstance(expected, str):
        first, *others = expected.strip("|").split("|")
        assert any(words in seen.error for words in (first, *others)), seen.error or "not refused"
        assert len(seen.error.splitlines()) == 1
    else:
        assert not seen.error
        assert expected(seen), seen


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def cases() -> list[Any]:
    return [
        pytest.param(kind, name, marks=[] if name in FAST and kind != "lora" else [pytest.mark.long])
        for name in TABLE
        for kind in KINDS
    ]


def test_the_table_has_sixty_rows_and_more() -> None:
    assert len(TABLE) >= 60
    assert TABLE.keys() >= FAST


@pytest.mark.parametrize(("kind", "name"), cases())
def test_a_flag_works_as_documented_or_is_refused_in_one_line(
    kind: str, name: str, inputs: Path, tmp_path: Path
) -> None:
    check(run(kind, inputs, tmp_path / "run", TABLE[name][0]()), TABLE[name], kind)


NOT_IN_TWO = {name for name in TABLE if name.startswith(("strategy ", "devices "))}
"""Two processes are asked for by just these."""


@pytest.mark.long
def test_every_flag_in_two_processes(inputs: Path, tmp_path: Path) -> None:
    rows = {name: row for name, row in TABLE.items() if name not in NOT_IN_TWO}
    both = run_processes(2, run_all_rows, inputs, tmp_path)
    assert both[0].keys() == both[1].keys() == rows.keys()
    wrong = {}
    for rank, seen in enumerate(both):
        for name, row in rows.items():
            seen[name].printed = both[0][name].printed  # which process 1 does not print too
            try:
                check(seen[name], row, "two")
            except (AssertionError, IndexError, KeyError) as error:
                wrong[f"{name} ({rank})"] = f"{error!r:.300}"
    assert not wrong, "\n".join(f"{name}: {error}" for name, error in wrong.items())


def run_all_rows(inputs: Path, folder: Path) -> dict[str, Seen]:
    return run_all(inputs, folder, {name: row[0]() for name, row in TABLE.items() if name not in NOT_IN_TWO})


# ---- averaged weights ------------------------------------------------------------------------------------------------


class EveryStep(c.Callback):
    """Keeps the weights after every optimizer step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.model.named_parameters()})


@pytest.mark.parametrize("first", ["average", "release"])
def test_averages_are_released_wherever_the_callback_stands(first: str, inputs: Path, tmp_path: Path) -> None:
    every, average, release = EveryStep(), c.EMAWeightAveraging(decay=0.5), HFCheckpoint(every_n_steps=2)
    order = [average, release] if first == "average" else [release, average]
    seen = run("sft", inputs, tmp_path, callback(*order, every))
    assert not seen.error
    for folder, count in (("checkpoint", 4), ("checkpoint/step-2", 2)):
        expected = {name: tensor.clone() for name, tensor in every.weights[0].items()}  # the first update copies
        for weights in every.weights[1:count]:
            expected = {name: 0.5 * expected[name] + 0.5 * weights[name] for name in expected}
        released = dict(load_checkpoint(tmp_path / folder).named_parameters())
        for name, tensor in expected.items():
            torch.testing.assert_close(released[name], tensor, rtol=0, atol=1e-6)


def test_adapters_and_their_average_are_resumed_to_the_bit(inputs: Path, tmp_path: Path) -> None:
    def fit(folder: str, ckpt: Path | None = None, **trainer: Any) -> dict[str, torch.Tensor]:
        saver = c.ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)
        seen = run("lora", inputs, tmp_path / folder, callback(c.EMAWeightAveraging(decay=0.5), saver, **trainer), ckpt)
        assert not seen.error
        return seen.weights

    whole = fit("whole")
    saved = tmp_path / "whole" / "checkpoints" / "epoch=0-step=2.ckpt"
    checkpoint = torch.load(saved, weights_only=True)
    assert checkpoint["state_dict"].keys() == checkpoint["current_model_state"].keys() < whole.keys()
    assert not any(name.endswith("embedding_weight") for name in checkpoint["state_dict"])
    resumed = fit("resumed", saved)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_metric_that_only_validation_logs_is_awaited(inputs: Path, tmp_path: Path) -> None:
    saver = c.ModelCheckpoint(monitor="val/loss", every_n_train_steps=1)
    seen = run("sft", inputs, tmp_path, callback(saver, val_check_interval=3, limit_val_batches=1))
    assert not seen.error
    assert seen.checkpoints() == ["epoch=0-step=3.ckpt"]
