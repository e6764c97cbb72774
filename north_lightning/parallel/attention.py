"""Attention in a model whose rows are shared: context and tensor parallelism.

In: hidden states of this process's tokens. Out: the attention branch for them. Between layers every process holds the
hidden states of its own tokens only. For the attention the processes of a tensor group gather their tokens, each
computes a part of the heads for all of them, and the sum of their outputs is shared out again. All other parts of the
model (norms, dense MLP, experts, head) work token by token, so tensor parallelism divides them without communication.

Weights are stored alike whatever ``tensor`` is (see ``mesh``): FSDP gathers a layer's dense weights whole, and a
process computes with its heads' rows and columns of them. At the released shape these are 38 MB a layer in bf16, 3% of
the layer's weights; in return nothing on disk depends on ``tensor``.

Shapes: T tokens (those held by this process; once gathered, those of its context process's piece), D model; of this
process's part: H query heads, J key/value heads; C head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from north_lightning.errors import ConfigError
from north_lightning.model.attention import Attention, PackedRow
from north_lightning.parallel.exchange import gather_rows, reduce_rows
from north_lightning.parallel.mesh import Layout
from north_lightning.parallel.rows import KeysBefore, RowPieces


class SharedRows:
    """What all layers of a model know about the row that is being computed, derived when first asked for."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._row: PackedRow | None = None
        self._keys: dict[int | None, KeysBefore] = {}

    def pieces(self, num_tokens: int) -> RowPieces:
        return RowPieces(num_tokens, self.layout)

    def keys_before(self, row: PackedRow, num_window_keys: int | None) -> KeysBefore:
        if row is not self._row:
            self._row, self._keys = row, {}
        if num_window_keys not in self._keys:
            bounds = self.pieces(len(row.positions)).context_bounds
            self._keys[num_window_keys] = KeysBefore(row, bounds, num_window_keys, self.layout)
        return self._keys[num_window_keys]


class SharedAttention:
    """``Attention.forward`` for a process that holds a piece of the row and computes a part of the heads.

    Raises:
        ConfigError: the heads cannot be divided.
    """

    def __init__(self, attention: Attention, rows: SharedRows) -> None:
        tensor = rows.layout.sizes.tensor
        if attention.num_kv_heads % tensor:
            raise ConfigError(
                f"strategy.tensor: expected a divisor of num_key_value_heads ({attention.num_kv_heads}), got {tensor}"
            )
        _refuse_unsliceable(tensor, attention.qkv_proj, attention.o_proj)
        attention.num_heads //= tensor  # of this process
        attention.num_kv_heads //= tensor
        self._attention, self._rows = attention, rows

    def __call__(self, x_TD: Tensor, row: PackedRow) -> Tensor:
        attention, layout = self._attention, self._rows.layout
        counts = self._rows.pieces(len(row.positions)).tensor_counts
        shares_heads = layout.sizes.tensor > 1
        x_TD = gather_rows(x_TD, counts, layout.tensor_group) if shares_heads else x_TD
        qkv = self._project(x_TD).unflatten(-1, (-1, attention.head_dim))  # [T, H + 2J, C]
        if layout.sizes.context > 1:
            keys = self._rows.keys_before(row, attention.num_window_keys)
            qkv, row = keys.fetch(qkv, attention.num_heads), keys.row
        heads = attention.attend(qkv, row).flatten(1)
        if not shares_heads:
            return attention.o_proj(heads)
        columns = _part(layout, attention.num_heads * attention.head_dim)
        return reduce_rows(F.linear(heads, attention.o_proj.weight[:, columns]), counts, layout.tensor_group)

    def _project(self, x_TD: Tensor) -> Tensor:
        """[T, (H + 2J) C] of this process's heads; the whole weight lies as all queries, all keys, all values."""
        attention, layout = self._attention, self._rows.layout
        if layout.sizes.tensor == 1:
            return attention.qkv_proj(x_TD)
        sizes = [n * attention.head_dim for n in (attention.num_heads, attention.num_kv_heads, attention.num_kv_heads)]
        wholes = attention.qkv_proj.weight.split([size * layout.sizes.tensor for size in sizes])
        parts = [whole[_part(layout, size)] for whole, size in zip(wholes, sizes, strict=True)]
        return F.linear(x_TD, torch.cat(parts))


def _part(layout: Layout, size: int) -> slice:
    """The ``size`` rows or columns that belong to this process of the tensor group."""
    return slice(layout.tensor_rank * size, (layout.tensor_rank + 1) * size)


def _refuse_unsliceable(tensor: int, *projections: nn.Module) -> None:
    """Only a plain linear layer has a weight that rows and columns can be taken of (an adapter's sum has not)."""
    for projection in projections:
        if tensor > 1 and type(projection) is not nn.Linear:
            raise ConfigError(f"strategy.tensor: expected 1 with {type(projection).__name__} layers, got {tensor}")
