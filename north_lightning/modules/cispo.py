"""Reinforcement learning from rollouts: a policy loss over the tokens that were sampled.

In: ``RolloutStep``s, each the batch of one optimizer step in packed rows. Out: one optimizer step per ``RolloutStep``,
and the numbers that tell whether it learns and stays stable. Not here: sampling, rewards, advantages, the queue.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import Tensor

from north_lightning.data.batches import rows_at_once
from north_lightning.data.rollouts import RolloutStep
from north_lightning.errors import TrainingError
from north_lightning.interfaces import PolicyLoss, PolicyLossInputs, PolicyLossOutputs
from north_lightning.losses import combine_metrics
from north_lightning.modules.base import NorthModule
from north_lightning.parallel import gather_objects, on_process_zero
from north_lightning.rollout.metrics import metrics_by_environment
from north_lightning.types import Positive, RolloutBatch, RolloutGroup

_log = logging.getLogger(__name__)


class CISPOModule(NorthModule):
    """Policy-gradient training on the sampler's own tokens and log-probabilities.

    Optimization is manual: the rows of a step are run one after another, so that memory is that of one row, and then
    one optimizer step is taken. Lightning therefore refuses ``trainer.accumulate_grad_batches``.

    Args:
        loss: The objective, ``CISPOLoss`` or one of your own.
        temperature: Temperature of the log-probabilities; that of the rollouts, which is the default.
        router_replay: Visit the experts that the sampler visited (R3), so that both compute the same function. Default:
            where the server can return them, which vLLM's CPU build cannot.
        kwargs: As for ``NorthModule``.
    """

    def __init__(
        self,
        loss: PolicyLoss,
        temperature: Positive | None = None,
        router_replay: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        self.loss = loss
        self.temperature = temperature
        self.router_replay = router_replay
        self.seconds = {"forward_backward": 0.0, "optimizer": 0.0}  # spent so far
        self._num_groups = self._num_with_signal = 0  # taken by process 0

    def training_step(self, step: RolloutStep, batch_idx: int) -> None:
        started = time.monotonic()
        outputs = []
        for row in step.micro_batches:
            output = self.policy_loss(self.keep_predicted_here(row))
            self.manual_backward(output.loss * rows_at_once(self.trainer)[0])  # gradients are averaged over rows
            outputs.append(output)
        computed = time.monotonic()
        self._step_optimizer()
        self.seconds["forward_backward"] += computed - started
        self.seconds["optimizer"] += time.monotonic() - computed
        self._log_step(step, outputs)

    def on_train_end(self) -> None:
        """Say so if nothing was learned; the loss is then 0 at every step, which looks like success."""
        super().on_train_end()
        if self._num_groups and not self._num_with_signal:
            _log.warning(
                "nothing was learned: in each of the %d groups that were trained, all attempts had the same reward. "
                "Train on tasks that the model solves now and then (python -m north_lightning calibrate finds them)",
                self._num_groups,
            )

    def policy_loss(self, row: RolloutBatch) -> PolicyLossOutputs:
        """The loss over one packed row, already divided by the step's ``num_trained_tokens``."""
        if self.router_replay and row.routed_experts is None:
            raise TrainingError("model.router_replay: expected rollouts with the sampler's routed experts, got none")
        self._refuse_parts_of_sequences(len(row.token_ids))
        routed_experts = row.routed_experts if self.router_replay else None
        logprobs, entropy = self.trained_logprobs(
            row, 1.0 if self.temperature is None else self.temperature, with_entropy=True, routed_experts=routed_experts
        )  # [R], [R]
        assert entropy is not None
        inputs = PolicyLossInputs(
            trainer_logprobs=_spread(logprobs, row.loss_mask),
            rollout_logprobs=row.rollout_logprobs,
            advantages=row.advantages,
            loss_mask=row.loss_mask,
            num_trained_tokens=row.num_trained_tokens,
            entropy=_spread(entropy, row.loss_mask),
            sequence_ids=_sequence_ids(row),
        )
        try:
            return self.loss(inputs)
        except ValueError as error:
            raise TrainingError(f"step {self.global_step} was not taken: {error}") from error

    def _refuse_parts_of_sequences(self, num_tokens: int) -> None:
        assert self.model is not None, "configure_model has not run"
        if self.loss.needs_whole_sequences and self.model.tokens_held(num_tokens) != slice(0, num_tokens):
            raise TrainingError(
                "model.loss: expected one that is computed token by token, because several processes share a row "
                f"(trainer.strategy.context), got {type(self.loss).__name__}"
            )

    def _step_optimizer(self) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        schedule: Any = self.lr_schedulers()
        if schedule is not None and not isinstance(schedule, ReduceLROnPlateau):
            schedule.step()

    def _log_step(self, step: RolloutStep, outputs: list[PolicyLossOutputs]) -> None:
        own = (sum(output.loss.item() for output in outputs), [output.metrics for output in outputs])
        losses, metrics = zip(*gather_objects(own), strict=True)
        combined = combine_metrics([part for parts in metrics for part in parts])
        self.log("train/loss", sum(losses))
        self.log_dict({f"train/{name}": value for name, value in combined.items()})
        always, sometimes = on_process_zero(lambda: _rollout_metrics(step.groups))
        self.log_dict(always)
        self.record(sometimes)
        self._num_groups += len(step.groups)
        self._num_with_signal += sum(any(one.advantage for one in group.rollouts) for group in step.groups)
        self.log("rollout/trained_tokens", float(step.num_trained_tokens))
        self.log("speed/wait_s", step.wait_s)


def _rollout_metrics(groups: Sequence[RolloutGroup]) -> tuple[dict[str, float], dict[str, float]]:
    """Of all rollouts; and of each environment, which not every step has."""
    metrics = {f"rollout/{name}": value for name, value in metrics_by_environment(groups).items()}
    environments = tuple(f"rollout/{group.environment}/" for group in groups)
    sometimes = {name: value for name, value in metrics.items() if name.startswith(environments)}
    return {name: value for name, value in metrics.items() if name not in sometimes}, sometimes


def _sequence_ids(row: RolloutBatch) -> Tensor:
    """Which rollout of the row each token [T] belongs to, from 0."""
    lengths = row.cu_seqlens.diff().long()
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` [R] at the places of ``mask`` [T], 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
