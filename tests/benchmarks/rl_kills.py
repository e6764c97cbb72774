"""Trainers killed with SIGKILL at random moments and resumed, until they have finished.

In: a function that trains from the last checkpoint to the end. Out: how often it was killed, where that struck, and
what it came to; anything that is not as it must be raises. Every life is a fork of this process, which has imported
everything and computed nothing.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rl_fakes import FAILS_EVERY, fake_runner
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

LAST, BEGUN, LOG, PUSHING, BOOK, ROLLOUTS = "last.ckpt", "begun", "log.txt", "pushing", "book.txt", "rollouts.pid"
UNFINISHED = f".{LAST}.writing"
MARK = "NORTH_LIGHTNING_KILLED_RUNS"
"""Environment variable that everything a life starts has, and by which it is found."""
PATIENCE_S = 30.0
GROUPS_PER_STEP = 2


# ---- killing -------------------------------------------------------------------------------------------------------


class Killer:
    """Forks lives in folders of ``scratch``, and kills them at random moments.

    ``struck`` counts the kills: ``kills`` in all, and of these ``in_a_checkpoint_write`` and ``in_a_push``;
    ``rollout_process_kills`` are beside them.
    """

    def __init__(self, scratch: Path, seed: int) -> None:
        self.scratch = scratch
        self.struck = Counter[str](kills=0)
        self.num_runs = 0
        self._noise = random.Random(seed)

    def run(self, life: Callable[[Path], None]) -> tuple[Path, float]:
        """A run that nobody kills: its folder, and the seconds it trained."""
        folder = self._folder()
        child = self._fork(life, folder)
        self._wait_for(folder / BEGUN, child)
        begun = time.monotonic()
        assert self._reap(child, folder), f"killed by somebody else, see {folder / LOG}"
        return folder, time.monotonic() - begun

    def run_killed(
        self, num_kills: int, life: Callable[[Path], None], longest_s: float, check: Callable[[Path], None]
    ) -> Path:
        """A run whose lives are killed up to ``longest_s`` after they have begun, ``num_kills`` times at most.

        ``check`` is called after every kill, and when the run has come to its end.
        """
        folder = self._folder()
        last = self.struck["kills"] + num_kills
        while True:
            for marker in (BEGUN, PUSHING, ROLLOUTS):
                (folder / marker).unlink(missing_ok=True)
            left_over = _written_at(folder / UNFINISHED)
            child = self._fork(life, folder)
            if self.struck["kills"] < last:
                self._strike(child, folder, longest_s)
            ended = self._reap(child, folder)
            if not ended:
                self.struck["kills"] += 1
                self.struck["in_a_checkpoint_write"] += _written_at(folder / UNFINISHED) != left_over
                self.struck["in_a_push"] += (folder / PUSHING).exists()
            check(folder)
            if ended:
                return folder

    def wait_for_orphans(self) -> None:
        """Raises if anything that the lives have started outlives them for long."""
        deadline = time.monotonic() + PATIENCE_S
        while left := list(self._orphans()):
            assert time.monotonic() < deadline, f"still alive: {left}"
            time.sleep(0.1)

    def _strike(self, child: int, folder: Path, longest_s: float) -> None:
        self._wait_for(folder / BEGUN, child)
        time.sleep(self._noise.uniform(0.0, longest_s))
        if (folder / ROLLOUTS).exists() and self._noise.random() < 0.25:
            with suppress(ProcessLookupError):  # the run has just come to its end
                os.kill(int((folder / ROLLOUTS).read_text()), signal.SIGKILL)
                self.struck["rollout_process_kills"] += 1
            time.sleep(self._noise.uniform(0.0, 2 * longest_s))  # it takes a while until there is another
        os.kill(child, signal.SIGKILL)

    def _folder(self) -> Path:
        folder = self.scratch / f"run{self.num_runs}"
        folder.mkdir()
        self.num_runs += 1
        return folder

    def _fork(self, life: Callable[[Path], None], folder: Path) -> int:
        child = os.fork()
        if child:
            return child
        try:
            log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            os.environ[MARK] = str(self.scratch)
            # A rollout process that is spawned here would run the main script's imports again, and needs none of them.
            vars(sys.modules["__main__"]).update(__file__=None, __spec__=None)
            life(folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _wait_for(self, path: Path, child: int) -> None:
        while not path.exists() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.002)

    def _reap(self, child: int, folder: Path) -> bool:
        """Whether the life has come to its end; False if it was killed."""
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL, f"a life was ended by signal {os.WTERMSIG(status)}"
            return False
        assert os.WEXITSTATUS(status) == 0, "a life ended with an error:\n" + (folder / LOG).read_text()[-5000:]
        return True

    def _orphans(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.scratch):
                    yield process
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue


def _written_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


@contextmanager
def marked(path: Path) -> Iterator[None]:
    """``path`` exists while the block runs, and after it if it is killed."""
    path.touch()
    yield
    path.unlink()


class Begun(Callback):
    """A file while this life trains."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, *_: object) -> None:
        self.path.touch()


def trainer_in(folder: Path, num_steps: int, *callbacks: Callback) -> tuple[Trainer, Path | None]:
    """A trainer that writes a checkpoint after every step, and the one to resume from."""
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    keep = ModelCheckpoint(dirpath=folder, filename="last", every_n_train_steps=1, enable_version_counter=False)
    everything = [Begun(folder / BEGUN), RunLock(), RandomState(), *callbacks, keep]
    trainer = quiet_trainer(folder, max_steps=num_steps, callbacks=everything, enable_checkpointing=True)
    trainer.strategy.checkpoint_io = DurableCheckpointIO()
    resume = folder / LAST
    return trainer, resume if resume.exists() else None


# ---- supervised fine-tuning ----------------------------------------------------------------------------------------


def kill_sft(scratch: Path, num_kills: int, num_steps: int, seed: int = 0) -> dict:
    """Runs of ``num_steps`` that are killed ``num_kills`` times in all end with the bits of one that is not."""
    started = time.monotonic()
    inputs = _inputs(scratch, write_run_inputs)
    killer = Killer(scratch, seed)
    life = partial(sft_life, inputs, num_steps)
    whole, seconds = killer.run(life)
    expected = _load(whole)
    assert expected["global_step"] == num_steps
    while killer.struck["kills"] < num_kills:
        folder = killer.run_killed(num_kills - killer.struck["kills"], life, seconds / 4, _load_if_there)
        differing = [name for name, value in _load(folder).items() if not same(value, expected[name])]
        assert not differing, f"{folder} differs in {differing}"
    killer.wait_for_orphans()
    return _figures(killer, num_steps, started) | {"runs_bit_identical_to_the_whole_one": killer.num_runs - 1}


def sft_life(inputs: Path, num_steps: int, folder: Path) -> None:
    trainer, resume = trainer_in(folder, num_steps)
    sources = {name: SFTSource([inputs / f"{name}.jsonl"], share=0.5) for name in ("names", "sums")}
    module = SFTModule(config=inputs / "model.json", tokenizer=inputs / "tokenizer")
    trainer.fit(module, SFTDataModule(inputs / "tokenizer", sources, 256), ckpt_path=resume, weights_only=True)


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
    """To ``FileSampler``; slow enough to be killed in the middle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def push(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        with marked(self.folder / PUSHING):
            for _ in tensors:
                time.sleep(0.0005)
            _write(self.folder / "version", version)


class NoServer:
    """In place of the sidecar: started, it serves version 0."""

    url, max_model_len = "http://127.0.0.1:0", 10**6

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self) -> None:
        _write(self.folder / "version", 0)

    def stop(self) -> None: ...

    def check_alive(self) -> None: ...


def _write(path: Path, version: int) -> None:
    unfinished = path.with_suffix(".new")
    unfinished.write_text(str(version))
    unfinished.replace(path)


class Producing(Callback):
    """The real producer over the fake sampler and sandbox."""

    def __init__(self, inputs: Path, folder: Path) -> None:
        self.inputs, self.folder = inputs, folder

    def on_train_start(self, trainer: Trainer, *_: object) -> None:
        tasks = [make_task(self.inputs / f"task{i}", name=f"task{i}") for i in range(5)]
        make_runner = partial(fake_runner, self.inputs / "tokenizer", self.inputs, self.folder / "version")
        failures = FailurePolicy(max_dispatches=1, redispatch_delay_s=0.01)
        spec = ProducerSpec(tasks, make_runner, group_size=2, max_concurrent_groups=4)
        self.producer = RolloutProducer(trainer.datamodule.queue, spec, failures)
        self.producer.start()
        (self.folder / ROLLOUTS).write_text(str(self.producer.child_pid))
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


def kill_rl(scratch: Path, num_kills: int, num_steps: int, seed: int = 0) -> dict:
    """The ledger of the checkpoint that a killed run resumes from is the independent book's, after every kill."""
    started = time.monotonic()
    inputs = _inputs(scratch, write_rl_inputs)
    killer, ends = Killer(scratch, seed), Counter[str]()
    life = partial(rl_life, inputs, num_steps)
    whole, seconds = killer.run(life)
    check_ledger(whole)
    while killer.struck["kills"] < num_kills:
        folder = killer.run_killed(num_kills - killer.struck["kills"], life, seconds / 4, check_ledger)
        assert _load(folder)["global_step"] == num_steps
        ends.update(end or "pending" for end in read_ledger(folder).values())
    killer.wait_for_orphans()
    return _figures(killer, num_steps, started) | {"groups_of_killed_runs": dict(ends), "ledgers_not_exact": 0}


def rl_life(inputs: Path, num_steps: int, folder: Path) -> None:
    queue = WindowedFIFOQueue(GROUPS_PER_STEP, max_batches_ahead=2, window=2)
    sidecar = SidecarCallback(lambda model_dir, log_path: NoServer(folder))
    sync = WeightSyncCallback(every_n_steps=2, transport=lambda urls: FileTransport(folder))
    trainer, resume = trainer_in(folder, num_steps, sidecar, sync, Producing(inputs, folder), Trained(folder / BOOK))
    module = CISPOModule(CISPOLoss(), checkpoint=inputs / "checkpoint", optimizer=lambda p: torch.optim.AdamW(p, 1e-4))
    data = RolloutDataModule(queue, GROUPS_PER_STEP, max_row_tokens=4000, num_batches=num_steps, max_wait_s=60)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)


def write_rl_inputs(inputs: Path) -> None:
    write_run_inputs(inputs)
    config = NorthConfig.load(inputs / "model.json")
    save_checkpoint(NorthModel(config), inputs / "checkpoint", tokenizer_dir=inputs / "tokenizer")


def check_ledger(folder: Path) -> None:
    """Every group that the ledger calls trained is in the book once, up to the checkpoint's step, and no other; the
    reasons of the others are those that were planned."""
    if not (folder / LAST).exists():
        return
    step, ledger = _load(folder)["global_step"], read_ledger(folder)
    lines = dict(line.split(" ", 1) for line in (folder / BOOK).read_text().splitlines())
    book = [int(group_id) for number, groups in lines.items() if int(number) <= step for group_id in groups.split()]
    trained = [group_id for group_id, end in ledger.items() if end == "trained"]
    assert sorted(book) == trained, f"{folder}, step {step}: the book has {sorted(book)}, the ledger {trained}"
    assert len(trained) == GROUPS_PER_STEP * step
    for group_id, end in ledger.items():
        planned = (None, "child_died", "VerifierError" if group_id % FAILS_EVERY == 0 else "trained")
        assert end in planned, f"{folder}, step {step}: group {group_id} ended as {end}"


def read_ledger(folder: Path) -> dict[int, str | None]:
    """What became of every group; None: nothing yet."""
    state = torch.load(folder / LAST, weights_only=True)["RolloutDataModule"]["queue"]
    queue = WindowedFIFOQueue(GROUPS_PER_STEP, max_batches_ahead=2, window=2)
    queue.load_state_dict(state)
    return {group_id: queue.end_of(group_id) for group_id in range(state["next_id"])}


# ---- both ----------------------------------------------------------------------------------------------------------


def _inputs(scratch: Path, write: Callable[[Path], object]) -> Path:
    """Written by a process of its own: this one must not have computed anything when it forks."""
    inputs = scratch / "inputs"
    inputs.mkdir()
    child = os.fork()
    if child == 0:
        write(inputs)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "the inputs could not be written, see above"
    return inputs


def _load(folder: Path) -> dict:
    checkpoint = torch.load(folder / LAST, weights_only=True)
    return {name: checkpoint[name] for name in ("global_step", "state_dict", "optimizer_states", "lr_schedulers")}


def _load_if_there(folder: Path) -> None:
    if (folder / LAST).exists():
        _load(folder)


def _figures(killer: Killer, num_steps: int, started: float) -> dict:
    runs = {"killed_runs": killer.num_runs - 1, "steps_of_a_run": num_steps, "orphans": 0}
    return dict(killer.struck) | runs | {"seconds": round(time.monotonic() - started)}
