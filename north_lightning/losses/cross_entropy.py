"""Token cross entropy, summed, and the weights that turn the sum into the mean of an optimizer step."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
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


def token_mean_weights(loss_mask: Bool[Tensor, " T"], num_trained_tokens: int) -> Float[Tensor, " R"]:
    """Weights of the trained tokens for the mean over all trained tokens of the optimizer step: all the same."""
    count = int(loss_mask.sum())
    return torch.full((count,), 1 / num_trained_tokens, dtype=torch.float32, device=loss_mask.device)


def conversation_mean_weights(
    loss_mask: Bool[Tensor, " T"],
    cu_seqlens: Int[Tensor, " N1"],
    trained_per_document: Int[Tensor, " N"],
    num_documents: int,
) -> Float[Tensor, " R"]:
    """Weights of the trained tokens for the mean over conversations of each one's mean over its trained tokens.

    Every conversation counts the same, however long it is; the token mean lets long ones decide.

    Args:
        loss_mask: the trained tokens that are computed here.
        cu_seqlens: bounds of the documents, from 0 to T.
        trained_per_document: each document's trained tokens, those that are computed elsewhere included.
        num_documents: of the whole optimizer step, over all rows and ranks.

    Returns:
        [R] weights in the order of the trained tokens. They sum to 1 over the whole step.
    """
    document = torch.bucketize(loss_mask.nonzero()[:, 0], cu_seqlens[1:].long(), right=True)  # [R]
    return 1 / (trained_per_document[document].float() * num_documents)
