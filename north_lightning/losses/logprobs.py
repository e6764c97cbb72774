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

CPU_TILE = (512, 1024)
"""Rows and ids of the logits held at once on a CPU: 2 MiB in float32, which stay in a core's cache. Twice as many of
either are within 5% on one core (widths of 64, 256 and 1024), and four times as many ids 20% slower."""

CUDA_TILE = (4096, 8192)
"""The same on a GPU, 128 MiB: large products, and few kernels to launch. Not tuned."""


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
    tile: tuple[int, int] | None = None,
    with_entropy: bool = False,
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"] | None]:
    """``log softmax(logit_scale / temperature * hidden @ weight.T)[target]``, row by row.

    Computed in float32 whatever the inputs' type and autocast (float64 for float64 inputs), tile by tile in forward and
    backward: no more logits than those of one tile exist at once. Pass only rows that are trained (see
    ``trained_positions``).

    Args:
        hidden: after the final norm.
        weight: the head; the embedding where they are tied.
        targets: ids below V.
        logit_scale: factor the model applies to its logits.
        temperature: that the tokens were sampled with, so that the result is comparable with the sampler's.
        tile: rows and ids of the logits held at once; default: ``CPU_TILE`` or ``CUDA_TILE``.
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
    if tile is None:
        tile = CUDA_TILE if hidden.is_cuda else CPU_TILE
    if min(tile) < 1:
        raise ValueError(f"tile: expected at least one row and one id, got {tile}")
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, targets, logit_scale / temperature, tile, with_entropy)
    return logprobs, entropy if with_entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """Forward keeps one log-normaliser per row; backward makes the logits of each tile again.

    Tiles of c rows and v ids, all rows of a slice of the vocabulary before the next slice: a slice of the head is read
    (and converted) once in each direction, and its gradient is written once. Normaliser and entropy are summed over
    slices as in online softmax (https://arxiv.org/abs/1805.02867, algorithm 3).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: float, tile: tuple[int, int], entropies: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(hidden)
        sums = _RowSums(targets, dtype, entropies)
        with torch.autocast(hidden.device.type, enabled=False):
            for ids in _chunks(weight.shape[0], tile[1]):
                head = weight[ids].to(dtype)
                for rows in _chunks(hidden.shape[0], tile[0]):
                    sums.add(rows, ids, (hidden[rows].to(dtype) * scale) @ head.T)
        log_total = sums.total.log()
        ctx.save_for_backward(hidden, weight, targets, sums.highest + log_total)
        ctx.scale, ctx.tile = scale, tile
        entropy = log_total - sums.moment / sums.total if entropies else sums.moment
        ctx.mark_non_differentiable(entropy)
        return sums.target - sums.highest - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        dtype = _compute_dtype(hidden)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        upstream = grad_logprobs[:, None] * ctx.scale
        with torch.autocast(hidden.device.type, enabled=False):
            for ids in _chunks(weight.shape[0], ctx.tile[1]):
                head = weight[ids].to(dtype)
                grad_head = torch.zeros_like(head) if need_weight else None
                for rows in _chunks(hidden.shape[0], ctx.tile[0]):
                    states = hidden[rows].to(dtype)
                    # d logprob / d logits = onehot(target) - probabilities
                    grad_logits = (states * ctx.scale) @ head.T  # [c, v]
                    grad_logits.sub_(normaliser[rows, None]).exp_().mul_(-upstream[rows])
                    column, is_here = _columns(targets[rows], ids)
                    grad_logits.scatter_add_(-1, column, upstream[rows] * is_here)
                    if grad_hidden is not None:
                        grad_hidden[rows].addmm_(grad_logits, head)
                    if grad_head is not None:
                        grad_head.addmm_(grad_logits.T, states)
                if grad_weight is not None and grad_head is not None:
                    grad_weight[ids] = grad_head
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None


class _RowSums:
    """What softmax needs of every row, over the slices of the vocabulary seen so far; all [R]."""

    def __init__(self, targets: Tensor, dtype: torch.dtype, entropies: bool) -> None:
        self.targets = targets
        self.highest = torch.full(targets.shape, torch.finfo(dtype).min / 2, dtype=dtype, device=targets.device)
        self.total = torch.zeros_like(self.highest)  # sum of exp(logit - highest)
        self.moment = torch.zeros_like(self.highest if entropies else self.highest[:0])  # of exp(x) * x, x as above
        self.target = torch.zeros_like(self.highest)  # the target's logit

    def add(self, rows: slice, ids: slice, logits: Tensor) -> None:
        """Take in a tile [c, v] of logits, which is overwritten."""
        column, is_here = _columns(self.targets[rows], ids)
        self.target[rows] += torch.where(is_here, logits.gather(-1, column), 0.0)[:, 0]
        highest = torch.maximum(self.highest[rows], logits.amax(-1))
        moved = self.highest[rows] - highest
        shrunk = moved.exp()
        logits.sub_(highest[:, None])
        if self.moment.numel():
            exponentials = logits.exp()
            self.moment[rows].add_(moved * self.total[rows]).mul_(shrunk)
            self.moment[rows] += torch.linalg.vecdot(exponentials, logits)
        else:
            exponentials = logits.exp_()
        self.total[rows].mul_(shrunk).add_(exponentials.sum(-1))
        self.highest[rows] = highest


def _columns(targets: Tensor, ids: slice) -> tuple[Tensor, Tensor]:
    """Where in a slice of the vocabulary the targets are, [c, 1], and whether they are in it."""
    column = targets[:, None] - ids.start
    is_here = (column >= 0) & (column < ids.stop - ids.start)
    return column.clamp(0, ids.stop - ids.start - 1), is_here


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
