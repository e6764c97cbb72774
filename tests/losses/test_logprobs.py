"""Tiled log-probabilities against torch's own log-softmax over all logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.losses import cross_entropy_sum, token_logprobs, trained_positions


def naive(hidden, weight, targets, scale):
    logits = hidden @ weight.T * scale
    log_p = logits.log_softmax(-1)
    return log_p[torch.arange(len(targets)), targets], -(log_p.exp() * log_p).sum(-1)


def inputs(rows, width=6, vocabulary=11, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


def assert_equal_to_log_softmax(hidden, weight, targets, scale, temperature, tile, tolerance):
    upstream = torch.linspace(-1, 2, len(targets))
    logprobs, entropy = token_logprobs(hidden, weight, targets, scale, temperature, tile, with_entropy=True)
    got = torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight))
    expected_logprobs, expected_entropy = naive(hidden, weight, targets, scale / temperature)
    expected = torch.autograd.grad((expected_logprobs * upstream).sum(), (hidden, weight))
    for ours, reference in zip(
        (logprobs, entropy, *got), (expected_logprobs, expected_entropy, *expected), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 17),
    tile=st.sampled_from([None, (1, 4), (3, 1), (16, 10), (17, 11), (100, 100)]),
    scale=st.sampled_from([1.0, 0.0625, 3.0]),
    temperature=st.sampled_from([1.0, 0.7]),
    seed=st.integers(0, 1000),
)
def test_value_entropy_and_gradients_equal_log_softmax_for_any_tile(rows, tile, scale, temperature, seed):
    hidden, weight, targets = inputs(rows, dtype=torch.float64, seed=seed)
    assert_equal_to_log_softmax(hidden, weight, targets, scale, temperature, tile, tolerance=1e-12)


@pytest.mark.parametrize("tile", [None, (5, 70)])
def test_float32_equals_log_softmax_to_1e_6(tile):
    hidden, weight, targets = inputs(17, vocabulary=300)
    assert_equal_to_log_softmax(hidden, weight, targets, 0.25, 1.0, tile, tolerance=1e-6)


@pytest.mark.parametrize("tile", [(2, 3), (100, 100)])
def test_gradients_pass_gradcheck_in_double_precision(tile):
    hidden, weight, targets = inputs(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, 0.5, 0.9, tile)[0], (hidden, weight))


def test_entropy_carries_no_gradient_and_is_none_unless_asked_for():
    hidden, weight, targets = inputs(4)
    assert not token_logprobs(hidden, weight, targets, with_entropy=True)[1].requires_grad
    assert token_logprobs(hidden, weight, targets)[1] is None


def test_frozen_head_gets_no_gradient_and_hidden_the_same_one():
    hidden, weight, targets = inputs(9)
    full = torch.autograd.grad(token_logprobs(hidden, weight, targets, tile=(4, 5))[0].sum(), hidden)[0]
    frozen = weight.detach()
    token_logprobs(hidden, frozen, targets, tile=(4, 5))[0].sum().backward()
    assert torch.equal(hidden.grad, full)
    assert frozen.grad is None


@pytest.mark.parametrize("tile", [(8, 50), (3, 7)])
def test_bf16_inputs_are_computed_in_float32_even_under_autocast(tile):
    hidden, weight, targets = inputs(8, width=64, vocabulary=50)
    hidden_16, weight_16 = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = token_logprobs(hidden_16, weight_16, targets, tile=tile)
    expected, _ = naive(hidden_16.float(), weight_16.float(), targets, 1.0)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-5)
    logprobs.sum().backward()
    (exact,) = torch.autograd.grad(expected.sum(), hidden_16)
    assert hidden_16.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden_16.grad, exact, rtol=1e-2, atol=1e-2)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    logprobs, _ = token_logprobs(hidden, weight, torch.tensor([0, 0]))
    logprobs.sum().backward()
    assert logprobs.tolist() == [0.0, -2e4]
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


def test_no_tensor_ever_holds_more_logits_than_a_tile():
    """Largest storage seen by any operation, forward and backward, counted by a dispatch mode."""
    from torch.utils._python_dispatch import TorchDispatchMode

    hidden, weight, targets = inputs(64, width=2, vocabulary=100)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        token_logprobs(hidden, weight, targets, tile=(8, 40), with_entropy=True)[0].sum().backward()
    assert largest == 8 * 40


def test_wrong_arguments_are_refused_by_name():
    hidden, weight, targets = inputs(3)
    with pytest.raises(ValueError, match="targets: expected shape"):
        token_logprobs(hidden, weight, targets[:2])
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match="tile: expected at least one row and one id"):
        token_logprobs(hidden, weight, targets, tile=(4, 0))


def test_cross_entropy_sum_equals_torch_cross_entropy():
    hidden, weight, targets = inputs(12)
    total, losses = cross_entropy_sum(hidden, weight, targets, 0.5, tile=(5, 4))
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T * 0.5, targets, reduction="none")
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-6, atol=1e-6)
    assert not losses.requires_grad
    ours = torch.autograd.grad(total, (hidden, weight))
    for got, reference in zip(ours, torch.autograd.grad(expected.sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-6, atol=1e-6)


def test_trained_positions_predict_each_token_from_the_one_before_it_in_its_document():
    token_ids = torch.tensor([10, 11, 12, 20, 21])
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    mask = torch.tensor([False, True, True, False, True])
    source, targets = trained_positions(token_ids, cu_seqlens, mask)
    assert source.tolist() == [0, 1, 3]
    assert targets.tolist() == [11, 12, 21]


def test_trained_positions_of_a_row_without_trained_tokens_are_empty():
    source, targets = trained_positions(torch.arange(3), torch.tensor([0, 3]), torch.zeros(3, dtype=torch.bool))
    assert source.numel() == targets.numel() == 0


def test_a_trained_first_token_is_refused_and_its_document_named():
    mask = torch.tensor([False, True, True, True])
    with pytest.raises(ValueError, match=r"documents \[1\]"):
        trained_positions(torch.arange(4), torch.tensor([0, 2, 4]), mask)


@pytest.mark.parametrize("cu_seqlens", [[0, 2], [1, 4], [0, 3, 3, 4], [0, 5]])
def test_document_boundaries_that_do_not_cover_the_row_are_refused(cu_seqlens):
    with pytest.raises(ValueError, match="cu_seqlens"):
        trained_positions(torch.arange(4), torch.tensor(cu_seqlens), torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("tile", [None, (2, 3)])
def test_logits_that_are_all_far_below_zero_are_like_any_others(tile):
    hidden, weight = (
        torch.tensor([[1.0, 0.5], [2.0, -1.0]]),
        torch.tensor([[-200.0, 1.0], [-201.0, 0.0], [-199.5, 3.0]]),
    )
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 2]), tile=tile, with_entropy=True)
    expected_logprobs, expected_entropy = naive(hidden, weight, torch.tensor([0, 2]), 1.0)
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)
