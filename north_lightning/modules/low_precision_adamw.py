"""AdamW with float32 weights and gradients and bfloat16 moments: 12 bytes per parameter.

In: parameters with gradients. Out: parameters one step on. The arithmetic is torchao's, in float32; only the
moments are stored shorter. Needs ``pip install north-lightning[optimizers]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torchao.optim import _AdamW


class AdamWBF16Moments(_AdamW):
    """AdamW whose moments are rounded to bfloat16 after every step; those of fewer than 4,096 entries stay float32.

    A moment that moves by less than 1/256 of itself a step is rounded back to where it was: ``betas`` are refused
    where 1 - beta is smaller than that, such as the usual 0.999.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the first and of the second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled; times the learning rate.

    Raises:
        ValueError: a beta above 1 - 1/256.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if max(betas) > 1 - 2**-8:
            raise ValueError(f"betas: expected at most 1 - 1/256 where moments are bfloat16, got {betas}")
        super().__init__(params, lr, tuple(betas), eps, weight_decay)
        self.block_size = 1  # any number of entries will do

    @staticmethod
    def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
        return torch.zeros_like(p, dtype=torch.bfloat16)
