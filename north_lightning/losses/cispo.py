"""CISPO: clipped importance weights, unclipped gradients.

In: log-probabilities of the trained tokens by trainer and sampler, advantages, a mask. Out: the scalar to minimise and
metrics. Not here: where the log-probabilities come from, how advantages are made.
"""

from __future__ import annotations

import math
from dataclasses import fields

import torch
from torch import Tensor

from north_lightning.interfaces import PolicyLoss, PolicyLossInputs, PolicyLossOutputs
from north_lightning.losses.metrics import ratio_metrics
from north_lightning.types import Positive


class CISPOLoss(PolicyLoss):
    """CISPO (MiniMax-M1, https://arxiv.org/abs/2506.13585, eq. 4-5), anchored on the sampler's log-probabilities.

        loss = -1/num_trained_tokens * sum_t sg(w_t) * A_t * log pi_trainer(t)
        w_t  = min(pi_trainer(t) / pi_rollout(t), max_importance_weight)

    ``sg`` stops the gradient, so a clipped token still has one. As in the paper's experiments there is no lower bound
    and no KL term. The ratio is taken to the sampler itself, so it corrects both staleness and numerical mismatch: no
    other importance weight belongs on top.

    Args:
        max_importance_weight: the largest weight itself (not an epsilon to be added to 1).
    """

    is_zero_without_advantage = True
    corrects_mismatch = True

    def __init__(self, max_importance_weight: Positive = 5.0) -> None:
        if not (math.isfinite(max_importance_weight) and max_importance_weight >= 1):
            raise ValueError(f"max_importance_weight: expected a finite one, 1 or more, got {max_importance_weight}")
        self.max_importance_weight = max_importance_weight

    def __call__(self, inputs: PolicyLossInputs) -> PolicyLossOutputs:
        mask = inputs.loss_mask
        refuse_unusable(inputs)
        trainer = inputs.trainer_logprobs[mask]  # [R], what lies outside the mask is never touched
        log_ratio = trainer.detach() - inputs.rollout_logprobs[mask]
        weight = log_ratio.exp().clamp(max=self.max_importance_weight)
        advantages = inputs.advantages[mask]
        loss = -(weight * advantages * trainer).sum() / max(inputs.num_trained_tokens, 1)
        clipped = log_ratio > math.log(self.max_importance_weight)
        return PolicyLossOutputs(loss, ratio_metrics(inputs, log_ratio, clipped))


def refuse_unusable(inputs: PolicyLossInputs) -> None:
    """``ValueError`` where a policy loss over ``inputs`` would be meaningless.

    Checked: equal shapes; every input finite under the mask (outside it anything may stand); a denominator that covers
    at least the tokens of this batch.
    """
    mask = inputs.loss_mask
    tensors = {
        field.name: value
        for field in fields(inputs)
        if isinstance(value := getattr(inputs, field.name), Tensor) and field.name != "loss_mask"
    }
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name}: expected shape {tuple(mask.shape)} like loss_mask, got {tuple(tensor.shape)}")
    bad = torch.stack([(~torch.isfinite(tensor.detach()) & mask).sum() for tensor in tensors.values()])
    *counts, trained = [*bad.tolist(), int(mask.sum())]
    problems = [f"{name} has {count}" for name, count in zip(tensors, counts, strict=True) if count]
    if problems:
        raise ValueError(f"non-finite values under the loss mask: {', '.join(problems)} of {trained} trained tokens")
    if inputs.num_trained_tokens < trained:
        raise ValueError(
            f"num_trained_tokens: expected at least the {trained} tokens under the mask, "
            f"got {inputs.num_trained_tokens}"
        )
