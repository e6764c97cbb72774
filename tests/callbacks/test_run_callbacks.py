"""The callbacks every run uses: stopping by loss, Hugging Face checkpoints, history, locks."""

import fcntl
import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from full_disk import no_room
from lightning.pytorch import Callback, Trainer
from small_runs import quiet_trainer, write_run_inputs

from north_lightning.callbacks import (
    HFCheckpoint,
    JSONLHistory,
    RandomState,
    RunLock,
    RunSummary,
    StopAtLoss,
    Throughput,
)
from north_lightning.chat import NorthTokenizer
from north_lightning.data import SFTDataModule, SFTSource
from north_lightning.errors import CheckpointError, ConfigError, DataError
from north_lightning.history import read_history
from north_lightning.model import load_checkpoint
from north_lightning.modules import SFTModule
from north_lightning.parallel.single_file import DurableCheckpointIO


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


def fit(inputs: Path, run_dir: Path, *callbacks: object, **settings: object) -> SFTModule:
    data = SFTDataModule(inputs / "tokenizer", {"sums": SFTSource([inputs / "sums.jsonl"])}, 256)
    module = SFTModule(config=inputs / "model.json", tokenizer=inputs / "tokenizer")
    quiet_trainer(run_dir, callbacks=list(callbacks), **settings).fit(module, datamodule=data)
    return module


def feed(callback: StopAtLoss, losses: list[float]) -> list[bool]:
    """Whether the callback asks to stop after each of ``losses``, one per optimizer step."""
    trainer = SimpleNamespace(global_step=0, callback_metrics={}, should_stop=False)
    stops = []
    for loss in losses:
        trainer.global_step += 1
        trainer.callback_metrics = {"train/loss": torch.tensor(loss)}
        callback.on_train_batch_end(trainer, None, None, None, 0)
        stops.append(trainer.should_stop)
    return stops


def test_training_stops_when_the_running_mean_of_the_loss_is_low_enough() -> None:
    assert feed(StopAtLoss(0.5, window_steps=3), [9.0, 0.1, 0.1, 0.1, 0.1]) == [False, False, False, True, True]


def test_one_lucky_step_does_not_stop_training() -> None:
    assert not any(feed(StopAtLoss(0.5, window_steps=3), [1.9, 0.1, 1.9, 0.1, 1.9]))


def test_the_running_mean_survives_a_resume() -> None:
    first, second = StopAtLoss(0.5, window_steps=3), StopAtLoss(0.5, window_steps=3)
    feed(first, [0.4, 0.4])
    second.load_state_dict(first.state_dict() | {"step": 0})
    assert feed(second, [0.4]) == [True]


def test_stopping_by_something_that_is_not_logged_is_an_error(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'train/los' is not logged; logged are .*train/loss"):
        fit(inputs, tmp_path, StopAtLoss(0.1, monitor="train/los"), max_steps=2)


def test_the_hugging_face_checkpoint_holds_the_trained_weights_and_the_tokenizer(inputs: Path, tmp_path: Path) -> None:
    module = fit(inputs, tmp_path, HFCheckpoint(every_n_steps=2), max_steps=5)
    written = load_checkpoint(tmp_path / "checkpoint")
    for (name, ours), theirs in zip(module.model.named_parameters(), written.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    expected = NorthTokenizer.load(inputs / "tokenizer")
    assert NorthTokenizer.load(tmp_path / "checkpoint").fingerprint == expected.fingerprint
    steps = sorted(path.name for path in (tmp_path / "checkpoint").glob("step-*"))
    assert steps == ["step-2", "step-4"]
    earlier = load_checkpoint(tmp_path / "checkpoint" / "step-2")
    assert not torch.equal(earlier.embedding_weight, written.embedding_weight)


def test_a_checkpoint_that_fails_to_be_written_leaves_the_old_one(inputs: Path, tmp_path: Path) -> None:
    module = fit(inputs, tmp_path, HFCheckpoint(), max_steps=1)

    class DiskFull(SFTModule):
        def save_hf(self, directory: Path, dtype: str | None = None) -> None:
            directory.mkdir()
            (directory / "config.json").write_text("{")
            raise OSError("no space left on device")

    broken = DiskFull(config=inputs / "model.json", tokenizer=inputs / "tokenizer")
    data = SFTDataModule(inputs / "tokenizer", {"sums": SFTSource([inputs / "sums.jsonl"])}, 256)
    with pytest.raises(OSError, match="no space"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[HFCheckpoint()]).fit(broken, datamodule=data)
    assert torch.equal(load_checkpoint(tmp_path / "checkpoint").embedding_weight, module.model.embedding_weight)


def test_steps_that_a_kill_has_left_in_an_unfinished_checkpoint_are_taken_back(inputs: Path, tmp_path: Path) -> None:
    kept = tmp_path / ".checkpoint.writing" / "step-7" / "config.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("whole")
    fit(inputs, tmp_path, HFCheckpoint(every_n_steps=1), max_steps=1)
    assert (tmp_path / "checkpoint" / "step-7" / "config.json").read_text() == "whole"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint"]
    load_checkpoint(tmp_path / "checkpoint"), load_checkpoint(tmp_path / "checkpoint" / "step-1")


def test_only_earlier_steps_of_its_own_are_removed(inputs: Path, tmp_path: Path) -> None:
    for name in ("step-old", "step-007", "step-7"):
        (tmp_path / ".checkpoint.writing" / name).mkdir(parents=True)
    fit(inputs, tmp_path, HFCheckpoint(every_n_steps=1, keep=1), max_steps=3)
    left = sorted(path.name for path in (tmp_path / "checkpoint").glob("step-*"))
    assert left == ["step-007", "step-3", "step-7", "step-old"]


def test_the_history_has_a_step_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    history = JSONLHistory(tmp_path)
    for step in range(2):
        history.log_metrics({"loss": float(step)}, step)
        history.log_metrics({"lag": 1.0}, step)
        lines = read_history(tmp_path / "history.jsonl")
        assert [(line["step"], line["loss"], line["lag"]) for line in lines] == [(n, n, 1.0) for n in range(step + 1)]
    history.finalize("success")


def test_the_history_drops_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    first = JSONLHistory(tmp_path)
    for step in range(5):
        first.log_metrics({"loss": float(step)}, step)
    first.finalize("success")
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # cut off by a crash
    second = JSONLHistory(tmp_path)
    second.log_metrics({"loss": 33.0}, 3)
    second.log_metrics({"lag": float("inf")}, 3)
    second.finalize("success")
    history = read_history(tmp_path / "history.jsonl")
    assert [(line["step"], line["loss"]) for line in history] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 33.0)]
    assert history[-1]["lag"] is None


def test_a_damaged_line_before_the_last_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_text('{"step": 0}\n{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"history\.jsonl:2: expected a JSON object"):
        read_history(tmp_path / "history.jsonl")


def test_the_summary_says_why_training_ended(inputs: Path, tmp_path: Path) -> None:
    callbacks = RunSummary(), Throughput(), StopAtLoss(100.0, window_steps=2)
    fit(inputs, tmp_path, *callbacks, max_steps=9, logger=JSONLHistory(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stopped"] == "early"
    assert summary["steps"] == 2
    assert summary["metrics"]["train/loss"] == read_history(tmp_path / "history.jsonl")[-1]["train/loss"]
    assert summary["metrics"]["speed/tokens_per_s"] > 0


def test_a_second_trainer_in_the_same_folder_is_refused_and_the_first_named(inputs: Path, tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as held:
        held.write("4711\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"in use by another trainer \(process 4711\)"):
            fit(inputs, tmp_path, RunLock(), max_steps=1)
    fit(inputs, tmp_path, RunLock(), max_steps=1)  # the other one has ended
    fit(inputs, tmp_path, RunLock(), max_steps=1)  # and so has this one


# ---- checkpoints ---------------------------------------------------------------------------------------------------


class Draw(Callback):
    """Draws one number of each generator in every step; saves after step 2."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.drawn: dict[int, tuple[float, float, float]] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.drawn[trainer.global_step] = (random.random(), float(np.random.rand()), float(torch.rand(())))
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_draws_the_random_numbers_the_uninterrupted_one_draws(inputs: Path, tmp_path: Path) -> None:
    whole, rest = Draw(tmp_path / "two.ckpt"), Draw(tmp_path / "again.ckpt")
    fit(inputs, tmp_path / "whole", RandomState(), whole, max_steps=4)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    data = SFTDataModule(inputs / "tokenizer", {"sums": SFTSource([inputs / "sums.jsonl"])}, 256)
    module = SFTModule(config=inputs / "model.json", tokenizer=inputs / "tokenizer")
    trainer = quiet_trainer(tmp_path / "rest", callbacks=[RandomState(), rest], max_steps=4)
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert rest.drawn == {step: whole.drawn[step] for step in (3, 4)}


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(tmp_path: Path) -> None:
    path, files = tmp_path / "run" / "last.ckpt", DurableCheckpointIO()
    files.save_checkpoint({"step": torch.ones(1)}, path)
    with no_room(100_000), pytest.raises(CheckpointError, match=r"could not write '.*last.ckpt'"):
        files.save_checkpoint({"step": torch.zeros(1_000_000)}, path)
    assert os.listdir(path.parent) == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["step"] == 1
    files.save_checkpoint({"step": torch.full((1,), 2)}, path)
    assert torch.load(path, weights_only=True)["step"] == 2


def test_a_kill_at_any_moment_of_a_write_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Child processes overwrite one checkpoint for ever and are killed after random delays."""
    path, files, noise = tmp_path / "last.ckpt", DurableCheckpointIO(), random.Random(0)
    files.save_checkpoint({"x": torch.full((200_000,), -1)}, path)
    for number in range(12):
        child = os.fork()
        if child == 0:
            while True:
                files.save_checkpoint({"x": torch.full((200_000,), number)}, path)
        time.sleep(noise.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        values = torch.load(path, weights_only=True)["x"]
        assert len(values) == 200_000
        assert values.min() == values.max()
