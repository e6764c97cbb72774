"""A policy loss of your own, in one file: PPO's clipped ratio as GRPO and DAPO use it, over tokens.

In YAML (``plugins/`` is on the path):

    model:
      loss:
        class_path: losses.clipped_ratio.ClippedRatioLoss
        init_args: {clip_low: 0.2, clip_high: 0.28}

To write another: subclass ``PolicyLoss``, select by ``loss_mask``, divide by ``num_trained_tokens``, refuse what is not
finite. Constructor arguments are settings. Metrics named ``*_max`` are combined by maximum, others by a mean weighted
with ``num_tokens``.
"""

from __future__ import annotations

import torch

from north_lightning.errors import ConfigError
from north_lightning.interfaces import PolicyLoss, PolicyLossInputs, PolicyLossOutputs


class ClippedRatioLoss(PolicyLoss):
    """PPO's clipped surrogate (https://arxiv.org/abs/1707.06347, eq. 7), aggregated over tokens, no KL term.

        loss = -1/num_trained_tokens * sum_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
        r_t  = pi_trainer(t) / pi_rollout(t)

    Unlike CISPO, a token whose ratio has left the range in the direction of its advantage gets no gradient at all. A
    ``clip_high`` above ``clip_low`` lets rare tokens grow (DAPO, https://arxiv.org/abs/2503.14476, eq. 8). The ratio is
    taken to the sampler, not to the trainer's own previous policy.

    Args:
        clip_low: how far below 1 the ratio still counts, less than 1.
        clip_high: how far above 1.
    """

    is_zero_without_advantage = True
    corrects_mismatch = True

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.28) -> None:
        if not 0 < clip_low < 1:
            raise ConfigError(f"clip_low: expected a number between 0 and 1, got {clip_low}")
        if not 0 < clip_high < float("inf"):
            raise ConfigError(f"clip_high: expected a finite number above 0, got {clip_high}")
        self.clip_low = clip_low
        self.clip_high = clip_high

    def __call__(self, inputs: PolicyLossInputs) -> PolicyLossOutputs:
        mask = inputs.loss_mask
        trainer, rollout, advantages = (
            _finite(name, getattr(inputs, name)[mask])
            for name in ("trainer_logprobs", "rollout_logprobs", "advantages")
        )
        # Only with a negative advantage does a large ratio count; beyond exp(20) no gradient is better than infinity.
        ratio = (trainer - rollout).clamp(max=20.0).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        objective = torch.minimum(ratio * advantages, clipped * advantages)
        loss = -objective.sum() / max(inputs.num_trained_tokens, 1)
        if not mask.any():
            return PolicyLossOutputs(loss, {"num_tokens": 0.0})
        held_back = (clipped * advantages < ratio * advantages).float().mean()
        metrics = {"importance_ratio": ratio.mean(), "importance_ratio_max": ratio.max(), "clip_fraction": held_back}
        return PolicyLossOutputs(
            loss, {"num_tokens": float(mask.sum())} | {name: value.item() for name, value in metrics.items()}
        )


def _finite(name: str, values: torch.Tensor) -> torch.Tensor:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name}: expected finite values under the loss mask, got {bad} others of {values.numel()}")
    return values
