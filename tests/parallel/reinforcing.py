"""Reinforcement learning in the processes of one launch: the whole loop but for the sampler, on recorded rollouts."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import as_torchrun_would
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from small_runs import quiet_trainer
from torch import Tensor

from north_lightning.callbacks import JSONLHistory, SaveOnTermination, SidecarCallback, Throughput, WeightSyncCallback
from north_lightning.data import RolloutDataModule
from north_lightning.errors import InfrastructureError, SidecarError, WeightPushError
from north_lightning.interfaces import WeightTransport
from north_lightning.losses import CISPOLoss
from north_lightning.modules import CISPOModule, WarmupSchedule
from north_lightning.parallel import NorthStrategy
from north_lightning.rollout import WindowedFIFOQueue
from north_lightning.rollout.advantages import rloo_advantages
from north_lightning.types import Reward, Rollout, RolloutGroup

STRATEGIES: dict[str, dict[str, Any] | None] = {
    "one process": None,
    "replicate": {"replicate": 2},
    "shard": {"shard": 2},
    "expert": {"shard": 2, "expert": 2},
    "context": {"context": 2},
}
GROUPS_PER_BATCH, GROUP_SIZE, PUSHED_EVERY, SAVED_AT, LAST = 2, 4, 2, 3, 5


class Recorded(WindowedFIFOQueue):
    """Every slot holds a group at once, and the same under the same id; only process 0's is ever looked at."""

    def __init__(self) -> None:
        super().__init__(GROUPS_PER_BATCH, max_batches_ahead=1)
        self.calls = 0

    def take(self, num_groups: int) -> list[RolloutGroup] | None:
        self.calls += 1
        while (group_id := self.admit()) is not None:
            self.complete(recorded_group(group_id))
        return super().take(num_groups)

    def release(self, group_ids: Iterable[int]) -> None:
        self.calls += 1
        super().release(group_ids)


def recorded_group(group_id: int) -> RolloutGroup:
    """Of several lengths; the batch of groups 2 and 3 has a single rollout with an advantage, and so a single row."""
    generator = random.Random(group_id)
    rewards = [float(generator.random() < 0.5) for _ in range(GROUP_SIZE)]
    advantages = {2: [0.0] * GROUP_SIZE, 3: [0.0, 0.0, 1.0, 0.0]}.get(group_id, rloo_advantages(rewards))
    environment = ("terminal", "swe")[group_id % 3 == 0]
    group = RolloutGroup(group_id, f"task{group_id}", environment, [])
    for index, (reward, advantage) in enumerate(zip(rewards, advantages, strict=True)):
        length = generator.randrange(20, 60)
        rollout = Rollout(group.task_id, environment, "family", group_id, index, 0, advantage=advantage)
        rollout.token_ids = [generator.randrange(10, 390) for _ in range(length)]
        rollout.loss_mask = [place > 8 and generator.random() < 0.7 for place in range(length)]
        rollout.rollout_logprobs = [generator.gauss(-6.0, 1.0) for _ in range(length)]
        rollout.policy_versions = [0 if trained else -1 for trained in rollout.loss_mask]
        rollout.reward = Reward(reward)
        group.rollouts.append(rollout)
    return group


class FakeSidecar:
    """Nothing runs; the first that is started dies when told to."""

    url, vocab_size, started, first_dies = "http://127.0.0.1:1", None, 0, False
    can_return_routed_experts = False

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def start(self) -> None:
        self.started += 1
        if self.error is not None:
            raise self.error

    def check_alive(self) -> str:
        if self.first_dies and self.started == 1:
            raise SidecarError("the vLLM sidecar was killed by SIGKILL")
        return ""

    def stop(self, timeout_s: float = 10.0) -> None: ...


class FakeTransport(WeightTransport):
    """Keeps what was pushed; fails the first ``num_failing`` times, in the middle of the tensors."""

    def __init__(self, num_failing: int = 0) -> None:
        self.num_failing = num_failing
        self.pushed: dict[int, dict[str, Tensor]] = {}

    def push(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        content = {}
        for index, (name, tensor) in enumerate(tensors):
            if index == 5 and self.num_failing:
                self.num_failing -= 1
                raise WeightPushError("not confirmed")
            content[name] = tensor.detach().clone()
        self.pushed[version] = content


class Run:
    """One run on a strategy; what it leaves behind."""

    def __init__(self, inputs: Path, folder: Path, strategy: dict[str, Any] | None) -> None:
        self.inputs, self.folder, self.strategy = inputs, folder, strategy
        self.queue, self.transport, self.sidecar = Recorded(), FakeTransport(), FakeSidecar()
        self.sync = WeightSyncCallback(PUSHED_EVERY, lambda url: self.transport, max_policy_lag=LAST)
        self.max_wait_s = 60.0

    def fit(self, *callbacks: Callback, ckpt_path: Path | None = None) -> None:
        seed_everything(3, verbose=False)
        module = CISPOModule(
            loss=CISPOLoss(1.5),
            checkpoint=self.inputs / "start",
            tokenizer=self.inputs / "tokenizer",
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4),
            lr_scheduler=lambda optimizer: WarmupSchedule(optimizer, warmup_steps=3),
            max_grad_norm=0.5,
        )
        trainer = quiet_trainer(
            self.folder,
            devices=1 if self.strategy is None else dist.get_world_size(),
            strategy="auto" if self.strategy is None else NorthStrategy(**self.strategy),
            max_steps=LAST,
            logger=JSONLHistory(self.folder),
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            callbacks=[
                SidecarCallback(lambda *_: self.sidecar, look_every_s=0.01),
                self.sync,
                Throughput(),
                *callbacks,
            ],
        )
        data = RolloutDataModule(self.queue, GROUPS_PER_BATCH, 120, 1000, max_wait_s=self.max_wait_s)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        module.save_hf(self.folder / "checkpoint")

    def left(self) -> dict[str, Any]:
        return {
            "pushed": {
                version: {name: tensor.numpy() for name, tensor in tensors.items()}
                for version, tensors in self.transport.pushed.items()
            },
            "published_at": self.sync.published_at,
            "trained": self.queue.stats()["trained"],
            "calls": self.queue.calls,
            "started": self.sidecar.started,
        }


def one_process(inputs: Path, folder: Path) -> dict[str, Any]:
    run = Run(inputs, folder / "one process", None)
    run.fit()
    return run.left()


def everything(inputs: Path, folder: Path) -> dict[str, Any]:
    """What each run leaves behind, by name; and what each fault raises."""
    as_torchrun_would()
    results = {}
    saver = ModelCheckpoint(folder, "saved", every_n_train_steps=SAVED_AT, save_top_k=-1)
    for name, strategy in STRATEGIES.items():
        if strategy is not None:
            run = Run(inputs, folder / name, strategy)
            run.transport.num_failing = 1
            run.fit(*[saver] if name == "shard" else [])
            results[name] = run.left()
    resumed = Run(inputs, folder / "resumed", STRATEGIES["context"])
    resumed.fit(ckpt_path=folder / "saved.ckpt")
    results["resumed"] = resumed.left()
    restarted = Run(inputs, folder / "restarted", STRATEGIES["shard"])
    kill_while_waited_for(restarted)
    restarted.fit()
    results["restarted"] = restarted.left()
    results["raised"] = {name: raised(inputs, folder / "faults", fault) for name, fault in FAULTS.items()}
    return results


def kill_while_waited_for(run: Run) -> None:
    """After three steps the queue stays empty until weights are pushed again."""
    take = run.queue.take

    def take_later(num_groups: int) -> list[RolloutGroup] | None:
        if run.queue.stats()["trained"] == 3 * GROUPS_PER_BATCH and 2 not in run.transport.pushed:
            run.sidecar.first_dies = True
            return None
        return take(num_groups)

    run.queue.take = take_later  # type: ignore[method-assign]


# ---- faults of process 0 ---------------------------------------------------------------------------------------------


class DeadProducer(Callback):
    """Stands where the producer's callback stands: process 0 alone has a producer."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def check() -> None:
            raise InfrastructureError("the rollout process was killed by SIGKILL (exit code -9)")

        if trainer.is_global_zero:
            trainer.datamodule.add_check(check)


class Unpicklable(InfrastructureError):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def never_filled(run: Run) -> None:
    run.queue.take = lambda num_groups: None  # type: ignore[method-assign]
    run.max_wait_s = 0.3


def dead_producer(run: Run) -> Callback:
    never_filled(run)
    return DeadProducer()


def no_push(run: Run) -> None:
    run.transport.num_failing = 100


def too_old(run: Run) -> None:
    run.sync.max_policy_lag = 2


def no_sidecar(run: Run) -> None:
    run.sidecar.error = SidecarError("the vLLM sidecar ended with exit code 1")


def odd_error(run: Run) -> None:
    run.sidecar.error = Unpicklable("this", "that")


class InterruptsProcessZero(SaveOnTermination):
    """As it does where a terminal sends it to one process first."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and trainer.global_step == 2:
            signal.raise_signal(signal.SIGINT)


def interrupted(run: Run) -> Callback:
    return InterruptsProcessZero()


FAULTS: dict[str, Callable[[Run], Callback | None]] = {
    fault.__name__: fault
    for fault in (never_filled, dead_producer, no_push, too_old, no_sidecar, odd_error, interrupted)
}


def raised(inputs: Path, folder: Path, fault: Callable[[Run], Callback | None]) -> tuple[str, str]:
    """The class and the text of the error that this process ends with."""
    run = Run(inputs, folder, STRATEGIES["shard"])
    callback = fault(run)
    try:
        run.fit(*[] if callback is None else [callback])
    except (Exception, SIGTERMException) as error:
        return type(error).__name__, str(error)
    return "nothing", ""
