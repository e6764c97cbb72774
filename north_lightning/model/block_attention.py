"""Attention over a packed row by blocks: exact, any device, fast in float32 on a CPU.

In: queries, keys and values of a packed row, and a ``BlockPlan``. Out: the attention of every token over its own
document, with an efficient backward pass. Knows neither weights nor configs.

Every document is cut into blocks of B tokens. A block of queries needs the key blocks from the start of its document
(or of its window) up to itself; all blocks that need equally many are one batched matrix product. Only the last key
block of a batch needs a causal mask and only the first ones a window mask, and these masks are the same for every
block: so memory and work grow with the window, not with the row, and no score between two documents is computed.

Shapes: T tokens, H query heads, J key/value heads, G = H / J, C head width; n blocks of a batch, B tokens of a block,
k key blocks that each block of the batch sees; R rows of the batched layout (n, J, G, B) of all batches, end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK_TOKENS = 64
"""B: measured best of 32, 64 and 128 on one and two cores, for documents of 150 to 2,000 tokens."""

MAX_SAVED_SCORES = 2**25
"""A layer keeps its softmax for the backward pass up to this many entries (128 MiB), and recomputes it beyond."""

MAX_BATCH_SCORES = 2**23
"""Largest score matrix of one batched product, in entries (32 MiB)."""


@dataclass(frozen=True)
class BlockBatch:
    """n blocks of queries that see k key blocks each. Indices are into rows of C numbers."""

    num_blocks: int
    num_key_blocks: int
    first_row: int  # of this batch's R rows
    query_index: Tensor  # [n * J * G * B] into qkv [T * (H + 2J)]
    key_index: Tensor  # [n * J * k * B] into the same
    key_blocks: Tensor  # [n * k] padded block of each key block
    window_mask: Tensor | None  # [B, up to 2B - 2]: -inf where the first keys are too far away


@dataclass(frozen=True)
class BlockPlan:
    """How one row is cut for one window."""

    num_heads: int
    num_kv_heads: int
    batches: list[BlockBatch]
    num_padded_blocks: int
    num_scores: int  # over all heads
    causal_mask: Tensor  # [B, B]
    out_index: Tensor  # [T * H] into the R rows
    grad_index: Tensor  # [T * (H + 2J)] into R rows of dq, then dk and dv in padded blocks
    out_grad_index: Tensor  # [R] into [T * H]
    padding_rows: Tensor  # of the R rows


def rotate_pairs(x: Tensor, rotations: Tensor) -> Tensor:
    """RoPE on interleaved pairs (GPT-J): (x[2i], x[2i + 1]) is a complex number, times ``rotations[..., i]``.

    Args:
        x: [T, heads, C], any floating dtype; rotated in float32.
        rotations: [T, 1, C / 2] complex64.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)


def plan_blocks(
    lengths: list[int], num_window_keys: int | None, num_heads: int, num_kv_heads: int, device: torch.device
) -> BlockPlan:
    """Cut documents of ``lengths`` tokens into blocks, and sort the blocks by the number of key blocks they see."""
    size, stride = BLOCK_TOKENS, num_heads + 2 * num_kv_heads
    reach = None if num_window_keys is None else -(-(num_window_keys - 1) // size)  # key blocks before a block's own
    length = torch.tensor(lengths)
    blocks = -(-length // size)  # [N] blocks of each document
    num_blocks = int(blocks.sum())
    document = torch.repeat_interleave(torch.arange(len(lengths)), blocks, output_size=num_blocks)  # of each block
    index = torch.arange(num_blocks) - (blocks.cumsum(0) - blocks)[document]  # of each block in its document
    key_blocks = index + 1 if reach is None else index.clamp(max=reach) + 1  # k of each block

    position = (index * size)[:, None] + torch.arange(size)  # [blocks, B] of each slot, in its document
    is_padding = position >= length[document][:, None]
    # Padding repeats the document's last token: finite, after every real query, and without gradient.
    token = (length.cumsum(0) - length)[document][:, None] + torch.minimum(position, length[document][:, None] - 1)
    kv_head = torch.arange(num_kv_heads)[:, None]

    batches, tokens, rows = [], [], 0
    row_of = torch.empty(num_blocks, num_heads, size, dtype=torch.long)
    for k in key_blocks.unique().tolist():
        blocks_k = (key_blocks == k).nonzero()[:, 0]
        for part in blocks_k.split(max(1, MAX_BATCH_SCORES // (num_heads * size * size * k))):
            n = len(part)
            spans = part[:, None] + torch.arange(1 - k, 1)  # [n, k]
            heads = torch.arange(num_heads)[:, None]
            batches.append(
                BlockBatch(
                    num_blocks=n,
                    num_key_blocks=k,
                    first_row=rows,
                    query_index=(token[part][:, None] * stride + heads).flatten().to(device),
                    key_index=(token[spans].view(n, 1, -1) * stride + num_heads + kv_head).flatten().to(device),
                    key_blocks=spans.flatten().to(device),
                    window_mask=_window_mask(k, num_window_keys, device),
                )
            )
            row_of[part] = rows + torch.arange(n * num_heads * size).view(n, num_heads, size)
            tokens.append(part)
            rows += n * num_heads * size

    order = torch.cat(tokens)  # blocks as the batches hold them
    real = (~is_padding).flatten().nonzero()[:, 0]  # [T] padded slots, in the order of tokens
    out_index = row_of.transpose(1, 2).reshape(-1, num_heads)[real]  # [T, H]
    block, slot = real[:, None] // size, real[:, None] % size
    key_row = rows + (block * num_kv_heads + kv_head.T) * size + slot  # [T, J] after dq's rows
    value_row = key_row + num_blocks * num_kv_heads * size
    return BlockPlan(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        batches=batches,
        num_padded_blocks=num_blocks,
        num_scores=int(key_blocks.sum()) * size * size * num_heads,
        causal_mask=torch.full((size, size), -torch.inf, device=device).triu(1),
        out_index=out_index.flatten().to(device),
        grad_index=torch.cat([out_index, key_row, value_row], 1).flatten().to(device),
        out_grad_index=(token[order][:, None] * num_heads + torch.arange(num_heads)[:, None]).flatten().to(device),
        padding_rows=row_of.transpose(1, 2)[is_padding].flatten().to(device),
    )


def _window_mask(num_key_blocks: int, num_window_keys: int | None, device: torch.device) -> Tensor | None:
    """-inf where a key is ``num_window_keys`` or more tokens before the query; None where there is no such key."""
    width = 0 if num_window_keys is None else num_key_blocks * BLOCK_TOKENS - num_window_keys
    if width <= 0:
        return None
    assert num_window_keys is not None
    query = torch.arange(BLOCK_TOKENS)[:, None] + (num_key_blocks - 1) * BLOCK_TOKENS
    too_far = torch.arange(width) <= query - num_window_keys
    return torch.zeros(BLOCK_TOKENS, width).masked_fill(too_far, -torch.inf).to(device)


def block_attention(qkv: Tensor, plan: BlockPlan, rotations: Tensor | None = None) -> Tensor:
    """Softmax attention of every token over its document, computed in float32.

    Args:
        qkv: [T, H + 2J, C] queries, keys, values.
        plan: how the row is cut.
        rotations: [T, 1, C / 2] complex64, RoPE for queries and keys; None: no positions.

    Returns:
        [T, H, C] in qkv's dtype.
    """
    return _BlockAttention.apply(qkv.float(), plan, rotations).to(qkv.dtype)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, plan: BlockPlan, rotations: Tensor | None) -> Tensor:
        num_tokens, _, width = qkv.shape
        if rotations is not None:
            qkv = qkv.clone()
            _rotate_(qkv, plan, rotations)
        rows = qkv.view(-1, width)  # [T * (H + 2J), C]
        keep = plan.num_scores <= MAX_SAVED_SCORES and ctx.needs_input_grad[0]
        out = qkv.new_empty(plan.out_grad_index.shape[0], width)  # [R, C]
        saved = []
        for batch in plan.batches:
            q, k, v = _gather(rows, batch, plan)
            p = _probabilities(q, k, batch, plan)
            torch.bmm(p, v, out=_query_rows(out, batch, plan))
            saved.append(p if keep else None)
        ctx.save_for_backward(rows, *saved)
        ctx.plan, ctx.rotations = plan, rotations
        return out.index_select(0, plan.out_index).view(num_tokens, plan.num_heads, width)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (d_out,) = grad_outputs
        plan: BlockPlan = ctx.plan
        rows, *saved = ctx.saved_tensors
        num_tokens, _, width = d_out.shape
        scale = width**-0.5
        d_rows = d_out.reshape(-1, width).index_select(0, plan.out_grad_index)  # [R, C]
        d_rows.index_fill_(0, plan.padding_rows, 0.0)

        kv_blocks = (plan.num_padded_blocks, plan.num_kv_heads, BLOCK_TOKENS, width)
        num_kv_rows = plan.num_padded_blocks * plan.num_kv_heads * BLOCK_TOKENS
        grads = d_rows.new_empty(d_rows.shape[0] + 2 * num_kv_rows, width)
        dq, dk, dv = grads.split([d_rows.shape[0], num_kv_rows, num_kv_rows])
        dk, dv = dk.zero_().view(kv_blocks), dv.zero_().view(kv_blocks)
        for batch, p in zip(plan.batches, saved, strict=True):
            q, k, v = _gather(rows, batch, plan)
            if p is None:
                p = _probabilities(q, k, batch, plan)
            d_o = _query_rows(d_rows, batch, plan)
            _add_key_blocks(dv, torch.bmm(p.transpose(1, 2), d_o), batch)
            d_p = torch.bmm(d_o, v.transpose(1, 2))
            d_s = torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_p)
            q_rows = _query_rows(dq, batch, plan)
            torch.baddbmm(q_rows, d_s, k, beta=0, alpha=scale, out=q_rows)
            _add_key_blocks(dk, torch.bmm(d_s.transpose(1, 2), q * scale), batch)

        d_qkv = grads.index_select(0, plan.grad_index).view(num_tokens, -1, width)
        if ctx.rotations is not None:
            _rotate_(d_qkv, plan, ctx.rotations.conj())
        return d_qkv, None, None


def _rotate_(qkv: Tensor, plan: BlockPlan, rotations: Tensor) -> None:
    """Rotate queries and keys in place."""
    qk = qkv[:, : plan.num_heads + plan.num_kv_heads]
    torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(rotations)


def _gather(rows: Tensor, batch: BlockBatch, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [n * J, G * B, C], keys and values [n * J, k * B, C] of a batch."""
    size, width = batch.num_blocks * plan.num_kv_heads, rows.shape[1]
    q = rows.index_select(0, batch.query_index).view(size, -1, width)
    k = rows.index_select(0, batch.key_index).view(size, -1, width)
    v = rows[plan.num_kv_heads :].index_select(0, batch.key_index).view(size, -1, width)
    return q, k, v


def _probabilities(q: Tensor, k: Tensor, batch: BlockBatch, plan: BlockPlan) -> Tensor:
    """softmax(q k^T / sqrt(C) + mask), [n * J, G * B, k * B]."""
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    by_block = scores.view(-1, BLOCK_TOKENS, scores.shape[-1])  # [n * H, B, k * B]
    by_block[..., -BLOCK_TOKENS:] += plan.causal_mask
    if batch.window_mask is not None:
        by_block[..., : batch.window_mask.shape[1]] += batch.window_mask
    return torch.softmax(scores, -1, out=scores)


def _query_rows(rows: Tensor, batch: BlockBatch, plan: BlockPlan) -> Tensor:
    """The batch's part of R rows as [n * J, G * B, C]."""
    num_rows = batch.num_blocks * plan.num_heads * BLOCK_TOKENS
    part = rows[batch.first_row : batch.first_row + num_rows]
    return part.view(batch.num_blocks * plan.num_kv_heads, -1, rows.shape[1])


def _add_key_blocks(blocks: Tensor, grads: Tensor, batch: BlockBatch) -> None:
    """Add [n * J, k * B, C] to the padded blocks [blocks, J, B, C] that the batch's keys came from."""
    _, num_kv_heads, size, width = blocks.shape
    grads = grads.view(batch.num_blocks, num_kv_heads, batch.num_key_blocks, size, width).transpose(1, 2)
    blocks.index_add_(0, batch.key_blocks, grads.reshape(-1, num_kv_heads, size, width))
