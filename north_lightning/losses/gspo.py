"""GSPO: one importance ratio per rollout.

In: as for every policy loss, with ``sequence_ids``. Out: the scalar to minimise and metrics.
"""

from __future__ import annotations

import math

import torch

from north_lightning.errors import ConfigError
from north_lightning.interfaces import PolicyLoss, PolicyLossInputs, PolicyLossOutputs
from north_lightning.losses.cispo import refuse_unusable
from north_lightning.losses.metrics import ratio_metrics
from north_lightning.types import Positive


class GSPOLoss(PolicyLoss):
    """Group sequence policy optimization (https://arxiv.org/abs/2507.18071), anchored on the sampler.

        s_i  = exp(1/|o_i| * sum_t log(pi_trainer(t) / pi_rollout(t)))
        loss = -1/num_trained_tokens * sum_i |o_i| * min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)

    Differs from CISPO: all tokens of a rollout share the geometric mean of their ratios, and a rollout that is clipped
    gets no gradient. Differs from the paper: rollouts are weighted by their trained tokens |o_i|, as everything here is
    summed over tokens; the paper weights them alike. The paper's bounds are small, because they bound a mean.

    Args:
        clip_low: How far below 1 the ratio of a rollout still counts.
        clip_high: How far above.
    """

    is_zero_without_advantage = True
    corrects_mismatch = True
    needs_whole_sequences = True

    def __init__(self, clip_low: Positive = 3e-4, clip_high: Positive = 4e-4) -> None:
        if not 0 < clip_low < 1:
            raise ConfigError(f"clip_low: expected a number between 0 and 1, got {clip_low}")
        if not 0 < clip_high < math.inf:
            raise ConfigError(f"clip_high: expected a finite number above 0, got {clip_high}")
        self.clip_low = clip_low
        self.clip_high = clip_high

    def __call__(self, inputs: PolicyLossInputs) -> PolicyLossOutputs:
        if inputs.sequence_ids is None:
            raise ValueError("sequence_ids: expected the rollout of every token, got none")
        refuse_unusable(inputs)
        mask = inputs.loss_mask
        advantages = inputs.advantages[mask]  # [R]
        log_ratio = inputs.trainer_logprobs[mask] - inputs.rollout_logprobs[mask]
        _, place, lengths = torch.unique(inputs.sequence_ids[mask], return_inverse=True, return_counts=True)
        mean = torch.zeros(len(lengths), dtype=log_ratio.dtype, device=log_ratio.device)  # [N]
        mean = mean.index_add(0, place, log_ratio) / lengths
        # Only with a negative advantage does a large ratio count; beyond exp(20) no gradient is better than infinity.
        ratio = mean.clamp(max=20.0).exp()[place]  # [R]: the sum over tokens weighs a rollout by its length
        bounded = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        loss = -torch.minimum(ratio * advantages, bounded).sum() / max(inputs.num_trained_tokens, 1)
        return PolicyLossOutputs(loss, ratio_metrics(inputs, log_ratio.detach(), bounded < ratio * advantages))
