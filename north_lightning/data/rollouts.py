"""Batches for reinforcement learning: groups out of the rollout queue, packed into rows, dealt out to processes.

In: a ``RolloutQueue`` that a producer fills. Out: one ``RolloutStep`` per optimizer step. The queue's order is its own;
slots are freed by whoever trained the step (``RolloutDataModule.release``). Nothing here samples or scores.

Where several processes train, the queue is process 0's: it takes and packs the groups of a step, and sends each process
its rows. So what is counted over a step (its tokens, the baseline of a group) is counted once, over all of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from north_lightning.data.batches import move_batch, pack_rollouts, rows_at_once
from north_lightning.data.packing import BestFitPacker
from north_lightning.errors import ConfigError, DataError, InfrastructureError
from north_lightning.interfaces import RolloutQueue
from north_lightning.parallel import gather_objects, on_process_zero, scatter_from_process_zero
from north_lightning.types import Count, Positive, Rollout, RolloutBatch, RolloutGroup

_log = logging.getLogger(__name__)


class RolloutStep:
    """Everything one optimizer step consumes.

    Not a dataclass on purpose: Lightning walks through dataclasses to convert tensors, and would copy every token list
    of every rollout.

    Attributes:
        micro_batches: rows for this process to compute, at least one, as many on every process; add up their losses,
            each already divided by ``num_trained_tokens``, and step once.
        groups: all groups taken, those without any signal included; on process 0, which has the queue. None elsewhere.
        num_trained_tokens: sampled tokens of all groups, the denominator of every micro-batch's loss.
        num_tokens: of all rows on all processes.
        wait_s: seconds the trainer waited for the groups.
    """

    __slots__ = ("groups", "micro_batches", "num_tokens", "num_trained_tokens", "wait_s")

    def __init__(
        self,
        micro_batches: list[RolloutBatch],
        groups: list[RolloutGroup],
        num_trained_tokens: int,
        num_tokens: int,
        wait_s: float,
    ) -> None:
        self.micro_batches = micro_batches
        self.groups = groups
        self.num_trained_tokens = num_trained_tokens
        self.num_tokens = num_tokens
        self.wait_s = wait_s


def make_step(
    groups: Sequence[RolloutGroup],
    max_row_tokens: int,
    wait_s: float = 0.0,
    skip_zero_advantage: bool = True,
    num_at_once: int = 1,
) -> RolloutStep:
    """Pack the rollouts that have a gradient; count the tokens of all.

    Where the loss is zero without advantage (``PolicyLoss.is_zero_without_advantage``), a rollout with advantage 0 is
    not computed, but its sampled tokens are in the denominator as if it were. Where no rollout has a gradient the
    shortest one is computed all the same, so that a step always has a loss to differentiate.

    The number of rows is a multiple of ``num_at_once``, the rows that are computed at a time; those of a time are of
    like length. Rows are split for that, and where there is nothing to split, some train nothing.

    Raises:
        ConfigError: a rollout is longer than ``max_row_tokens``. Nothing is cut.
        DataError: no rollout has tokens, or one is malformed.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts if rollout.token_ids]
    if not rollouts:
        raise DataError(f"groups {[group.group_id for group in groups]}: expected rollouts with tokens, got none")
    longest = max(rollouts, key=_length)
    if _length(longest) > max_row_tokens:
        raise ConfigError(
            f"max_row_tokens: expected at least the longest rollout's {_length(longest)} tokens "
            f"({longest.task_id}), got {max_row_tokens}"
        )
    total = sum(rollout.num_sampled_tokens for rollout in rollouts)
    computed = [
        rollout
        for rollout in rollouts
        if rollout.num_sampled_tokens and (rollout.advantage != 0.0 or not skip_zero_advantage)
    ]
    computed = computed or [min(rollouts, key=_length)]
    # Longest first makes the packer's best fit best-fit-decreasing.
    order = sorted(range(len(computed)), key=lambda i: -_length(computed[i]))
    packed = BestFitPacker(max_row_tokens, len(computed)).pack((i, _length(computed[i])) for i in order)
    rows = _split_rows([[computed[i] for i in row] for row in packed], num_at_once)
    micro_batches = [pack_rollouts(row, total) for row in rows]
    num_idle = -len(rows) % num_at_once
    micro_batches += [_train_nothing(pack_rollouts([min(computed, key=_length)], total))] * num_idle
    num_tokens = sum(len(micro_batch.token_ids) for micro_batch in micro_batches)
    return RolloutStep(micro_batches, list(groups), total, num_tokens, wait_s)


def _length(rollout: Rollout) -> int:
    return len(rollout.token_ids)


def _split_rows(rows: list[list[Rollout]], num_at_once: int) -> list[list[Rollout]]:
    """Halve the longest rows of several rollouts until the number of rows is a multiple; longest first."""

    def length(row: list[Rollout]) -> int:
        return sum(map(_length, row))

    while len(rows) % num_at_once and (splittable := [row for row in rows if len(row) > 1]):
        longest = max(splittable, key=length)
        rows = [row for row in rows if row is not longest] + [longest[::2], longest[1::2]]
    return rows if num_at_once == 1 else sorted(rows, key=length, reverse=True)


def _train_nothing(row: RolloutBatch) -> RolloutBatch:
    """A row for a process that has to take part in every collective while others still compute one."""
    return replace(row, loss_mask=torch.zeros_like(row.loss_mask), advantages=torch.zeros_like(row.advantages))


class RolloutDataModule(LightningDataModule):
    """Takes completed groups from the queue, one ``RolloutStep`` per optimizer step.

    Fetching alternates strictly with training, so nothing taken is untrained when a checkpoint is written. After the
    optimizer step somebody calls ``release(step)``; without it the queue runs out of slots. Every process calls the
    same methods; only process 0 uses its queue, and what goes wrong there is raised everywhere.

    Args:
        queue: where the producer puts groups.
        groups_per_batch: groups of one optimizer step; the queue's own number by default.
        max_row_tokens: the most tokens of a micro-batch; at least ``rollouts.max_context_tokens``, and that by default.
        num_batches: optimizer steps of Lightning's epoch; ``trainer.max_steps`` by default.
        poll_s: seconds between looks into an empty queue.
        max_wait_s: give up with the queue's statistics when one batch takes longer; at least what the queue lets others
            wait for a group, and what an attempt may take.
    """

    def __init__(
        self,
        queue: RolloutQueue,
        groups_per_batch: Count | None = None,
        max_row_tokens: Count | None = None,
        num_batches: Count | None = None,
        poll_s: Positive = 0.02,
        max_wait_s: Positive = 7200.0,
    ) -> None:
        super().__init__()
        expected = queue.groups_per_batch
        if groups_per_batch is None and (groups_per_batch := expected) is None:
            raise ConfigError(f"data.groups_per_batch: expected a number, because {type(queue).__name__} names none")
        for name, value in (
            ("groups_per_batch", groups_per_batch),
            ("max_row_tokens", max_row_tokens),
            ("num_batches", num_batches),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        if expected not in (None, groups_per_batch):
            raise ConfigError(
                f"data.groups_per_batch: expected the queue's groups_per_batch, {expected}, got {groups_per_batch}; "
                "the bound on policy lag holds only if both are the same"
            )
        self.queue = queue
        self.groups_per_batch = groups_per_batch
        self.max_row_tokens = max_row_tokens
        self.num_batches = num_batches
        self.poll_s = poll_s
        self.max_wait_s = max_wait_s
        self._checks: list[Callable[[], None]] = []
        self._outstanding: list[int] = []  # groups that were taken and not released
        self._interruptions: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._num_at_once = 1
        self._row_of = [0]  # of each process: which of the rows that are computed at a time

    def add_check(self, check: Callable[[], None]) -> None:
        """Have process 0 call ``check`` while waiting; it raises when waiting has become pointless (the producer
        died)."""
        self._checks.append(check)

    def add_interruption(self, is_due: Callable[[], bool], call: Callable[[], None]) -> None:
        """Have process 0 ask ``is_due`` while waiting, and every process ``call`` when it is; then waiting goes on."""
        self._interruptions.append((is_due, call))

    def check_run(self, trainer: Trainer, module: object, data: object) -> None:
        """``ConfigError`` for numbers of batches, steps and epochs that contradict each other, and for accumulation."""
        if self.num_batches is None:
            self.num_batches = trainer.max_steps
        if self.num_batches < 1:
            raise ConfigError("data.num_batches: expected a number of optimizer steps, here or as trainer.max_steps")
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs * self.num_batches < trainer.max_steps:
            raise ConfigError(
                f"trainer.max_steps: expected at most data.num_batches x trainer.max_epochs, {self.num_batches} x "
                f"{trainer.max_epochs}, got {trainer.max_steps}: leave out num_batches or max_epochs"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                "trainer.accumulate_grad_batches: expected 1, because a batch is a whole optimizer step; "
                f"got {trainer.accumulate_grad_batches}"
            )

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        if stage != "fit" or trainer is None:
            return
        self.check_run(trainer, None, self)
        self._num_at_once, own = rows_at_once(trainer)
        self._row_of = gather_objects(own)

    def teardown(self, stage: str) -> None:
        if self._has_queue:
            self.queue.close()

    def train_dataloader(self) -> RolloutLoader:
        return RolloutLoader(self)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if isinstance(batch, RolloutStep):
            batch.micro_batches = [move_batch(micro_batch, device) for micro_batch in batch.micro_batches]
        return batch

    def release(self, step: RolloutStep) -> None:
        """The step was trained: free its groups' slots. Call once, after the optimizer step."""
        self._outstanding = []
        on_process_zero(lambda: self.queue.release([group.group_id for group in step.groups]))

    def release_outstanding(self) -> None:
        """On process 0: release the step that was taken last, if it has not been."""
        group_ids, self._outstanding = self._outstanding, []
        if group_ids:
            self.queue.release(group_ids)

    def state_dict(self) -> dict[str, Any]:
        """The queue, restored before training starts and so before a producer admits new groups.

        The position is in the loader's state, which Lightning saves and restores.
        """
        return {"queue": self.queue.state_dict()} if self._has_queue else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._has_queue:
            self.queue.load_state_dict(state_dict["queue"])

    @property
    def _has_queue(self) -> bool:
        return self.trainer is None or self.trainer.is_global_zero

    def take_step(self) -> RolloutStep:
        """Wait for a batch of groups and pack it; this process's part.

        Raises:
            SIGTERMException: process 0 was told to end while waiting.
            InfrastructureError: nothing came for ``max_wait_s``; or whatever a check raises.
        """
        step: RolloutStep | None = None
        start = time.monotonic()

        def take() -> int | tuple[int, tuple[int, int, float]]:
            nonlocal step
            waited = self._take_whole_step(start)
            if isinstance(waited, int):
                return waited
            step = waited
            return len(step.micro_batches), (step.num_trained_tokens, step.num_tokens, step.wait_s)

        while isinstance(taken := on_process_zero(take), int):
            _, call = self._interruptions[taken]
            call()
        num_rows, numbers = taken
        own_rows = []
        for first in range(0, num_rows, self._num_at_once):  # a few at a time: with routed experts they are large
            rows = None if step is None else [step.micro_batches[first + index] for index in self._row_of]
            own_rows.append(scatter_from_process_zero(rows))
        return RolloutStep(own_rows, [] if step is None else step.groups, *numbers)

    def _take_whole_step(self, start: float) -> RolloutStep | int:
        """Wait, since ``start``; the number of the interruption that is due, if one is."""
        reported = time.monotonic()
        while (groups := self.queue.take(self.groups_per_batch)) is None:
            if self.trainer is not None and self.trainer.received_sigterm:
                raise SIGTERMException
            for check in self._checks:
                check()
            for number, (is_due, _) in enumerate(self._interruptions):
                if is_due():
                    return number
            now = time.monotonic()
            if now - start > self.max_wait_s:
                raise InfrastructureError(
                    f"rollout queue: expected {self.groups_per_batch} groups within {self.max_wait_s:.0f} s, "
                    f"got fewer; queue: {dict(self.queue.stats())}"
                )
            if now - reported > 60:
                reported = now
                _log.warning("waiting %.0f s for rollouts; queue: %s", now - start, dict(self.queue.stats()))
            time.sleep(self.poll_s)
        self._outstanding = [group.group_id for group in groups]
        loss = getattr(getattr(self.trainer, "lightning_module", None), "loss", None)
        skip = getattr(loss, "is_zero_without_advantage", False)
        if self.max_row_tokens is None:
            raise ConfigError("data.max_row_tokens: expected a number of tokens where no RolloutProducerCallback is")
        return make_step(groups, self.max_row_tokens, time.monotonic() - start, skip, self._num_at_once)


class RolloutLoader:
    """``num_batches`` steps; sized, because Lightning would fetch the next batch before training on this one."""

    def __init__(self, data: RolloutDataModule) -> None:
        self._data = data
        self._batch = 0
        self._resumed = False

    def __len__(self) -> int:
        assert self._data.num_batches is not None, "Lightning calls setup first"
        return self._data.num_batches

    def __iter__(self) -> Iterator[RolloutStep]:
        if not self._resumed or self._batch >= len(self):
            self._batch = 0
        self._resumed = False
        while self._batch < len(self):
            step = self._data.take_step()
            self._batch += 1
            yield step

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self._batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batch = int(state["batch"])
        self._resumed = True
