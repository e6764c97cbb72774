"""Token cross entropy, summed. Dividing by the number of trained tokens of the optimizer step is the caller's part."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from north_lightning.losses.logprobs import token_logprobs


def cross_entropy_sum(
    hidden: Float[Tensor, "R D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " R"],
    logit_scale: float = 1.0,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " R"]]:
    """Sum of ``-log p(target)`` over rows, and each row's loss.

    A sum, because the mean of a step is over *all* micro-batches and ranks: divide by ``batch.num_trained_tokens``. A
    mean of per-micro-batch means weights tokens of short micro-batches more.

    Args: as in ``token_logprobs``; every row counts.

    Returns:
        The scalar sum in float32, with gradient; the losses per row [R], without gradient (0.0 rows give exactly 0).
    """
    logprobs, _ = token_logprobs(hidden, weight, targets, logit_scale, tile=tile)
    return -logprobs.sum(), -logprobs.detach()
