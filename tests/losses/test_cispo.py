"""CISPO against an independent reference written from the paper, value and gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.interfaces import PolicyLossInputs
from north_lightning.losses import CISPOLoss, combine_metrics

NAN, INF = float("nan"), float("inf")


def reference(trainer, rollout, advantages, mask, total, cap):
    """Equations 4 and 5 token by token in plain Python: the value, and the gradient with respect to ``trainer``."""
    value, gradient = 0.0, [0.0] * len(trainer)
    for t, trained in enumerate(mask):
        if trained:
            weight = min(math.exp(trainer[t] - rollout[t]), cap)
            value -= weight * advantages[t] * trainer[t] / total
            gradient[t] = -weight * advantages[t] / total
    return value, gradient


def make(trainer, rollout, advantages, mask, total, entropy=None):
    leaf = torch.tensor(trainer, dtype=torch.float32, requires_grad=True)
    return leaf, PolicyLossInputs(
        trainer_logprobs=leaf,
        rollout_logprobs=torch.tensor(rollout, dtype=torch.float32),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        loss_mask=torch.tensor(mask, dtype=torch.bool),
        num_trained_tokens=total,
        entropy=None if entropy is None else torch.tensor(entropy, dtype=torch.float32),
    )


tokens = st.lists(
    st.tuples(st.floats(-9, 0, width=32), st.floats(-9, 0, width=32), st.floats(-2, 2, width=32), st.booleans()),
    min_size=1,
    max_size=24,
)


@settings(deadline=None, max_examples=150)
@given(tokens=tokens, cap=st.sampled_from([1.0, 2.0, 5.0]), elsewhere=st.integers(0, 50))
def test_value_and_gradient_equal_the_reference(tokens, cap, elsewhere):
    trainer, rollout, advantages, mask = (list(column) for column in zip(*tokens, strict=True))
    total = max(1, sum(mask) + elsewhere)
    leaf, inputs = make(trainer, rollout, advantages, mask, total)
    loss = CISPOLoss(cap)(inputs).loss
    loss.backward()
    value, gradient = reference(trainer, rollout, advantages, mask, total, cap)
    assert loss.item() == pytest.approx(value, rel=1e-6, abs=1e-5)
    torch.testing.assert_close(leaf.grad, torch.tensor(gradient), rtol=1e-6, atol=1e-6)


def test_clipped_token_keeps_its_gradient():
    leaf, inputs = make([0.0], [-10.0], [1.0], [True], 1)
    CISPOLoss(5.0)(inputs).loss.backward()
    assert leaf.grad.tolist() == [-5.0]


def test_there_is_no_lower_bound_on_the_weight():
    leaf, inputs = make([-10.0], [0.0], [1.0], [True], 1)
    CISPOLoss(5.0)(inputs).loss.backward()
    assert leaf.grad[0].item() == pytest.approx(-math.exp(-10))


def test_weight_itself_carries_no_gradient():
    """With gradient through the weight the derivative would be -A w (1 + logprob)."""
    leaf, inputs = make([-1.0], [-1.5], [2.0], [True], 1)
    CISPOLoss()(inputs).loss.backward()
    assert leaf.grad[0].item() == pytest.approx(-2 * math.exp(0.5), rel=1e-6)


def test_all_masked_row_gives_exactly_zero_loss_and_zero_gradients():
    for total in (0, 7):
        leaf, inputs = make([NAN, -1.0], [INF, -2.0], [1.0, NAN], [False, False], total)
        output = CISPOLoss()(inputs)
        output.loss.backward()
        assert output.loss.item() == 0.0
        assert leaf.grad.tolist() == [0.0, 0.0]
        assert output.metrics == {"num_tokens": 0.0}


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_values_outside_the_mask_change_nothing(bad):
    leaf, inputs = make([bad, -1.0], [bad, -2.0], [bad, 1.0], [False, True], 1, entropy=[bad, 0.5])
    output = CISPOLoss()(inputs)
    output.loss.backward()
    clean, clean_inputs = make([-1.0], [-2.0], [1.0], [True], 1, entropy=[0.5])
    expected = CISPOLoss()(clean_inputs)
    expected.loss.backward()
    assert output.loss.item() == expected.loss.item()
    assert leaf.grad.tolist() == [0.0, clean.grad[0].item()]
    assert output.metrics == expected.metrics


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["trainer_logprobs", "rollout_logprobs", "advantages"])
def test_non_finite_values_under_the_mask_are_refused_naming_input_and_count(name, bad):
    columns = {"trainer_logprobs": [-1.0] * 4, "rollout_logprobs": [-1.0] * 4, "advantages": [1.0] * 4}
    columns[name] = [bad, bad, -1.0, bad]
    _, inputs = make(*columns.values(), mask=[True, True, True, False], total=3)
    with pytest.raises(ValueError, match=f"{name} has 2 of 3 trained tokens") as error:
        CISPOLoss()(inputs)
    assert not any(other in str(error.value) for other in columns if other != name)


def test_denominator_smaller_than_the_batch_and_wrong_shapes_are_refused():
    _, inputs = make([-1.0] * 2, [-1.0] * 2, [1.0] * 2, [True, True], 1)
    with pytest.raises(ValueError, match="num_trained_tokens: expected at least the 2"):
        CISPOLoss()(inputs)
    _, inputs = make([-1.0] * 2, [-1.0], [1.0] * 2, [True, True], 2)
    with pytest.raises(ValueError, match="rollout_logprobs: expected shape"):
        CISPOLoss()(inputs)


@pytest.mark.parametrize("cap", [0.0, 0.2, -1.0, NAN, INF])
def test_an_importance_weight_bound_that_cannot_work_is_refused(cap):
    with pytest.raises(ValueError, match="max_importance_weight"):
        CISPOLoss(cap)


def test_metrics_report_mismatch_clipping_by_sign_and_entropy():
    trainer, rollout = [0.0, -0.5, -3.0, -1.0], [-2.0, -2.5, -1.0, 0.0]
    _, inputs = make(trainer, rollout, [1.0, -1.0, 1.0, 9.0], [True, True, True, False], 3, [0.3, 0.6, 0.9, 9.0])
    metrics = CISPOLoss(5.0)(inputs).metrics
    logs = [2.0, 2.0, -2.0]
    assert metrics["num_tokens"] == 3
    assert metrics["mismatch_kl"] == pytest.approx(sum(math.exp(d) - 1 - d for d in logs) / 3, rel=1e-6)
    assert metrics["mismatch_abs"] == pytest.approx(2.0)
    assert metrics["mismatch_abs_max"] == pytest.approx(2.0)
    assert metrics["importance_ratio"] == pytest.approx(sum(map(math.exp, logs)) / 3, rel=1e-6)
    assert metrics["clip_fraction_positive"] == pytest.approx(1 / 3)
    assert metrics["clip_fraction_negative"] == pytest.approx(1 / 3)
    assert metrics["entropy"] == pytest.approx(0.6)


def test_loss_and_metrics_of_micro_batches_add_up_to_those_of_the_whole():
    generator = torch.Generator().manual_seed(3)
    trainer, rollout = (
        (-torch.rand(30, generator=generator)).tolist(),
        (-3 * torch.rand(30, generator=generator)).tolist(),
    )
    advantages = torch.randn(30, generator=generator).tolist()
    mask = (torch.rand(30, generator=generator) < 0.6).tolist()
    total = sum(mask)
    leaf, inputs = make(trainer, rollout, advantages, mask, total)
    whole = CISPOLoss(2.0)(inputs)
    whole.loss.backward()
    losses, gradients, parts = [], [], []
    for cut in (slice(0, 4), slice(4, 21), slice(21, 30)):
        piece, piece_inputs = make(trainer[cut], rollout[cut], advantages[cut], mask[cut], total)
        output = CISPOLoss(2.0)(piece_inputs)
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append(piece.grad)
        parts.append(output.metrics)
    assert sum(losses) == pytest.approx(whole.loss.item(), rel=1e-6)
    torch.testing.assert_close(torch.cat(gradients), leaf.grad)
    combined = combine_metrics(parts)
    assert combined.keys() == whole.metrics.keys()
    assert combined == pytest.approx(dict(whole.metrics), rel=1e-5)


def test_combining_metrics_takes_the_largest_of_what_is_a_maximum_and_weighs_all_else_by_tokens():
    parts = [{"num_tokens": 3, "a": 1.0, "b_max": 5.0}, {"num_tokens": 1, "a": 3.0, "b_max": 2.0}, {"c": 4.0}]
    assert combine_metrics(parts) == {"num_tokens": 4, "a": 1.5, "b_max": 5.0, "c": 4.0}


def test_combining_metrics_ignores_micro_batches_without_trained_tokens():
    parts = [{"num_tokens": 0.0}, {"num_tokens": 2.0, "a": 3.0}]
    assert combine_metrics(parts) == {"num_tokens": 2.0, "a": 3.0}
    assert combine_metrics([]) == {}
