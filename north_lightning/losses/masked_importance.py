"""Masked importance sampling (MIS, IcePop) around a policy gradient.

In: as for every policy loss. Out: another loss over weighted advantages. Not here: that loss.
"""

from __future__ import annotations

import math

import torch

from north_lightning.errors import ConfigError
from north_lightning.interfaces import PolicyLoss, PolicyLossInputs, PolicyLossOutputs
from north_lightning.losses.cispo import refuse_unusable
from north_lightning.losses.truncated_importance import uncorrected, weighted
from north_lightning.types import NotNegative, Positive


class MaskedImportanceLoss(PolicyLoss):
    """IcePop (Ring-1T, https://arxiv.org/abs/2510.18855): tokens that sampler and trainer see too differently
    are not trained.

        A'_t = sg(M(pi_trainer(t) / pi_rollout(t))) * A_t,   M(w) = w if min_importance_weight <= w <= max_..., else 0

    As with TIS, PPO's own ratio beside it is 1, because one optimizer step is taken per batch.
    Differs from CISPO: a token beyond the bounds gets no gradient instead of a bounded one, and there is a lower bound.
    It still counts in ``num_trained_tokens``.

    Args:
        min_importance_weight: The smallest weight that is trained.
        max_importance_weight: The largest.
        of: The loss that is corrected; the policy gradient by default. One that corrects already is refused.
    """

    is_zero_without_advantage = True
    corrects_mismatch = True

    def __init__(
        self,
        min_importance_weight: NotNegative = 0.5,
        max_importance_weight: Positive = 5.0,
        of: PolicyLoss | None = None,
    ) -> None:
        if not 0 <= min_importance_weight < max_importance_weight < math.inf:
            raise ConfigError(
                "min_importance_weight, max_importance_weight: expected 0 <= min < max, finite, got "
                f"{min_importance_weight}, {max_importance_weight}"
            )
        self.min_importance_weight = min_importance_weight
        self.max_importance_weight = max_importance_weight
        self.of = uncorrected(of)

    def __call__(self, inputs: PolicyLossInputs) -> PolicyLossOutputs:
        refuse_unusable(inputs)
        log_ratio = (inputs.trainer_logprobs.detach() - inputs.rollout_logprobs)[inputs.loss_mask]  # [R]
        weight = log_ratio.exp()
        masked = (weight < self.min_importance_weight) | (weight > self.max_importance_weight)
        return weighted(self.of, inputs, log_ratio, torch.where(masked, 0.0, weight), masked)
