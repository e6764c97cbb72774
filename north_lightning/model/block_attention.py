"""Attention over a packed row by blocks: exact, any device, fast in float32 on a CPU.

In: queries, keys and values of a packed row, and a ``BlockPlan``. Out: the attention of every token over its own
document, with an efficient backward pass. Knows neither weights nor configs.

Every document is cut into blocks of B tokens. A block of queries needs the key blocks from the start of its document
(or of its window) up to itself; all blocks that need equally many are one batched matrix product. The mask within such
a product is the same for every block, and small. So memory and work grow with the window, not with the row, and no
score between two documents is computed.

Shapes: T tokens, H query heads, J key/value heads, G = H / J, C head width; n blocks of a batch, B tokens of a block,
k key blocks that each block of the batch sees; R rows of the batched layout (n, J, G, B) of all batches, end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

BLOCK_TOKENS = 64
"""B: best of 32, 64 and 128 on one core (heads of 32, window of 128 keys, documents of 60 to 700 tokens)."""

MAX_SAVED_SCORES = 2**25
"""A layer keeps its softmax for the backward pass up to this many entries (128 MiB), and recomputes it beyond."""

MAX_BATCH_SCORES = 2**19
"""Largest score matrix of one batched product, in entries: 2 MiB stay in a core's cache, 20% faster than 32 MiB."""


@dataclass(frozen=True)
class BlockBatch:
    """n blocks of queries that see k key blocks each. Indices are into rows of C numbers."""

    num_blocks: int
    num_key_blocks: int
    first_row: int  # of this batch's R rows
    query_index: Tensor  # [n * J * G * B] into qkv [T * (H + 2J)]
    key_index: Tensor  # [n * J * k * B] into the same
    key_blocks: Tensor  # [n * k] padded block of each key block
    mask: Tensor  # [B, m] added to the scores of the last m keys: 0, or -inf where a key is hidden


@dataclass(frozen=True)
class BlockPlan:
    """How one row is cut for one window."""

    num_heads: int
    num_kv_heads: int
    batches: list[BlockBatch]
    num_padded_blocks: int
    num_scores: int  # over all heads
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
                    mask=_mask(k, num_window_keys, device),
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
        out_index=out_index.flatten().to(device),
        grad_index=torch.cat([out_index, key_row, value_row], 1).flatten().to(device),
        out_grad_index=(token[order][:, None] * num_heads + torch.arange(num_heads)[:, None]).flatten().to(device),
        padding_rows=row_of.transpose(1, 2)[is_padding].flatten().to(device),
    )


def _mask(num_key_blocks: int, num_window_keys: int | None, device: torch.device) -> Tensor:
    """Of a block's queries and its last keys: only its own block where no key is out of the window, else all keys."""
    size = BLOCK_TOKENS
    is_cut = num_window_keys is not None and num_key_blocks * size > num_window_keys
    num_keys = num_key_blocks * size if is_cut else size
    distance = torch.arange(num_keys - size, num_keys)[:, None] - torch.arange(num_keys)  # how far back a key is
    hidden = distance < 0
    if num_window_keys is not None:
        hidden |= distance >= num_window_keys
    return torch.zeros(size, num_keys).masked_fill(hidden, -torch.inf).to(device)


def block_attention(qkv: Tensor, plan: BlockPlan, rotations: Tensor | None = None) -> Tensor:
    """Softmax attention of every token over its document, computed in float32 whatever the dtype and autocast.

    Args:
        qkv: [T, H + 2J, C] queries, keys, values.
        plan: how the row is cut.
        rotations: [T, 1, C / 2] complex64, RoPE for queries and keys; None: no positions.

    Returns:
        [T, H, C] in qkv's dtype.
    """
    with torch.autocast(qkv.device.type, enabled=False):
        return _BlockAttention.apply(qkv.float(), plan, rotations).to(qkv.dtype)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
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
            p = _probabilities(q, k, batch)
            torch.bmm(p, v, out=_query_rows(out, batch, plan))
            if keep:
                saved += [q, k, v, p]
        ctx.save_for_backward(*(saved if keep else [rows]))
        ctx.plan, ctx.rotations, ctx.keep = plan, rotations, keep
        return out.index_select(0, plan.out_index).view(num_tokens, plan.num_heads, width)

    @staticmethod
    @custom_bwd(device_type="cpu")  # autocast stays off, whatever is on where backward is called
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (d_out,) = grad_outputs
        plan: BlockPlan = ctx.plan
        num_tokens, _, width = d_out.shape
        d_rows = d_out.reshape(-1, width).index_select(0, plan.out_grad_index)  # [R, C]
        d_rows.index_fill_(0, plan.padding_rows, 0.0)

        kv_blocks = (plan.num_padded_blocks, plan.num_kv_heads, BLOCK_TOKENS, width)
        num_kv_rows = plan.num_padded_blocks * plan.num_kv_heads * BLOCK_TOKENS
        grads = d_rows.new_empty(d_rows.shape[0] + 2 * num_kv_rows, width)
        dq, dk, dv = grads.split([d_rows.shape[0], num_kv_rows, num_kv_rows])
        dk, dv = dk.zero_().view(kv_blocks), dv.zero_().view(kv_blocks)
        saved = ctx.saved_tensors  # read once: under activation checkpointing a second time is refused
        for index, batch in enumerate(plan.batches):
            if ctx.keep:
                q, k, v, p = saved[4 * index : 4 * index + 4]
            else:
                q, k, v = _gather(saved[0], batch, plan)
                p = _probabilities(q, k, batch)
            d_o = _query_rows(d_rows, batch, plan)
            _add_key_blocks(dv, torch.bmm(p.transpose(1, 2), d_o), batch)
            d_p = torch.bmm(d_o, v.transpose(1, 2))
            d_s = torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_p)
            q_rows = _query_rows(dq, batch, plan)
            torch.baddbmm(q_rows, d_s, k, beta=0, alpha=width**-0.5, out=q_rows)
            _add_key_blocks(dk, torch.bmm(d_s.transpose(1, 2), q), batch)

        d_qkv = grads.index_select(0, plan.grad_index).view(num_tokens, -1, width)
        if ctx.rotations is not None:
            _rotate_(d_qkv, plan, ctx.rotations.conj())
        return d_qkv, None, None


def _rotate_(qkv: Tensor, plan: BlockPlan, rotations: Tensor) -> None:
    """Rotate queries and keys in place."""
    qk = qkv[:, : plan.num_heads + plan.num_kv_heads]
    torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(rotations)


def _gather(rows: Tensor, batch: BlockBatch, plan: BlockPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Queries / sqrt(C) [n * J, G * B, C], keys and values [n * J, k * B, C] of a batch."""
    size, width = batch.num_blocks * plan.num_kv_heads, rows.shape[1]
    q = rows.index_select(0, batch.query_index).mul_(width**-0.5)
    k = rows.index_select(0, batch.key_index)
    v = rows[plan.num_kv_heads :].index_select(0, batch.key_index)
    return q.view(size, -1, width), k.view(size, -1, width), v.view(size, -1, width)


def _probabilities(q: Tensor, k: Tensor, batch: BlockBatch) -> Tensor:
    """softmax(q k^T + mask), [n * J, G * B, k * B]."""
    scores = torch.bmm(q, k.transpose(1, 2))
    by_block = scores.view(-1, BLOCK_TOKENS, scores.shape[-1])  # [n * H, B, k * B]
    by_block[..., -batch.mask.shape[1] :] += batch.mask
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
