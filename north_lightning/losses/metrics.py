"""Metrics of policy losses: of one micro-batch, and put together into those of an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from north_lightning.interfaces import PolicyLossInputs


def combine_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One mapping for several micro-batches of the same step.

    ``num_tokens`` is summed, names that end in ``_max`` take the maximum, all others the mean weighted by
    ``num_tokens`` (1 where a loss does not report it). Micro-batches without trained tokens weigh nothing.

    >>> combine_metrics([{"num_tokens": 1, "a": 4.0, "b_max": 1.0}, {"num_tokens": 3, "a": 0.0, "b_max": 2.0}])
    {'num_tokens': 4, 'a': 1.0, 'b_max': 2.0}
    """
    combined: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [part for part in parts if name in part]
        values = [part[name] for part in having]
        weights = [part.get("num_tokens", 1.0) for part in having]
        if name == "num_tokens":
            combined[name] = sum(values)
        elif name.endswith("_max"):
            combined[name] = max(values)
        else:
            total = sum(weights)
            combined[name] = sum(v * w for v, w in zip(values, weights, strict=True) if w) / total if total else 0.0
    return combined


@torch.no_grad()
def ratio_metrics(inputs: PolicyLossInputs, log_ratio: Tensor, clipped: Tensor) -> dict[str, float]:
    """Means over the trained tokens [R] of one (micro-)batch; combine several with ``combine_metrics``.

    ``log_ratio`` [R] is of trainer over sampler, ``clipped`` [R] (bool) the tokens whose weight was changed or whose
    gradient was held back. ``mismatch_kl`` is Schulman's k3 estimate of KL(rollout || trainer): mean of
    ratio - 1 - log ratio.
    """
    count = log_ratio.numel()
    if count == 0:
        return {"num_tokens": 0.0}
    advantages = inputs.advantages[inputs.loss_mask]
    difference = log_ratio.abs()
    token_kl = log_ratio.expm1() - log_ratio
    values = {
        "mismatch_kl": token_kl.mean(),
        "mismatch_kl_max": token_kl.max(),
        "mismatch_abs": difference.mean(),
        "mismatch_abs_max": difference.max(),
        "importance_ratio": log_ratio.exp().mean(),
        "clip_fraction_positive": (clipped & (advantages > 0)).float().mean(),
        "clip_fraction_negative": (clipped & (advantages < 0)).float().mean(),
    }
    if inputs.entropy is not None:
        values["entropy"] = inputs.entropy[inputs.loss_mask].mean()
    numbers = torch.stack([value.float() for value in values.values()]).tolist()  # one transfer from the device
    return {"num_tokens": float(count), **dict(zip(values, numbers, strict=True))}
