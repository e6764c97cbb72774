"""How much slower a train step is while 256 rollouts are in flight in the rollout process.

    python tests/benchmarks/bench_in_flight.py [--output runs/bench/in_flight.json]

A step is forward, CISPO and backward of a quickstart-size model on one thread, of groups that the rollout process has
made and the real queue has handed out. Sampler, sandbox and verdict are asleep, since two cores cannot generate for
256; chat format, attempt loop, journal, pickling, queue and records are real. Rounds with sampling suspended and with
256 rollouts in flight alternate; a ratio is that of a round and the mean of its neighbours. Trainer and rollout process
are pinned to a core each, or the kernel's choices are measured. The machine must be idle.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from statistics import fmean, median, quantiles

import psutil
import torch

sys.path.extend([str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "rollout")])
from bench_weight_push import QUICKSTART
from rl_fakes import sleeping_runner
from rollout_fakes import make_task, make_tokenizer
from small_runs import quiet_trainer

from north_lightning.data.batches import pack_rollouts
from north_lightning.data.rollouts import make_step
from north_lightning.losses import CISPOLoss
from north_lightning.model import NorthConfig, NorthModel, save_checkpoint
from north_lightning.modules import CISPOModule
from north_lightning.rollout import ProducerSpec, RolloutProducer, WindowedFIFOQueue
from north_lightning.rollout.accounts import SamplerAccounts
from north_lightning.types import RolloutBatch

GROUP_SIZE, NUM_GROUPS, GROUPS_PER_BATCH = 8, 32, 4  # 256 rollouts in flight
NUM_TURNS, WORDS_PER_TURN, TURN_S = 8, 40, 1.0
NUM_ROUNDS, ROUND_S = 7, 12.0
SETTLE_S = {False: 2.0, True: 10.0}  # longer than a rollout takes: they begin at the same time and have to spread
TRAINER_CORE, CHILD_CORE = 0, 1


class Loop:
    """Trains on the same batch over and over, and takes what the queue hands out between two steps, as training does.

    The same batch, so that two steps differ in nothing but what goes on beside them.
    """

    def __init__(self, folder: Path) -> None:
        tokenizer = make_tokenizer(folder)
        tasks = [make_task(folder / f"task{i}", max_turns=NUM_TURNS, name=f"task{i}") for i in range(5)]
        make_runner = partial(sleeping_runner, folder, NUM_TURNS, WORDS_PER_TURN, TURN_S)
        slots = NUM_GROUPS // GROUPS_PER_BATCH + 12  # what completes in a step waits beside those in flight
        self.queue = WindowedFIFOQueue(GROUPS_PER_BATCH, slots - 1, window="unbounded")
        spec = ProducerSpec(tasks, make_runner, GROUP_SIZE, NUM_GROUPS)
        self.producer = RolloutProducer(self.queue, spec, rollouts_path=folder / "rollouts.jsonl")
        self.accounts = SamplerAccounts(1, time.monotonic())
        self.events = []
        self.producer.listen(self.events.append)
        save_checkpoint(
            NorthModel(NorthConfig(**QUICKSTART | {"eos_token_id": tokenizer.eos_id})), folder / "checkpoint"
        )
        self.module = CISPOModule(loss=CISPOLoss(), checkpoint=folder / "checkpoint", tokenizer=folder)
        self.module.trainer = quiet_trainer(folder)
        self.module.configure_model()
        self.num_groups = self.num_tokens = 0
        self.row: RolloutBatch | None = None

    def take(self) -> bool:
        """One batch off the queue; packed, as the data module packs it."""
        groups = self.queue.take(GROUPS_PER_BATCH)
        if groups is None:
            return False
        made = make_step(groups, 65_536)
        if self.row is None:
            self.row = pack_rollouts(groups[0].rollouts[:1], made.num_trained_tokens)
        self.num_groups += len(groups)
        self.num_tokens += made.num_tokens
        self.queue.release([group.group_id for group in groups])
        events, self.events[:] = list(self.events), []
        self.accounts.add(events)
        return True

    def take_all(self) -> None:
        while self.take():
            pass

    def train(self, row) -> float:
        started = time.perf_counter()
        self.module.policy_loss(row).loss.backward()
        self.module.zero_grad()
        return time.perf_counter() - started

    def cpu_of_thread(self) -> float:
        """CPU seconds of the thread that feeds and hears the rollout process."""
        (number,) = (thread.native_id for thread in threading.enumerate() if thread.name == "rollout-producer")
        return sum(one.user_time + one.system_time for one in psutil.Process().threads() if one.id == number)

    def round(self, in_flight: bool, row) -> dict:
        """Seconds per step, and how many rollouts were in flight meanwhile."""
        (self.producer.resume if in_flight else self.producer.suspend)()
        settled = time.monotonic() + SETTLE_S[in_flight]
        while time.monotonic() < settled or (in_flight and self.producer.stats()["running"] < NUM_GROUPS):
            self.train(row)
            self.take_all()
        child = psutil.Process(self.producer.child_pid)
        steps, running, groups = [], [], self.num_groups
        used, used_by_thread = sum(child.cpu_times()[:2]), self.cpu_of_thread()
        started = time.monotonic()
        while time.monotonic() < started + ROUND_S:
            steps.append(self.train(row))
            running.append(self.producer.stats()["running"] * GROUP_SIZE)
            self.take_all()
        seconds = time.monotonic() - started
        return {
            "step_s": fmean(steps),
            "step_p90_s": quantiles(steps, n=10)[-1],
            "rollouts_in_flight": fmean(running),
            "groups_per_s": (self.num_groups - groups) / seconds,
            "child_cores": (sum(child.cpu_times()[:2]) - used) / seconds,
            "thread_cores": (self.cpu_of_thread() - used_by_thread) / seconds,
        }


def measure(folder: Path) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    loop = Loop(folder)
    os.sched_setaffinity(0, {TRAINER_CORE})  # of this thread and those that it starts
    loop.producer.start()
    for thread in psutil.Process(loop.producer.child_pid).threads():
        os.sched_setaffinity(thread.id, {CHILD_CORE})
    try:
        while not loop.take():
            loop.producer.check()
            time.sleep(0.1)
        row = loop.row
        rounds = [loop.round(bool(index % 2), row) for index in range(NUM_ROUNDS)]
    finally:
        loop.producer.stop()
    alone, beside = rounds[::2], rounds[1::2]
    ratios = [
        one["step_s"] / fmean([before["step_s"], after["step_s"]])
        for one, before, after in zip(beside, alone, alone[1:], strict=False)
    ]
    assert min(one["rollouts_in_flight"] for one in beside) > 0.9 * GROUP_SIZE * NUM_GROUPS
    return {
        "row_tokens": len(row.token_ids),
        "rollouts_in_flight": round(fmean(one["rollouts_in_flight"] for one in beside)),
        "rollouts_per_s": round(fmean(one["groups_per_s"] for one in beside) * GROUP_SIZE, 1),
        "tokens_per_rollout": round(loop.num_tokens / loop.num_groups / GROUP_SIZE),
        "child_cores": round(fmean(one["child_cores"] for one in beside), 2),
        "producer_thread_cores": round(fmean(one["thread_cores"] for one in beside), 4),
        "step_ms_alone": round(1000 * fmean(one["step_s"] for one in alone), 1),
        "step_ms_beside": round(1000 * fmean(one["step_s"] for one in beside), 1),
        "step_p90_ms_alone": round(1000 * fmean(one["step_p90_s"] for one in alone), 1),
        "step_p90_ms_beside": round(1000 * fmean(one["step_p90_s"] for one in beside), 1),
        "slowdown_median": round(median(ratios), 4),
        "slowdown_of_rounds": [round(ratio, 4) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("runs/bench/in_flight.json"))
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
