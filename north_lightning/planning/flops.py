"""Floating-point operations of training, causal-adjusted: scores that the mask hides are not counted."""

from __future__ import annotations

from dataclasses import dataclass

from north_lightning.model.config import NorthConfig
from north_lightning.planning.sizes import active_parameters, layer_keys


@dataclass(frozen=True)
class Flops:
    """Per token, forward and backward."""

    matrices: float
    attention: float  # scores and their sum over values

    @property
    def total(self) -> float:
        return self.matrices + self.attention


def flops_per_token(config: NorthConfig, context_tokens: int) -> Flops:
    """Of training on documents of ``context_tokens``.

    A multiplication and an addition are two operations; the backward pass takes twice the forward pass. Activation
    checkpointing computes more than this: model FLOPs utilisation (MFU) does not count it.
    """
    per_key = 4 * config.num_attention_heads * config.head_dim
    scores = sum(per_key * layer_keys(config, layer, context_tokens) for layer in range(config.num_hidden_layers))
    return Flops(matrices=3 * 2 * active_parameters(config), attention=3 * scores)


def tokens_per_second(flops: Flops, num_gpus: int, tflops: float, mfu: float) -> float:
    """Of all GPUs together, at a given utilisation of each one's ``tflops``."""
    return num_gpus * tflops * 1e12 * mfu / flops.total
