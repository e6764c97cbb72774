"""Causal attention over a packed row: documents end to end, full or windowed, with or without RoPE.

In: the normed hidden states of a packed row and its ``PackedRow`` (document boundaries and positions, made once per
forward pass and shared by all layers). Out: the attention branch, before the residual sum. Only the reference makes a
mask over the whole row, or computes a score between two documents.

Three implementations of the same mathematics, chosen by ``ComputeConfig.attention``: ``block_attention``, torch's
FlashAttention for packed rows, and, as their reference, one mask over the whole row.

Shapes: T tokens, D model, H query heads, J key/value heads, C head width, N documents.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from north_lightning.errors import ConfigError
from north_lightning.model.block_attention import BlockPlan, block_attention, plan_blocks, rotate_pairs
from north_lightning.model.compute import ComputeConfig
from north_lightning.model.config import NorthConfig


@dataclass
class PackedRow:
    """Where documents start and end, as every layer needs it."""

    cu_seqlens: Tensor  # [N + 1] int32
    lengths: list[int]  # [N]
    positions: Tensor  # [T] int64, from 0 in every document
    rotations: Tensor  # [T, 1, C / 2] complex64: exp(i * position * frequency)
    num_keys_only: int = 0  # leading tokens that are seen but see nothing themselves: computed by another process
    _plans: dict[int | None, BlockPlan] = field(default_factory=dict)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, token_ids: Tensor, config: NorthConfig) -> PackedRow:
        """Read the boundaries of the documents in ``token_ids`` [T]; synchronises if ``cu_seqlens`` is on a GPU.

        Raises:
            ValueError: boundaries that do not start at 0, do not grow, or do not end at T.
        """
        num_tokens = token_ids.shape[0]
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        if not lengths or bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths) < 1:
            raise ValueError(
                f"cu_seqlens: expected increasing boundaries from 0 to {num_tokens} (number of tokens), got {bounds}"
            )
        device = token_ids.device
        cu_seqlens = cu_seqlens.to(device, torch.int32)
        starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=num_tokens)
        positions = torch.arange(num_tokens, device=device) - starts
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        angles = positions[:, None].float() * (1.0 / config.rope_theta**exponents)
        rotations = torch.polar(torch.ones_like(angles), angles)[:, None]
        return cls(cu_seqlens, lengths, positions, rotations)

    def visible_keys(self, num_window_keys: int | None) -> Tensor:
        """[T, T] bool: which keys (columns) a token sees; for short rows."""
        num_tokens = self.positions.shape[0]
        index = torch.arange(num_tokens, device=self.positions.device)
        starts = index - self.positions  # of each token's document
        distance = index[:, None] - index
        visible = (distance >= 0) & (starts[:, None] == starts)
        return visible if num_window_keys is None else visible & (distance < num_window_keys)

    def block_plan(self, num_window_keys: int | None, num_heads: int, num_kv_heads: int) -> BlockPlan:
        """The plan for a window (None: unlimited), made when first asked for."""
        if num_window_keys is not None and num_window_keys >= max(self.lengths):
            num_window_keys = None  # no document is longer than the window
        if num_window_keys not in self._plans:
            device = self.cu_seqlens.device
            self._plans[num_window_keys] = plan_blocks(self.lengths, num_window_keys, num_heads, num_kv_heads, device)
        return self._plans[num_window_keys]


def runs_varlen(qkv: Tensor) -> bool:
    """Whether torch's FlashAttention has a kernel for such a tensor."""
    return qkv.is_cuda and qkv.dtype in (torch.float16, torch.bfloat16)


class Attention(nn.Module):
    """Grouped-query attention without biases or query/key norms."""

    def __init__(self, config: NorthConfig, layer: int, compute: ComputeConfig | None = None) -> None:
        super().__init__()
        self.backend = (compute or ComputeConfig()).attention
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_window_keys = config.num_window_keys if config.is_sliding(layer) else None
        self.uses_rope = config.uses_rope(layer)
        qkv_heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(config.hidden_size, qkv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor, row: PackedRow) -> Tensor:
        qkv = self.qkv_proj(x_TD).unflatten(-1, (-1, self.head_dim))  # [T, H + 2J, C]
        return self.o_proj(self.attend(qkv, row).flatten(1))

    def attend(self, qkv: Tensor, row: PackedRow) -> Tensor:
        """[T - row.num_keys_only, H, C] from queries, keys and values [T, H + 2J, C]."""
        rotations = row.rotations if self.uses_rope else None
        can_varlen = runs_varlen(qkv)
        backend = ("varlen" if can_varlen else "blocks") if self.backend == "auto" else self.backend
        if backend == "blocks":
            plan = row.block_plan(self.num_window_keys, self.num_heads, self.num_kv_heads)
            return block_attention(qkv, plan, rotations)[row.num_keys_only :]
        elif backend == "plain":
            return self._plain_attention(qkv, row, rotations)[row.num_keys_only :]
        elif can_varlen:
            return self._varlen_attention(qkv, row, rotations)
        raise ConfigError(
            f"compute.attention: varlen runs in half precision on CUDA, got {qkv.dtype} on {qkv.device.type}"
        )

    def _plain_attention(self, qkv: Tensor, row: PackedRow, rotations: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in self._split(qkv, rotations))  # [H or J, T, C]
        is_hidden = ~row.visible_keys(self.num_window_keys)
        mask = torch.zeros(is_hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(is_hidden, -torch.inf)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    def _varlen_attention(self, qkv: Tensor, row: PackedRow, rotations: Tensor | None) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # CUDA only

        q, k, v = self._split(qkv, rotations)
        longest = max(row.lengths)
        unlimited = self.num_window_keys is None or self.num_window_keys >= longest
        keys_before = -1 if unlimited else self.num_window_keys - 1  # type: ignore[operator]
        # Where a document has more keys than queries, its last query sees its last key (flash attention's alignment).
        out = varlen_attn(
            q[row.num_keys_only :],
            k,
            v,
            (row.cu_seqlens - row.num_keys_only).clamp(min=0),
            row.cu_seqlens,
            longest,
            longest,
            window_size=(keys_before, 0),
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        assert isinstance(out, Tensor)  # a pair only when auxiliary outputs are asked for
        return out

    def _split(self, qkv: Tensor, rotations: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, C], keys and values [T, J, C]; queries and keys rotated."""
        qk, v = qkv.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=1)
        if rotations is not None:
            qk = rotate_pairs(qk, rotations)
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=1)
        return q, k, v
