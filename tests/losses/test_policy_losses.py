"""TIS, MIS, GSPO and the policy gradient against their papers' formulas, token by token in float64 NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.conformance.losses import CHECKS
from north_lightning.errors import ConfigError
from north_lightning.interfaces import PolicyLoss, PolicyLossInputs, PolicyLossOutputs
from north_lightning.losses import (
    CISPOLoss,
    GSPOLoss,
    MaskedImportanceLoss,
    PolicyGradientLoss,
    TruncatedImportanceLoss,
)

LOSSES = [PolicyGradientLoss, TruncatedImportanceLoss, MaskedImportanceLoss, GSPOLoss]


def make(columns, total, dtype=torch.float64):
    trainer, rollout, advantages, mask, sequences = columns
    leaf = torch.tensor(trainer, dtype=dtype, requires_grad=True)
    rest = [torch.tensor(column, dtype=dtype) for column in (rollout, advantages)]
    ids = torch.tensor(sequences, dtype=torch.int64)
    return leaf, PolicyLossInputs(leaf, *rest, torch.tensor(mask, dtype=torch.bool), total, sequence_ids=ids)


def weighted_policy_gradient(weigh):
    """Value and gradient of -1/N sum_t sg(weigh(r_t)) A_t log pi_t."""

    def reference(trainer, rollout, advantages, mask, sequences, total):
        value, gradient = np.float64(0), np.zeros(len(trainer))
        for t in range(len(trainer)):
            if mask[t]:
                weight = weigh(np.exp(np.float64(trainer[t]) - rollout[t]))
                value -= weight * advantages[t] * trainer[t] / total
                gradient[t] = -weight * advantages[t] / total
        return value, gradient

    return reference


def gspo(low, high):
    def reference(trainer, rollout, advantages, mask, sequences, total):
        value, gradient = np.float64(0), np.zeros(len(trainer))
        for sequence in set(sequences):
            own = [t for t in range(len(trainer)) if mask[t] and sequences[t] == sequence]
            if not own:
                continue
            s = np.exp(sum(np.float64(trainer[t]) - rollout[t] for t in own) / len(own))
            advantage = advantages[own[0]]
            clipped = min(max(s, 1 - low), 1 + high)
            value -= len(own) * min(s * advantage, clipped * advantage) / total
            is_held_back = (advantage > 0 and s > 1 + high) or (advantage < 0 and s < 1 - low)
            for t in own:  # d s / d log pi_t = s / |o|
                gradient[t] = 0.0 if is_held_back else -advantage * s / total
        return value, gradient

    return reference


CASES = {
    "policy gradient": (PolicyGradientLoss(), weighted_policy_gradient(lambda r: 1.0)),
    "truncated": (TruncatedImportanceLoss(1.7), weighted_policy_gradient(lambda r: min(r, 1.7))),
    "masked": (MaskedImportanceLoss(0.6, 1.7), weighted_policy_gradient(lambda r: r if 0.6 <= r <= 1.7 else 0.0)),
    "gspo": (GSPOLoss(0.2, 0.3), gspo(0.2, 0.3)),
}

tokens = st.tuples(st.floats(-4, 0), st.floats(-4, 0), st.booleans())
sequences = st.lists(
    st.tuples(st.floats(-2, 2), st.lists(tokens, min_size=1, max_size=6)), min_size=1, max_size=4
)  # all tokens of a rollout share its advantage


@pytest.mark.parametrize("name", CASES)
@settings(deadline=None, max_examples=80)
@given(rows=sequences, elsewhere=st.integers(0, 9))
def test_value_and_gradient_equal_the_papers_formula(name, rows, elsewhere):
    flat = [(*token[:2], advantage, token[2], i) for i, (advantage, row) in enumerate(rows) for token in row]
    columns = [list(column) for column in zip(*flat, strict=True)]
    total = sum(columns[3]) + elsewhere or 1
    loss, reference = CASES[name]
    leaf, inputs = make(columns, total)
    output = loss(inputs)
    output.loss.backward()
    value, gradient = reference(*columns, total)
    assert output.loss.item() == pytest.approx(value, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(leaf.grad.numpy(), gradient, rtol=1e-9, atol=1e-12)


def test_with_one_step_per_batch_tis_has_the_gradient_of_cispo():
    columns = [-0.1, -2.0, -1.0], [-3.0, -1.0, -1.0], [1.0, -1.0, 0.5], [True] * 3, [0, 0, 1]
    gradients = []
    for loss in (TruncatedImportanceLoss(2.0), CISPOLoss(2.0)):
        leaf, inputs = make(columns, 3, torch.float32)
        loss(inputs).loss.backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_masked_tokens_are_counted_as_clipped_by_sign_and_the_largest_mismatch_is_reported():
    columns = [0.0, -3.0, -1.0], [-2.0, 0.0, -1.0], [1.0, -1.0, 1.0], [True] * 3, [0, 0, 0]
    metrics = MaskedImportanceLoss()(make(columns, 3)[1]).metrics
    assert metrics["clip_fraction_positive"] == pytest.approx(1 / 3)
    assert metrics["clip_fraction_negative"] == pytest.approx(1 / 3)
    assert metrics["mismatch_kl_max"] == pytest.approx(np.exp(2.0) - 1 - 2.0, rel=1e-6)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_keeps_the_promises_of_the_interface(loss, check):
    CHECKS[check](loss)


@pytest.mark.parametrize("outer", [TruncatedImportanceLoss, MaskedImportanceLoss])
@pytest.mark.parametrize("inner", [CISPOLoss, GSPOLoss, TruncatedImportanceLoss, MaskedImportanceLoss])
def test_correcting_twice_is_refused_by_name(outer, inner):
    with pytest.raises(ConfigError, match=rf"of: .* got {inner.__name__}, .* counted twice"):
        outer(of=inner())


def test_a_loss_with_a_term_that_advantages_do_not_scale_is_refused():
    class WithEntropy(PolicyLoss):
        def __call__(self, inputs: PolicyLossInputs) -> PolicyLossOutputs:
            raise NotImplementedError

    with pytest.raises(ConfigError, match="zero without advantage, got WithEntropy"):
        TruncatedImportanceLoss(of=WithEntropy())


@pytest.mark.parametrize(
    "construct",
    [
        lambda: TruncatedImportanceLoss(0.0),
        lambda: MaskedImportanceLoss(2.0, 1.0),
        lambda: GSPOLoss(clip_low=1.0),
        lambda: GSPOLoss(clip_high=float("inf")),
    ],
)
def test_bounds_that_cannot_work_are_refused(construct):
    with pytest.raises(ConfigError, match="importance_weight|clip_"):
        construct()


def test_gspo_without_sequences_is_refused():
    trainer, rest = torch.zeros(2, requires_grad=True), torch.zeros(2)
    with pytest.raises(ValueError, match="sequence_ids: expected the rollout of every token"):
        GSPOLoss()(PolicyLossInputs(trainer, rest, rest, torch.ones(2, dtype=torch.bool), 2))


@pytest.mark.parametrize(("bounds", "is_trained"), [((1.0, 2.0), True), ((0.5, 1.0), True), ((1.1, 2.0), False)])
def test_a_ratio_exactly_at_a_bound_is_trained(bounds, is_trained):
    leaf, inputs = make(([-1.0], [-1.0], [1.0], [True], [0]), 1)
    MaskedImportanceLoss(*bounds)(inputs).loss.backward()
    assert leaf.grad.tolist() == [-1.0 if is_trained else 0.0]
