"""Logits and gradients equal transformers', in its own reading of the window, to 1e-5 in float32."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers_reference import (
    loss_of,
    make_reference,
    our_logits,
    ours_from,
    random_documents,
    reference_gradients,
    reference_logits,
)

from north_lightning.model import NorthModel, named_hf_tensors


def our_gradients(model: NorthModel) -> dict[str, torch.Tensor]:
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for holder, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
            assert parameter.grad is not None
            holder.copy_(parameter.grad)
    return dict(named_hf_tensors(gradients))


def assert_parity(reference, lengths: list[int], seed: int = 0) -> None:
    model = ours_from(reference)
    documents = random_documents(lengths, seed, vocab_size=model.config.vocab_size)
    expected, actual = reference_logits(reference, documents), our_logits(model, documents)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    loss_of(expected, documents).backward()
    loss_of(actual, documents).backward()
    expected_gradients, actual_gradients = reference_gradients(reference), our_gradients(model)
    assert actual_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


@st.composite
def shapes(draw):
    num_kv_heads = draw(st.integers(1, 3))
    num_experts = draw(st.integers(2, 12))
    norm = draw(st.sampled_from(["rms", "layer"]))
    return {
        "hidden_size": 8 * draw(st.integers(2, 6)),
        "intermediate_size": 8 * draw(st.integers(1, 4)),
        "prefix_dense_intermediate_size": draw(st.sampled_from([None, 24, 40])),
        "num_hidden_layers": draw(st.integers(2, 6)),
        "first_k_dense_replace": draw(st.integers(0, 2)),
        "prefix_dense_sliding_window_pattern": draw(st.integers(1, 2)),
        "sliding_window_pattern": draw(st.integers(2, 4)),
        "num_key_value_heads": num_kv_heads,
        "num_attention_heads": num_kv_heads * draw(st.integers(1, 3)),
        "head_dim": 2 * draw(st.integers(2, 12)),
        "sliding_window": draw(st.sampled_from([1, 2, 5, 31, 64, 65, 100])),
        "num_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, min(4, num_experts))),
        "norm_topk_prob": draw(st.booleans()),
        "rms_norm_eps": 1e-6 if norm == "rms" else None,
        "layer_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 50000.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.0625, 0.5])),
        "initializer_range": 0.1,
    }


@settings(max_examples=25, deadline=None, derandomize=True)
@given(shapes(), st.lists(st.integers(1, 150), min_size=1, max_size=4), st.integers(0, 1000))
def test_logits_and_gradients_equal_transformers_on_random_shapes_and_packings(shape, lengths, seed):
    assert_parity(make_reference(seed, **shape), lengths, seed)


@pytest.mark.parametrize("sliding_window", [3, 63, 64, 65, 127])
def test_one_document_much_longer_than_the_window_equals_transformers(sliding_window):
    assert_parity(make_reference(sliding_window=sliding_window, initializer_range=0.1), [400])


def test_long_and_short_documents_in_one_row_equal_transformers():
    assert_parity(make_reference(sliding_window=40, initializer_range=0.1), [1, 2, 300, 63, 64, 65, 17])


def test_the_quickstart_shape_equals_transformers():
    shape = {"hidden_size": 128, "intermediate_size": 64, "head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4}
    reference = make_reference(**shape, vocab_size=1024, sliding_window=127, initializer_range=0.05)
    assert_parity(reference, [200, 330, 40])


def test_the_default_window_sees_one_key_more_than_transformers():
    """Equal up to position ``sliding_window``, different from there on; equal again if transformers is given W + 1."""
    reference = make_reference(sliding_window=12)
    model = ours_from(reference, transformers_window=False)
    documents = random_documents([40])
    with torch.no_grad():
        ours, theirs = our_logits(model, documents), reference_logits(reference, documents)
        torch.testing.assert_close(ours[:12], theirs[:12], atol=1e-5, rtol=1e-5)
        assert (ours[12] - theirs[12]).abs().max() > 1e-3
        wider = make_reference(sliding_window=13)  # the same weights: the same seed
        torch.testing.assert_close(ours, reference_logits(wider, documents), atol=1e-5, rtol=1e-5)


def test_packing_does_not_change_a_document():
    model = ours_from(make_reference())
    documents = random_documents([70, 5, 129])
    with torch.no_grad():
        alone = torch.cat([our_logits(model, [document]) for document in documents])
        torch.testing.assert_close(our_logits(model, documents), alone, atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_close_to_float32():
    model = ours_from(make_reference(initializer_range=0.05))
    documents = random_documents([90, 20])
    with torch.no_grad():
        full = our_logits(model, documents)
        half = our_logits(model.to(torch.bfloat16), documents)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()


def test_autocast_trains_and_stays_close_to_float32():
    model = ours_from(make_reference(initializer_range=0.05))
    documents = random_documents([90, 20])
    full = loss_of(our_logits(model, documents), documents)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = loss_of(our_logits(model, documents).float(), documents)
        mixed.backward()
    assert abs(mixed.item() - full.item()) < 0.02
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("bounds", "num_tokens"), [([0, 3], 4), ([1, 4], 4), ([0, 2, 2, 4], 4), ([0, 3, 2, 4], 4), ([0], 4), ([0, 5], 4)]
)
def test_document_boundaries_that_do_not_fit_are_refused(bounds, num_tokens):
    model = ours_from(make_reference(num_hidden_layers=2))
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(torch.ones(num_tokens, dtype=torch.long), torch.tensor(bounds, dtype=torch.int32))


def test_a_batch_dimension_is_refused():
    model = ours_from(make_reference(num_hidden_layers=2))
    with pytest.raises(ValueError, match="packed row"):
        model(torch.ones(1, 4, dtype=torch.long), torch.tensor([0, 4], dtype=torch.int32))
