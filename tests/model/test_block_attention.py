"""Block attention against softmax(q k^T / sqrt(C) + mask) v written out over the whole row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.model import NorthConfig, attention, block_attention
from north_lightning.model.attention import PackedRow

CPU = torch.device("cpu")


def written_out(qkv, num_heads, num_kv_heads, lengths, num_window_keys):
    """The definition, with one mask over the whole row."""
    q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], 1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(len(qkv))[:, None] - torch.arange(len(qkv))
    visible = (document[:, None] == document) & (distance >= 0)
    if num_window_keys is not None:
        visible &= distance < num_window_keys
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, 1) for x in (k, v))
    scores = torch.einsum("thc,shc->hts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hts,shc->thc", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def assert_equal_to_definition(lengths, num_window_keys, num_heads=4, num_kv_heads=2, head_dim=8):
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = (sum(lengths), num_heads + 2 * num_kv_heads, head_dim)
    qkv = torch.randn(shape, generator=generator, requires_grad=True)
    plan = block_attention.plan_blocks(lengths, num_window_keys, num_heads, num_kv_heads, CPU)
    out = block_attention.block_attention(qkv, plan)
    expected = written_out(qkv, num_heads, num_kv_heads, lengths, num_window_keys)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    d_out = torch.randn(out.shape, generator=generator)
    (grad,) = torch.autograd.grad(out, qkv, d_out)
    (expected_grad,) = torch.autograd.grad(expected, qkv, d_out)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 200), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(1, 220)),
    st.sampled_from([(1, 1), (4, 2), (4, 4), (6, 2)]),
)
def test_any_documents_and_window_equal_the_definition(lengths, num_window_keys, heads):
    assert_equal_to_definition(lengths, num_window_keys, *heads)


@pytest.mark.parametrize("num_window_keys", [1, 64, 65, 129, None])
def test_split_batches_equal_the_definition(num_window_keys, monkeypatch):
    monkeypatch.setattr(block_attention, "MAX_BATCH_SCORES", 2 * 4 * 64 * 64)
    assert_equal_to_definition([300, 10, 190], num_window_keys)


def test_a_long_document_needs_memory_for_its_window_only():
    """65,536 tokens with a window of 128 keys: 3 key blocks for each block of queries, not 1,024."""
    plan = block_attention.plan_blocks([65536], 128, 1, 1, CPU)
    assert sum(batch.num_blocks * batch.num_key_blocks for batch in plan.batches) <= 1024 * 3
    assert max(batch.mask.numel() for batch in plan.batches) <= 64 * 3 * 64


def test_packed_row_restarts_positions():
    config = NorthConfig(64, 16, 8, 2, 2, 1, 8, 4, 2)
    row = PackedRow.from_cu_seqlens(torch.tensor([0, 3, 4, 6]), torch.zeros(6, dtype=torch.long), config)
    assert row.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert row.lengths == [3, 1, 2]


def flash_definition(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size, enable_gqa):
    """What ``varlen_attn`` documents: key j is visible to query i if i - left <= j <= i + right; -1 is unlimited."""
    left, right = window_size
    assert right == 0
    assert enable_gqa == (q.shape[1] != k.shape[1])
    lengths = cu_q.diff().tolist()
    assert max_q == max_k == max(lengths)
    assert cu_q.dtype == torch.int32
    keys = None if left == -1 else left + 1
    return written_out(torch.cat([q, k, v], 1), q.shape[1], k.shape[1], lengths, keys)


@pytest.mark.parametrize("layer", [0, 1, 4])
@pytest.mark.parametrize("includes_current", [False, True])
def test_the_flash_path_asks_for_the_same_attention(layer, includes_current, monkeypatch):
    """Same windows, boundaries and RoPE as block attention: only the kernel differs, and it needs CUDA."""
    config = NorthConfig(
        64, 16, 8, 5, 4, 2, 8, 4, 2, sliding_window=12, sliding_window_includes_current=includes_current
    )
    torch.manual_seed(0)
    module = attention.Attention(config, layer)
    x = torch.randn(100, 16)
    row = PackedRow.from_cu_seqlens(torch.tensor([0, 30, 100]), torch.zeros(100, dtype=torch.long), config)
    expected = module(x, row)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash_definition)
    qkv = module.qkv_proj(x).unflatten(-1, (-1, 8))
    actual = module.o_proj(module._varlen_attention(qkv, row, row.rotations if module.uses_rope else None).flatten(1))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
