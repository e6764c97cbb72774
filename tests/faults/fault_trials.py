"""Runs over the fakes of ``north_lightning.faults``: planned faults in the real trainer, producer, queue and push.

In: a seed. Out: what has struck, what the run says of it, and what an independent book says of every group. Imported by
the tests, by the benchmark, and by the rollout processes of both.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

sys.path.extend([str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "rollout")])
from faulty_runner import faulty_runner
from rollout_fakes import answer, call, load_chat, make_task, numbered
from scripted_vllm import play, reply
from small_runs import quiet_trainer, write_run_inputs

from north_lightning.callbacks import SidecarCallback, WeightSyncCallback
from north_lightning.data import RolloutDataModule
from north_lightning.faults import FakeSidecar, FakeVLLM, FaultPlan
from north_lightning.losses import CISPOLoss
from north_lightning.model import NorthConfig, NorthModel, save_checkpoint
from north_lightning.modules import CISPOModule
from north_lightning.rollout import FailurePolicy, ProducerSpec, RolloutProducer, Timeouts, WindowedFIFOQueue
from north_lightning.sampling.transport import SharedMemoryTransport
from north_lightning.seeds import derive_seed
from north_lightning.types import RolloutGroup

GROUPS_PER_BATCH, GROUP_SIZE, PUSH_EVERY_K, NUM_SERVERS = 4, 4, 2, 2
RATES = {
    "request_cut": 0.016,
    "request_hangs": 0.002,
    "request_refused": 0.014,
    "request_slow": 0.014,
    "logprob_nan": 0.01,
    "logprob_clamped": 0.01,
    "version_of_another": 0.012,
    "answer_truncated": 0.012,
    "answer_garbled": 0.012,
    "push_fails": 0.2,
    "push_hangs": 0.04,
    "sandbox_cannot_start": 0.03,
    "sandbox_hangs": 0.002,
    "verifier_raises": 0.012,
    "verifier_hangs": 0.002,
    "verifier_nan": 0.006,
    "verifier_wrong_type": 0.006,
    "verifier_ends_process": 0.001,
    "verifier_blocks_process": 0.0003,
    "server_killed": 0.04,
    "server_hangs": 0.02,
}
"""Share of the calls that a kind of fault strikes: of requests, pushes, sandboxes, verifications, optimizer steps."""
CAUSES = {"SamplerError", "NonFiniteError", "SandboxError", "VerifierError", "child_died"}
"""Under which the runs may count failures. Anything else would be a bug, or a cause that is not told apart."""
STAGES_S = {"open_s": 1.0, "sample_s": 2.0, "act_s": 2.0, "snapshot_s": 5.0, "verify_s": 1.0, "close_s": 5.0}
REQUEST_S, HEARTBEAT_S = 1.5, 5.0


def write_trial_inputs(folder: Path) -> None:
    """Checkpoint, tokenizer and five tasks."""
    write_run_inputs(folder)
    torch.manual_seed(0)
    model = NorthModel(NorthConfig.load(folder / "model.json"))
    save_checkpoint(model, folder / "checkpoint", tokenizer_dir=folder / "tokenizer")
    for index in range(5):
        make_task(folder / f"task{index}", name=f"task{index}")


def play_script(inputs: Path) -> None:
    """What ``scripted_vllm.reply`` says from now on: one call and an answer, or the answer at once."""
    chat = load_chat(inputs / "tokenizer")
    play([chat.encode_action(numbered(action, turn)) for turn, action in enumerate((call("one"), answer()))])


def train_while(
    queue: WindowedFIFOQueue, producer: RolloutProducer, goes_on: Callable[[int], bool]
) -> list[RolloutGroup]:
    """A trainer that is never busy: takes batches as soon as they are there; asks with the number of groups so far."""
    trained: list[RolloutGroup] = []
    while goes_on(len(trained)):
        producer.check()
        batch = queue.take(queue.groups_per_batch)
        if batch is None:
            time.sleep(0.01)
            continue
        queue.release([group.group_id for group in batch])
        trained += batch
    return trained


class AllNaN(FakeVLLM):
    """Every answer has a log-probability that is not a number."""

    def choice(self, request: Mapping[str, Any]) -> dict[str, Any]:
        choice = super().choice(request)
        choice["logprobs"]["content"][0]["logprob"] = float("nan")
        return choice


class PlannedSidecar(FakeSidecar):
    """Keeps every server there was in ``all``."""

    def __init__(self, plan: FaultPlan, all: list[FakeVLLM], model_dir: Path, log_path: Path) -> None:
        super().__init__(model_dir, log_path, max_model_len=2000)
        self.plan, self.all = plan, all

    def make_server(self, port: int) -> FakeVLLM:
        self.all.append(FakeVLLM(reply, self.plan, port, f"server {len(self.all)}", delay_s=0.005))
        return self.all[-1]


class BookedQueue(WindowedFIFOQueue):
    """Writes down, beside its own ledger, what it was told."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.book: dict[str, list[Any]] = {"admitted": [], "dropped": [], "released": []}

    def admit(self) -> int | None:
        group_id = super().admit()
        if group_id is not None:
            self.book["admitted"].append(group_id)
        return group_id

    def drop(self, group_id: int, reason: str) -> None:
        super().drop(group_id, reason)
        self.book["dropped"].append((group_id, reason))

    def release(self, group_ids: Iterable[int]) -> None:
        ids = list(group_ids)
        super().release(ids)
        self.book["released"] += ids


class Producing(Callback):
    """The real producer; its numbers are kept when training ends."""

    def __init__(self, inputs: Path, plan: FaultPlan, patience: float) -> None:
        self.inputs, self.plan, self.patience = inputs, plan, patience
        self.stats: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        sidecar = next(callback for callback in trainer.callbacks if isinstance(callback, SidecarCallback))
        tasks = [make_task(self.inputs / f"task{index}", name=f"task{index}") for index in range(5)]
        timeouts = Timeouts(**{name: seconds * self.patience for name, seconds in STAGES_S.items()})
        tokenizer = self.inputs / "tokenizer"
        make_runner = partial(faulty_runner, tokenizer, sidecar.urls, self.plan, REQUEST_S * self.patience, timeouts)
        spec = ProducerSpec(tasks, make_runner, GROUP_SIZE, max_concurrent_groups=8, seed=self.plan.seed)
        failures = FailurePolicy(
            redispatch_delay_s=0.02,
            max_consecutive_drops=20,
            max_child_restarts=6,
            heartbeat_timeout_s=HEARTBEAT_S * self.patience,
        )
        self.producer = RolloutProducer(trainer.datamodule.queue, spec, failures)
        self.producer.start()
        sidecar.stop_before(self.producer.stop)
        sidecar.around_restart(self.producer.suspend, self.producer.resume)
        trainer.datamodule.add_check(self.producer.check)

    def on_train_end(self, *_: Any) -> None:
        self.producer.stop()
        self.stats = dict(self.producer.stats())

    def on_exception(self, *_: Any) -> None:
        if hasattr(self, "producer"):
            self.producer.stop()


class Saboteur(Callback):
    """Kills or hangs a server after a planned step: after the sidecar was looked at, and before weights are pushed."""

    def __init__(self, plan: FaultPlan, servers: list[FakeVLLM], watchdog_s: float | None) -> None:
        self.plan, self.servers, self.watchdog_s = plan, servers, watchdog_s
        self.trained: list[list[int]] = []
        self.longest_step_s, self._last = 0.0, time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append([group.group_id for group in batch.groups])
        now = time.monotonic()
        self.longest_step_s, self._last = max(self.longest_step_s, now - self._last), now
        if self.watchdog_s is not None:
            faulthandler.dump_traceback_later(self.watchdog_s, exit=True)
        alive = [server for server in self.servers if server.is_alive]
        fault = self.plan.strike(("server_killed", "server_hangs"), trainer.global_step)
        if fault is not None and alive:
            server = alive[derive_seed(self.plan.seed, trainer.global_step) % len(alive)]
            server.kill() if fault == "server_killed" else server.hang()


def run_trial(
    inputs: Path,
    folder: Path,
    seed: int,
    num_steps: int,
    rates: Mapping[str, float] = RATES,
    patience: float = 1.0,
    watchdog_s: float | None = None,
) -> dict[str, Any]:
    """One run of ``num_steps`` optimizer steps under planned faults: what struck, and what became of the groups.

    ``patience`` multiplies every limit of time. ``watchdog_s`` ends the process, with every thread's stack, when an
    optimizer step takes longer.
    """
    play_script(inputs)
    plan = FaultPlan(folder / "faults", seed, rates, lasting=0.3)
    servers: list[FakeVLLM] = []
    queue = BookedQueue(groups_per_batch=GROUPS_PER_BATCH, max_batches_ahead=2, window=4)
    saboteur, producing = Saboteur(plan, servers, watchdog_s), Producing(inputs, plan, patience)
    transport = partial(SharedMemoryTransport, timeout_s=REQUEST_S * patience, max_staged_gib=2e-5)
    callbacks = [
        SidecarCallback(
            partial(PlannedSidecar, plan, servers), max_restarts=6, environments=[{}] * NUM_SERVERS, look_every_s=0.02
        ),
        saboteur,
        WeightSyncCallback(PUSH_EVERY_K, transport, num_retries=6),
        producing,
    ]
    if watchdog_s is not None:
        faulthandler.dump_traceback_later(watchdog_s, exit=True)
    seed_everything(seed, verbose=False)
    module = CISPOModule(CISPOLoss(), checkpoint=inputs / "checkpoint", optimizer=lambda p: torch.optim.AdamW(p, 1e-4))
    data = RolloutDataModule(queue, GROUPS_PER_BATCH, max_row_tokens=4000, num_batches=num_steps, max_wait_s=100)
    quiet_trainer(folder, max_steps=num_steps, callbacks=callbacks).fit(module, data)
    if watchdog_s is not None:
        faulthandler.cancel_dump_traceback_later()

    kinds = ("failures/", "retried/")
    counts = {name: int(count) for name, count in producing.stats.items() if name.startswith(kinds)}
    return {
        "struck": dict(plan.struck()),
        "wrong": balance(queue, saboteur.trained),
        "torn_answers": sum(server.num_torn_answers for server in servers),
        "counts": counts,
        "trained": sum(map(len, saboteur.trained)),
        "dropped": dict(Counter(reason for _, reason in queue.book["dropped"])),
        "longest_step_s": saboteur.longest_step_s,
    }


def balance(queue: BookedQueue, trained: list[list[int]]) -> dict[str, int]:
    """What is wrong, by kind, with how the groups have ended: each that was admitted is trained once, dropped once with
    a cause, or pending, and the queue's ledger says the same. Empty in a sound system."""
    steps = [group_id for step in trained for group_id in step]
    dropped = dict(queue.book["dropped"])
    pending = set(queue.state_dict()["pending"])
    admitted = queue.book["admitted"]
    ends = Counter([*steps, *(group_id for group_id, _ in queue.book["dropped"]), *pending])
    expected = {**dict.fromkeys(pending), **dropped, **dict.fromkeys(steps, "trained")}
    wrong = Counter(
        trained_twice=len(steps) - len(set(steps)),
        ended_twice=sum(count > 1 for count in ends.values()),
        lost=len(set(admitted) - ends.keys()),
        never_admitted=len(ends.keys() - set(admitted)),
        id_dealt_twice=len(admitted) - len(set(admitted)),
        dropped_without_cause=sum(reason not in CAUSES for reason in dropped.values()),
        released_but_not_trained=len(set(queue.book["released"]) ^ set(steps)),
        ledger_differs=sum(queue.end_of(group_id) != expected.get(group_id) for group_id in admitted),
    )
    return dict(+wrong)
