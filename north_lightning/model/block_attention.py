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

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd

BLOCK_TOKENS = 64
"""B: best of 32, 64 and 128 on one core (heads of 32, window of 128 keys, documents of 60 to 700 tokens)."""

MAX_BATCH_SCORES = 2**18
"""Largest score matrix of one batched product, in entries: 1 MiB, so that the backward pass's two stay in a core's
cache. Making the scores again there is no slower than reading kept ones from memory."""


@dataclass(frozen=True)
class BlockBatch:
    """n blocks of queries that see k key blocks each."""

    num_blocks: int
    num_key_blocks: int
    first_row: int  # of this batch's R rows
    key_blocks: Tensor  # [n * J * k] into the padded blocks of keys [blocks * J]
    mask: Tensor  # [B, m] added to the scores of the last m keys: 0, or -inf where a key is hidden


@dataclass(frozen=True)
class BlockPlan:
    """How one row is cut for one window. Indices are into rows of C numbers."""

    num_heads: int
    num_kv_heads: int
    batches: list[BlockBatch]
    query_index: Tensor  # [R] into qkv [T * (H + 2J)]
    key_index: Tensor  # [blocks * J * B] into the same
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
            batches.append(
                BlockBatch(
                    num_blocks=n,
                    num_key_blocks=k,
                    first_row=rows,
                    key_blocks=(spans[:, None] * num_kv_heads + kv_head).flatten().to(device),
                    mask=_mask(k, num_window_keys, device),
                )
            )
            row_of[part] = rows + torch.arange(n * num_heads * size).view(n, num_heads, size)
            tokens.append(part)
            rows += n * num_heads * size

    query_token = token[torch.cat(tokens)][:, None]  # [blocks, 1, B], as the batches hold them
    head = torch.arange(num_heads)[:, None]
    real = (~is_padding).flatten().nonzero()[:, 0]  # [T] padded slots, in the order of tokens
    out_index = row_of.transpose(1, 2).reshape(-1, num_heads)[real]  # [T, H]
    block, slot = real[:, None] // size, real[:, None] % size
    key_row = rows + (block * num_kv_heads + kv_head.T) * size + slot  # [T, J] after dq's rows
    value_row = key_row + num_blocks * num_kv_heads * size
    return BlockPlan(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        batches=batches,
        query_index=(query_token * stride + head).flatten().to(device),
        key_index=(token[:, None] * stride + num_heads + kv_head).flatten().to(device),
        out_index=out_index.flatten().to(device),
        grad_index=torch.cat([out_index, key_row, value_row], 1).flatten().to(device),
        out_grad_index=(query_token * num_heads + head).flatten().to(device),
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
        queries = rows.index_select(0, plan.query_index).mul_(width**-0.5)  # [R, C]
        keys = rows.index_select(0, plan.key_index)  # [blocks * J * B, C]
        values = rows[plan.num_kv_heads :].index_select(0, plan.key_index)
        out = torch.empty_like(queries)
        scratch = _scratch(queries, plan)
        for batch in plan.batches:
            p = _probabilities(_query_rows(queries, batch, plan), _key_rows(keys, batch, plan), batch, scratch)
            torch.bmm(p, _key_rows(values, batch, plan), out=_query_rows(out, batch, plan))
        ctx.save_for_backward(queries, keys, values)
        ctx.plan, ctx.rotations = plan, rotations
        return out.index_select(0, plan.out_index).view(num_tokens, plan.num_heads, width)

    @staticmethod
    @custom_bwd(device_type="cpu")  # autocast stays off, whatever is on where backward is called
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (d_out,) = grad_outputs
        plan: BlockPlan = ctx.plan
        queries, keys, values = ctx.saved_tensors
        num_tokens, _, width = d_out.shape
        d_rows = d_out.reshape(-1, width).index_select(0, plan.out_grad_index)  # [R, C]
        d_rows.index_fill_(0, plan.padding_rows, 0.0)

        grads = d_rows.new_empty(len(d_rows) + 2 * len(keys), width)
        dq, dk, dv = grads.split([len(d_rows), len(keys), len(keys)])
        dk.zero_()
        dv.zero_()
        scratch, scratch_grad = _scratch(queries, plan), _scratch(queries, plan)
        for batch in plan.batches:
            q, k = _query_rows(queries, batch, plan), _key_rows(keys, batch, plan)
            p = _probabilities(q, k, batch, scratch)
            d_o = _query_rows(d_rows, batch, plan)
            _add_key_rows(dv, torch.bmm(p.transpose(1, 2), d_o), batch)
            d_p = scratch_grad[: p.numel()].view_as(p)
            torch.bmm(d_o, _key_rows(values, batch, plan).transpose(1, 2), out=d_p)
            d_s = torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_p)
            torch.bmm(d_s, k, out=_query_rows(dq, batch, plan))
            _add_key_rows(dk, torch.bmm(d_s.transpose(1, 2), q), batch)
        dq.mul_(width**-0.5)

        d_qkv = grads.index_select(0, plan.grad_index).view(num_tokens, -1, width)
        if ctx.rotations is not None:
            _rotate_(d_qkv, plan, ctx.rotations.conj())
        return d_qkv, None, None


def _rotate_(qkv: Tensor, plan: BlockPlan, rotations: Tensor) -> None:
    """Rotate queries and keys in place."""
    qk = qkv[:, : plan.num_heads + plan.num_kv_heads]
    torch.view_as_complex(qk.unflatten(-1, (-1, 2))).mul_(rotations)


def _scratch(rows: Tensor, plan: BlockPlan) -> Tensor:
    """Room for the scores of any one batch."""
    largest = max(batch.num_blocks * batch.num_key_blocks for batch in plan.batches)
    return rows.new_empty(largest * plan.num_heads * BLOCK_TOKENS**2)


def _probabilities(q: Tensor, k: Tensor, batch: BlockBatch, scratch: Tensor) -> Tensor:
    """softmax(q k^T + mask), [n * J, G * B, k * B], in ``scratch``."""
    shape = (q.shape[0], q.shape[1], k.shape[1])
    scores = torch.bmm(q, k.transpose(1, 2), out=scratch[: math.prod(shape)].view(shape))
    by_block = scores.view(-1, BLOCK_TOKENS, shape[2])  # [n * H, B, k * B]
    by_block[..., -batch.mask.shape[1] :] += batch.mask
    return torch.softmax(scores, -1, out=scores)


def _query_rows(rows: Tensor, batch: BlockBatch, plan: BlockPlan) -> Tensor:
    """The batch's part of R rows as [n * J, G * B, C]."""
    num_rows = batch.num_blocks * plan.num_heads * BLOCK_TOKENS
    part = rows[batch.first_row : batch.first_row + num_rows]
    return part.view(batch.num_blocks * plan.num_kv_heads, -1, rows.shape[1])


def _key_rows(rows: Tensor, batch: BlockBatch, plan: BlockPlan) -> Tensor:
    """Keys or values of the batch, [n * J, k * B, C], from padded blocks [blocks * J * B, C]."""
    width = rows.shape[1]
    blocks = rows.view(-1, BLOCK_TOKENS * width).index_select(0, batch.key_blocks)
    return blocks.view(batch.num_blocks * plan.num_kv_heads, -1, width)


def _add_key_rows(rows: Tensor, grads: Tensor, batch: BlockBatch) -> None:
    """Add [n * J, k * B, C] to the padded blocks [blocks * J * B, C] that the batch's keys came from."""
    block = BLOCK_TOKENS * rows.shape[1]
    rows.view(-1, block).index_add_(0, batch.key_blocks, grads.view(-1, block))
