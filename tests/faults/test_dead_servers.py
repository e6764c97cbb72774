"""A server dies inside a long optimizer step: found, replaced, and given the right weights, at no group's cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_trials import GROUPS_PER_BATCH, BookedQueue, PlannedSidecar, Producing, balance, play_script
from lightning.pytorch import Callback, Trainer
from small_runs import quiet_trainer

from north_lightning.callbacks import SidecarCallback, WeightSyncCallback
from north_lightning.data import RolloutDataModule
from north_lightning.faults import FakeVLLM, FaultPlan
from north_lightning.losses import CISPOLoss
from north_lightning.modules import CISPOModule
from north_lightning.sampling.client import GENERATE_PATH

STRUCK_AT, NUM_STEPS, PATIENCE = 3, 8, 20.0


class LongStep(Callback):
    """In one step the server is struck while groups are with it; the step goes on until another one is up."""

    def __init__(self, servers: list[FakeVLLM], strike: Callable[[FakeVLLM], None], producing: Producing) -> None:
        self.servers, self.strike, self.producing = servers, strike, producing
        self.trained: list[list[int]] = []
        self.versions: list[set[int]] = []  # of the tokens of each step

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append([group.group_id for group in batch.groups])
        rollouts = [rollout for group in batch.groups for rollout in group.rollouts]
        self.versions.append({version for rollout in rollouts for version in rollout.policy_versions if version >= 0})
        if trainer.global_step == STRUCK_AT:
            self.in_flight = self.producing.producer.stats()["running"]
            self.strike(self.servers[0])
            while len(self.servers) < 2 or not self.servers[1].is_alive:
                time.sleep(0.01)
            self.pushed_in_step = "/start_weight_update" in self.servers[1].routes


@pytest.mark.parametrize("strike", [FakeVLLM.kill, FakeVLLM.hang])
def test_a_server_that_dies_in_a_long_step_costs_no_group_and_serves_the_right_version_after_it(
    strike: Callable[[FakeVLLM], None], inputs: Path, tmp_path: Path
) -> None:
    play_script(inputs)
    plan, servers = FaultPlan(tmp_path / "faults"), list[FakeVLLM]()
    queue = BookedQueue(groups_per_batch=GROUPS_PER_BATCH, max_batches_ahead=2, window=4)
    producing = Producing(inputs, plan, PATIENCE)
    long_step = LongStep(servers, strike, producing)
    sync = WeightSyncCallback(every_n_steps=2)
    sidecar = SidecarCallback(partial(PlannedSidecar, plan, servers), look_every_s=0.01)
    module = CISPOModule(CISPOLoss(), checkpoint=inputs / "checkpoint", optimizer=lambda p: torch.optim.AdamW(p, 1e-4))
    data = RolloutDataModule(queue, GROUPS_PER_BATCH, max_row_tokens=4000, num_batches=NUM_STEPS)
    callbacks = [sidecar, sync, producing, long_step]
    quiet_trainer(tmp_path, max_steps=NUM_STEPS, callbacks=callbacks).fit(module, data)

    assert balance(queue, long_step.trained) == {}
    assert queue.book["dropped"] == []
    stats = producing.stats
    assert sum(count for name, count in stats.items() if name.startswith("failures/")) <= long_step.in_flight
    assert len(servers) == 2
    assert not long_step.pushed_in_step  # only the trainer's thread has the weights
    first_asked = servers[1].routes.index(GENERATE_PATH)
    assert servers[1].routes.index("/finish_weight_update") < first_asked
    assert servers[1].version == str(sync.version)
    assert sync.published_at[2] == sync.published_at[3] == STRUCK_AT + 1  # after the restart, and because it was due
    assert max(set().union(*long_step.versions)) >= 3
    assert servers[1].num_torn_answers == 0
