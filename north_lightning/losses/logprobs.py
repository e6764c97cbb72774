"""Log-probabilities of chosen tokens under the language-model head, without ever holding all logits.

In: final hidden states, the (tied) head weight, target ids. Out: one log-probability per target, differentiable with
respect to both, and the entropy of each distribution. Also the alignment between a packed row and its targets.
Not here: which loss is made of them.

Legend: T tokens of a packed row, R rows that need logits (trained tokens), D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**24
"""Most logits held at once by default: 64 MiB in float32, and as much again while their sums are taken. Of a vocabulary
of 262,144 that is 64 rows; twice or four times as many are 1 to 7% faster on one core."""

SLICE_ELEMENTS = 2**26
"""Most elements of a half-precision head that are held in float32 at once: 256 MiB."""

CHUNK_ROWS = 512
"""Most rows at once by default: more is no faster, because the logits of a small vocabulary leave the CPU's caches."""


def trained_positions(
    token_ids: Int[Tensor, " T"], cu_seqlens: Int[Tensor, " N_plus_1"], loss_mask: Bool[Tensor, " T"]
) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"]]:
    """Where the trained tokens of a packed row are predicted from, and what they are.

    The log-probability of token ``t`` comes from the hidden state of token ``t - 1`` of the same document, so

        source, targets = trained_positions(batch.token_ids, batch.cu_seqlens, batch.loss_mask)
        logprobs, entropy = token_logprobs(hidden[source], weight, targets)

    gives results in the order of ``loss_mask.nonzero()``; other per-token tensors are aligned by ``x[loss_mask]``.

    Returns:
        ``source`` [R] int64, positions whose hidden states are needed, and ``targets`` [R], ids they predict.

    Raises:
        ValueError: the lengths disagree, ``cu_seqlens`` does not run from 0 to T, or the first token of a document
            (which nothing predicts) is marked as trained.
    """
    length = token_ids.shape[0]
    if loss_mask.shape != token_ids.shape:
        raise ValueError(
            f"loss_mask: expected shape {tuple(token_ids.shape)} like token_ids, got {tuple(loss_mask.shape)}"
        )
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != length or (cu_seqlens[1:] <= cu_seqlens[:-1]).any():
        raise ValueError(f"cu_seqlens: expected to increase from 0 to {length}, got {cu_seqlens.tolist()}")
    starts = cu_seqlens[:-1].long()
    if loss_mask[starts].any():
        marked = loss_mask[starts].nonzero().flatten().tolist()
        raise ValueError(f"loss_mask: the first token of a document cannot be trained, but is in documents {marked}")
    positions = loss_mask.nonzero().flatten()
    return positions - 1, token_ids[positions]


def token_logprobs(
    hidden: Float[Tensor, "R D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " R"],
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    with_entropy: bool = False,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"] | None]:
    """``log softmax(logit_scale / temperature * hidden @ weight.T)[target]``, row by row.

    Computed in float32 whatever the inputs' type and autocast (float64 for float64 inputs), ``chunk_tokens`` rows at a
    time in forward and backward: the logits of at most that many rows exist at once. Pass only rows that are trained
    (see ``trained_positions``).

    Args:
        hidden: after the final norm.
        weight: the head; the embedding where they are tied.
        targets: ids below V.
        logit_scale: factor the model applies to its logits.
        temperature: that the tokens were sampled with, so that the result is comparable with the sampler's.
        chunk_tokens: rows of logits held at once; default: at most 512, and 64 MiB.
        with_entropy: also return the entropy of each row's distribution.

    Returns:
        Log-probabilities [R], with gradient to ``hidden`` and ``weight``; entropies [R] in nats, without gradient, or
        None.
    """
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"targets: expected shape {tuple(hidden.shape[:1])} like hidden's rows, got {tuple(targets.shape)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature: expected more than 0, got {temperature}")
    if chunk_tokens is None:
        chunk_tokens = max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // weight.shape[0]))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: expected at least 1, got {chunk_tokens}")
    logprobs, entropy = _TokenLogprobs.apply(
        hidden, weight, targets, logit_scale / temperature, chunk_tokens, with_entropy
    )
    return logprobs, entropy if with_entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps one log-normaliser per row; backward makes the logits of each chunk again.

    A single chunk keeps its probabilities for the backward instead: no more memory than the chunk itself.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, chunk_tokens: int, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(hidden)
        rows = hidden.shape[0]
        logprobs = torch.empty(rows, dtype=dtype, device=hidden.device)
        normaliser = torch.empty_like(logprobs)
        entropy = torch.empty_like(logprobs if with_entropy else logprobs[:0])
        kept = None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(rows, chunk_tokens):
                logits = _logits(hidden[chunk].to(dtype), weight).mul_(scale)  # [c, V]
                highest = logits.amax(-1)
                exponentials = logits.sub_(highest[:, None]).exp()
                total = exponentials.sum(-1)
                log_total = total.log()
                logprobs[chunk] = logits.gather(-1, targets[chunk, None])[:, 0] - log_total
                normaliser[chunk] = highest + log_total
                if with_entropy:
                    entropy[chunk] = log_total - torch.linalg.vecdot(exponentials, logits) / total
                if rows <= chunk_tokens and any(ctx.needs_input_grad):
                    kept = exponentials.div_(total[:, None])
        ctx.save_for_backward(hidden, weight, targets, normaliser, kept)
        ctx.scale, ctx.chunk_tokens = scale, chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser, kept = ctx.saved_tensors
        dtype = _compute_dtype(hidden)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _chunks(hidden.shape[0], ctx.chunk_tokens):
                states = hidden[chunk].to(dtype)
                # d logprob / d logits = onehot(target) - probabilities
                upstream = grad_logprobs[chunk, None] * ctx.scale
                if kept is None:
                    probabilities = _logits(states, weight).mul_(ctx.scale).sub_(normaliser[chunk, None]).exp_()
                    grad_logits = probabilities.mul_(-upstream)  # [c, V]
                else:
                    grad_logits = kept * -upstream
                grad_logits.scatter_add_(-1, targets[chunk, None], upstream)
                if grad_hidden is not None:
                    grad_hidden[chunk] = _times_head(grad_logits, weight)
                if grad_weight is not None:
                    grad_weight.addmm_(grad_logits.T, states)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _logits(states: Tensor, weight: Tensor) -> Tensor:
    """``states @ weight.T`` in states' type, [c, V]; of a head in another type only a slice is converted at a time."""
    if weight.dtype == states.dtype:
        return states @ weight.T
    logits = states.new_empty(states.shape[0], weight.shape[0])
    for part in _slices(weight):
        logits[:, part] = states @ weight[part].to(states.dtype).T
    return logits


def _times_head(grad_logits: Tensor, weight: Tensor) -> Tensor:
    """``grad_logits @ weight`` in grad_logits' type, [c, D]."""
    if weight.dtype == grad_logits.dtype:
        return grad_logits @ weight
    product = grad_logits.new_zeros(grad_logits.shape[0], weight.shape[1])
    for part in _slices(weight):
        product.addmm_(grad_logits[:, part], weight[part].to(grad_logits.dtype))
    return product


def _slices(weight: Tensor) -> list[slice]:
    return _chunks(weight.shape[0], max(1, SLICE_ELEMENTS // weight.shape[1]))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
