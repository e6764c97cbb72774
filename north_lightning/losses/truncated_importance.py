"""Truncated importance sampling (TIS) around a policy gradient.

In: as for every policy loss. Out: another loss over weighted advantages. Not here: that loss.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from north_lightning.errors import ConfigError
from north_lightning.interfaces import PolicyLoss, PolicyLossInputs, PolicyLossOutputs
from north_lightning.losses.cispo import refuse_unusable
from north_lightning.losses.metrics import ratio_metrics
from north_lightning.losses.policy_gradient import PolicyGradientLoss
from north_lightning.types import Positive


class TruncatedImportanceLoss(PolicyLoss):
    """TIS (https://fengyao.notion.site/off-policy-rl): the loss ``of``, every advantage weighted for the sampler.

        A'_t = sg(min(pi_trainer(t) / pi_rollout(t), max_importance_weight)) * A_t

    There it is multiplied with PPO's loss, whose own ratio is taken to the trainer before the step. One optimizer step
    is taken per batch here, so that ratio is 1, and PPO's loss is the policy gradient.
    Differs from CISPO: not at all in the gradient if ``max_importance_weight`` is the same (2 there, 5 in CISPO).

    Args:
        max_importance_weight: The largest weight.
        of: The loss that is corrected; the policy gradient by default. One that corrects already is refused.
    """

    is_zero_without_advantage = True
    corrects_mismatch = True

    def __init__(self, max_importance_weight: Positive = 2.0, of: PolicyLoss | None = None) -> None:
        if not (math.isfinite(max_importance_weight) and max_importance_weight >= 1):
            raise ConfigError(f"max_importance_weight: expected a finite one, 1 or more, got {max_importance_weight}")
        self.max_importance_weight = max_importance_weight
        self.of = uncorrected(of)

    def __call__(self, inputs: PolicyLossInputs) -> PolicyLossOutputs:
        refuse_unusable(inputs)
        log_ratio = (inputs.trainer_logprobs.detach() - inputs.rollout_logprobs)[inputs.loss_mask]  # [R]
        weight = log_ratio.exp().clamp(max=self.max_importance_weight)
        return weighted(self.of, inputs, log_ratio, weight, log_ratio > math.log(self.max_importance_weight))


def uncorrected(loss: PolicyLoss | None) -> PolicyLoss:
    """``loss``, or the policy gradient; ``ConfigError`` for one that an importance weight would correct twice."""
    if loss is not None and loss.corrects_mismatch:
        raise ConfigError(
            f"of: expected a loss that does not correct for the sampler, got {type(loss).__name__}, which does: "
            "the mismatch would be counted twice"
        )
    if loss is not None and not loss.is_zero_without_advantage:
        raise ConfigError(f"of: expected a loss that is zero without advantage, got {type(loss).__name__}")
    return loss or PolicyGradientLoss()


def weighted(
    loss: PolicyLoss, inputs: PolicyLossInputs, log_ratio: Tensor, weight: Tensor, clipped: Tensor
) -> PolicyLossOutputs:
    """``loss`` with advantages times ``weight`` [R], its metrics and those of the ratios; R trained tokens."""
    mask = inputs.loss_mask
    advantages = torch.zeros_like(inputs.advantages).masked_scatter(mask, inputs.advantages[mask] * weight)
    output = loss(replace(inputs, advantages=advantages))
    return replace(output, metrics={**output.metrics, **ratio_metrics(inputs, log_ratio, clipped)})
