"""Trainers killed with SIGKILL at random moments and resumed, until they have finished.

In: a function that trains from the last checkpoint to the end. Out: how often it was killed, and what it came to. Every
life is a fork of this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rl_fakes import fake_runner
from rollout_fakes import make_task
from small_runs import quiet_trainer, write_run_inputs

from north_lightning.callbacks import RandomState, RunLock, SidecarCallback, WeightSyncCallback
from north_lightning.data import RolloutDataModule, SFTDataModule, SFTSource
from north_lightning.interfaces import WeightTransport
from north_lightning.losses import CISPOLoss
from north_lightning.model import NorthConfig, NorthModel, save_checkpoint
from north_lightning.modules import CISPOModule, SFTModule
from north_lightning.parallel.single_file import DurableCheckpointIO
from north_lightning.rollout import FailurePolicy, ProducerSpec, RolloutProducer, WindowedFIFOQueue

LAST = "last.ckpt"


def kill_until(num_kills: int, life: Callable[[], None], begun: Path, longest_s: float) -> int:
    """Kill ``life`` up to ``num_kills`` times, up to ``longest_s`` after it has made ``begun``; then let it end."""
    noise = random.Random(0)
    kills = 0
    while True:
        begun.unlink(missing_ok=True)
        child = fork(life)
        while kills < num_kills and not begun.exists() and not ended(child):
            time.sleep(0.005)
        if kills < num_kills:
            time.sleep(noise.uniform(0.0, longest_s))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "a life ended with an error, see above"
            return kills
        kills += 1


def fork(life: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        # A rollout process that is spawned here would run the main script's imports again, and needs none of them.
        vars(sys.modules["__main__"]).update(__file__=None, __spec__=None)
        life()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


class Begun(Callback):
    """A file while this life trains."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, *_: object) -> None:
        self.path.touch()


def trainer_in(folder: Path, num_steps: int, *callbacks: Callback) -> tuple[Trainer, Path | None]:
    """A trainer that writes a checkpoint after every step, and the one to resume from."""
    keep = ModelCheckpoint(dirpath=folder, filename="last", every_n_train_steps=1, enable_version_counter=False)
    everything = [Begun(folder / "begun"), RunLock(), RandomState(), *callbacks, keep]
    trainer = quiet_trainer(folder, max_steps=num_steps, callbacks=everything, enable_checkpointing=True)
    trainer.strategy.checkpoint_io = DurableCheckpointIO()
    resume = folder / LAST
    return trainer, resume if resume.exists() else None


# ---- supervised fine-tuning ----------------------------------------------------------------------------------------


def sft_life(inputs: Path, folder: Path, num_steps: int) -> None:
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    sources = {name: SFTSource([inputs / f"{name}.jsonl"], share=0.5) for name in ("names", "sums")}
    trainer, resume = trainer_in(folder, num_steps)
    module = SFTModule(config=inputs / "model.json", tokenizer=inputs / "tokenizer")
    trainer.fit(module, SFTDataModule(inputs / "tokenizer", sources, 256), ckpt_path=resume, weights_only=True)


def kill_sft(scratch: Path, num_kills: int, num_steps: int) -> dict:
    """Whether a run killed ``num_kills`` times ends with the weights and moments of an uninterrupted one."""
    inputs = scratch / "inputs"
    inputs.mkdir()
    os.waitpid(fork(partial(write_run_inputs, inputs)), 0)
    kill_until(0, partial(sft_life, inputs, scratch / "whole", num_steps), scratch / "begun", 0.0)
    whole = load(scratch / "whole")
    kills, runs, identical = 0, 0, True
    while kills < num_kills:
        folder = scratch / f"killed{runs}"
        life = partial(sft_life, inputs, folder, num_steps)
        kills += kill_until(num_kills - kills, life, folder / "begun", 0.25)
        runs += 1
        identical &= same(whole, load(folder))
    return {"kills": kills, "runs": runs, "steps": num_steps, "bit_identical": identical}


def load(folder: Path) -> dict:
    checkpoint = torch.load(folder / LAST, weights_only=True)
    return {name: checkpoint[name] for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


# ---- reinforcement learning ----------------------------------------------------------------------------------------


class FileTransport(WeightTransport):
    def __init__(self, path: Path) -> None:
        self.path = path

    def push(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        for _ in tensors:
            pass
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text(str(version))
        unfinished.replace(self.path)


class NoServer:
    """In place of the sidecar: started, it serves version 0."""

    url, max_model_len = "http://127.0.0.1:0", 10**6

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self) -> None:
        self.path.write_text("0")

    def stop(self) -> None: ...

    def check_alive(self) -> None: ...


class Producing(Callback):
    """The real producer over the fake sampler and sandbox."""

    def __init__(self, inputs: Path, version: Path) -> None:
        self.inputs, self.version = inputs, version

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        tasks = [make_task(self.inputs / f"task{i}", name=f"task{i}") for i in range(5)]
        make_runner = partial(fake_runner, self.inputs / "tokenizer", self.inputs, self.version)
        failures = FailurePolicy(max_dispatches=1, redispatch_delay_s=0.01)
        spec = ProducerSpec(tasks, make_runner, group_size=2, max_concurrent_groups=4)
        self.producer = RolloutProducer(trainer.datamodule.queue, spec, failures)
        self.producer.start()
        trainer.datamodule.add_check(self.producer.check)

    def on_train_end(self, *_: object) -> None:
        self.producer.stop()


class Trained(Callback):
    """The independent book: which groups every step trained, one line a step; a repeated step's last line counts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        with self.path.open("a") as file:
            file.write(f"{trainer.global_step} {' '.join(str(group.group_id) for group in batch.groups)}\n")


def rl_life(inputs: Path, folder: Path, num_steps: int) -> None:
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    version = folder.parent / "version"
    queue = WindowedFIFOQueue(2, max_batches_ahead=2, window=2)
    sidecar = SidecarCallback(lambda model_dir, log_path: NoServer(version))
    sync = WeightSyncCallback(every_n_steps=2, transport=lambda url: FileTransport(version))
    module = CISPOModule(CISPOLoss(), checkpoint=inputs / "checkpoint", optimizer=lambda p: torch.optim.AdamW(p, 1e-4))
    trainer, resume = trainer_in(
        folder, num_steps, sidecar, sync, Producing(inputs, version), Trained(folder / "book.txt")
    )
    data = RolloutDataModule(queue, 2, max_row_tokens=4000, num_batches=num_steps, max_wait_s=60)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)


def write_rl_inputs(inputs: Path) -> None:
    write_run_inputs(inputs)
    config = NorthConfig.load(inputs / "model.json")
    save_checkpoint(NorthModel(config), inputs / "checkpoint", tokenizer_dir=inputs / "tokenizer")


def kill_rl(scratch: Path, num_kills: int, num_steps: int) -> dict:
    """Whether the ledger of the last checkpoint is the independent book's, after ``num_kills`` kills."""
    inputs = scratch / "inputs"
    inputs.mkdir()
    os.waitpid(fork(partial(write_rl_inputs, inputs)), 0)
    kills, runs, exact, dropped, trained = 0, 0, True, 0, 0
    while kills < num_kills:
        folder = scratch / f"killed{runs}"
        folder.mkdir()
        life = partial(rl_life, inputs, folder, num_steps)
        kills += kill_until(num_kills - kills, life, folder / "begun", 3.5)
        runs += 1
        ledger, book = read_ledger(folder), read_book(folder / "book.txt")
        exact &= sorted(book) == [group_id for group_id, end in ledger.items() if end == "trained"]
        exact &= len(book) == num_steps * 2
        trained += len(book)
        dropped += sum(end not in (None, "trained") for end in ledger.values())
    return {"kills": kills, "runs": runs, "trained": trained, "dropped": dropped, "ledger_exact": exact}


def read_ledger(folder: Path) -> dict[int, str | None]:
    state = torch.load(folder / LAST, weights_only=True)["RolloutDataModule"]["queue"]
    queue = WindowedFIFOQueue(2, max_batches_ahead=2, window=2)
    queue.load_state_dict(state)
    return {group_id: queue.end_of(group_id) for group_id in range(state["next_id"])}


def read_book(path: Path) -> list[int]:
    steps = dict(line.split(" ", 1) for line in path.read_text().splitlines())
    return [int(group_id) for groups in steps.values() for group_id in groups.split()]
