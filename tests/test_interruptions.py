"""Runs that are ended before their end, by signals and by errors: nothing trained is lost, nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disk import no_room
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file
from small_runs import quiet_trainer, write_run_inputs

from north_lightning.callbacks import HFCheckpoint, JSONLHistory, SaveOnTermination
from north_lightning.data import SFTDataModule, SFTSource
from north_lightning.errors import NorthError
from north_lightning.modules import SFTModule
from north_lightning.sampling import sidecar
from north_lightning.signals import Ended, as_before, end_in_order, requeue_slurm_job

BENCHMARK = Path(__file__).parent / "benchmarks" / "bench_interruptions.py"
STEPS, ACCUMULATED = 4, 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


# ---- signals ---------------------------------------------------------------------------------------------------------


def strike(tmp_path: Path, section: str, num_strikes: int) -> dict[str, Any]:
    output = tmp_path / "interruptions.json"
    arguments = [section, f"--strikes={num_strikes}", "--seed=3", f"--output={output}"]
    done = subprocess.run(
        [sys.executable, BENCHMARK, *arguments], capture_output=True, text=True, timeout=20 * num_strikes + 300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(output.read_text())[section]


def test_struck_runs_end_in_the_same_bits(tmp_path: Path) -> None:
    """The short form of the benchmark: it checks exit codes, weights, losses and what is left over."""
    assert strike(tmp_path, "sft", 2)["strikes"] in (2, 3)  # the last may strike twice


def test_struck_commands_write_all_or_nothing(tmp_path: Path) -> None:
    assert strike(tmp_path, "commands", 2)["commands"] == {"tasks import": 1, "data filter": 1}


@pytest.mark.long
@pytest.mark.parametrize(("section", "num_strikes"), [("sft", 60), ("rl", 60), ("imports", 40), ("commands", 35)])
def test_many_struck_runs_lose_nothing(section: str, num_strikes: int, tmp_path: Path) -> None:
    assert strike(tmp_path, section, num_strikes)["strikes"] >= num_strikes


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_a_signal_while_a_command_imports_ends_it_at_once(number: int, code: int, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-m", "north_lightning", "fit", "--help"], stdout=subprocess.DEVNULL)
    handled = 1 << (signal.SIGUSR1 - 1)
    status = Path(f"/proc/{process.pid}/status")
    while not handled & int(status.read_text().split("SigCgt:")[1].split()[0], 16):
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(timeout=60) == code


def test_a_stopped_recipe_passes_the_signal_on_and_goes_on(tmp_path: Path) -> None:
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    config = tmp_path / "recipe.yaml"
    sets = "[{name: a, environment: terminal, split: train, count: 100000}]"
    stage = f"tasks --output_dir {tmp_path / 'tasks'} --sets '{sets}'"
    config.write_text(f'run_dir: {tmp_path / "run"}\nstages: [{{name: tasks, command: "{stage}"}}]\n')
    process = subprocess.Popen([sys.executable, "-m", "north_lightning", "recipe", "--config", str(config)])
    unfinished = tmp_path / "tasks" / ".a.writing"
    while not unfinished.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    num_files = len(os.listdir(unfinished))
    time.sleep(0.3)
    assert len(os.listdir(unfinished)) == num_files  # nobody writes any more
    assert not (tmp_path / "tasks" / "a").exists()


class TerminatedInValidation(Callback):
    """By SIGTERM, in the last batch of a step's validation."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if trainer.global_step == self.step and batch_idx + 1 == trainer.num_val_batches[0]:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("num_batches", [1, 2])
def test_a_run_that_is_ended_as_its_validation_ends_counts_that_step_once(
    num_batches: int, inputs: Path, tmp_path: Path
) -> None:
    def losses(folder: Path, *callbacks: Callback, resume: Path | None = None) -> dict[int, float]:
        source = SFTSource([inputs / "sums.jsonl"])
        data = SFTDataModule(inputs / "tokenizer", {"sums": source}, 128, validation_files=[inputs / "names.jsonl"])
        torch.manual_seed(0)
        module = SFTModule(config=inputs / "model.json", tokenizer=inputs / "tokenizer")
        settings = {"max_steps": 5, "val_check_interval": 2, "limit_val_batches": num_batches}
        every_step = {"check_val_every_n_epoch": None, "logger": JSONLHistory(folder)}
        with as_before():
            trainer = quiet_trainer(folder, callbacks=[*callbacks, SaveOnTermination()], **settings, **every_step)
            trainer.fit(module, data, ckpt_path=resume, weights_only=True)
        lines = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
        return {line["step"]: line["train/loss"] for line in lines}

    whole = losses(tmp_path / "whole")
    with pytest.raises((SystemExit, SIGTERMException)):
        losses(tmp_path / "run", TerminatedInValidation(2))
    assert losses(tmp_path / "run", resume=tmp_path / "run" / "interrupted.ckpt") == whole
    assert sorted(whole) == [0, 1, 2, 3, 4]


# ---- errors ----------------------------------------------------------------------------------------------------------


class Broken(NorthError):
    pass


class Fails(Callback):
    """In step 3, in the middle of it or at its end."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._fail)

    def _fail(self, trainer: Any, module: Any, *arguments: Any) -> None:
        if trainer.global_step == (3 if len(arguments) == 3 else 2) and arguments[-1] % ACCUMULATED == 1:
            raise Broken


def train(inputs: Path, folder: Path, *callbacks: Callback, resume: Path | None = None) -> Path:
    data = SFTDataModule(inputs / "tokenizer", {"sums": SFTSource([inputs / "sums.jsonl"])}, 128)
    torch.manual_seed(0)
    module = SFTModule(config=inputs / "model.json", tokenizer=inputs / "tokenizer")
    settings = {"max_steps": STEPS, "accumulate_grad_batches": ACCUMULATED}
    trainer = quiet_trainer(folder, callbacks=[*callbacks, HFCheckpoint(), SaveOnTermination()], **settings)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return folder / "checkpoint" / "model.safetensors"


@pytest.mark.parametrize(("hook", "steps"), [("on_train_batch_start", 2), ("on_train_batch_end", 3)])
def test_an_error_saves_what_was_trained_before_it(hook: str, steps: int, inputs: Path, tmp_path: Path) -> None:
    whole = load_file(train(inputs, tmp_path / "whole"))
    with pytest.raises(Broken):
        train(inputs, tmp_path / "run", Fails(hook))
    saved = tmp_path / "run" / "interrupted.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == steps
    resumed = load_file(train(inputs, tmp_path / "run", resume=saved))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_an_error_before_the_first_step_saves_nothing(inputs: Path, tmp_path: Path) -> None:
    class FailsAtOnce(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise Broken

    with pytest.raises(Broken):
        train(inputs, tmp_path, FailsAtOnce())
    assert not (tmp_path / "interrupted.ckpt").exists()


def test_a_full_disk_names_the_history(tmp_path: Path) -> None:
    history = JSONLHistory(tmp_path)
    history.log_metrics({"loss": 1.0}, 0)
    history.log_metrics({"loss": 1.0}, 1)
    with no_room(10), pytest.raises(OSError, match=r"history\.jsonl"):
        history.log_metrics({"loss": 1.0}, 2)
    history.finalize("failed")


def test_vllms_sockets_have_room_for_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/scratch/" + "x" * 60)
    parent = sidecar._parent_of_sockets()
    assert parent is not None
    assert len(f"{parent}/north-sidecar-12345678/{'0' * 36}") < 107


ARRAY = {"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "7"}


@pytest.mark.parametrize(("environment", "job"), [({}, "42"), (ARRAY, "42_7")])
def test_slurm_is_asked_to_start_the_job_again(
    environment: dict[str, str], job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    requeue_slurm_job()  # no job of SLURM's
    for name, value in ({"SLURM_JOB_ID": "42"} | environment).items():
        monkeypatch.setenv(name, value)
    requeue_slurm_job()
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"


def test_slurm_that_does_not_answer_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    requeue_slurm_job()
    assert "the SLURM job 42 could not be requeued" in capfd.readouterr().err


def test_a_further_signal_does_not_disturb_what_is_put_away_but_a_second_interrupt_does() -> None:
    with as_before():
        end_in_order()
        with pytest.raises(Ended) as ended:
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.exit_code == 143
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(Ended) as ended:
            signal.raise_signal(signal.SIGINT)
        assert ended.value.exit_code == 130
