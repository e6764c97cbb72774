"""The clipped-ratio loss against the formula and its derivative, token by token in plain Python."""

import math

import pytest
import torch
from clipped_ratio import ClippedRatioLoss
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.errors import ConfigError
from north_lightning.interfaces import PolicyLossInputs


def reference(trainer, rollout, advantages, mask, total, low, high):
    value, gradient = 0.0, [0.0] * len(trainer)
    for t in (t for t, trained in enumerate(mask) if trained):
        ratio, advantage = math.exp(trainer[t] - rollout[t]), advantages[t]
        clipped = min(max(ratio, 1 - low), 1 + high)
        value -= min(ratio * advantage, clipped * advantage) / total
        is_held_back = (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low)
        gradient[t] = 0.0 if is_held_back else -ratio * advantage / total
    return value, gradient


def run(trainer, rollout, advantages, mask, total, **settings):
    leaf = torch.tensor(trainer, dtype=torch.float64, requires_grad=True)
    columns = [torch.tensor(column, dtype=torch.float64) for column in (rollout, advantages)]
    inputs = PolicyLossInputs(leaf, *columns, torch.tensor(mask, dtype=torch.bool), total)
    output = ClippedRatioLoss(**settings)(inputs)
    output.loss.backward()
    return output, leaf.grad.tolist()


tokens = st.tuples(st.floats(-6, 0), st.floats(-6, 0), st.floats(-2, 2), st.booleans())


@settings(deadline=None, max_examples=100)
@given(tokens=st.lists(tokens, min_size=1, max_size=20), elsewhere=st.integers(0, 9))
def test_value_and_gradient_equal_the_formula(tokens, elsewhere):
    trainer, rollout, advantages, mask = (list(column) for column in zip(*tokens, strict=True))
    total = sum(mask) + elsewhere or 1
    output, gradient = run(trainer, rollout, advantages, mask, total, clip_low=0.2, clip_high=0.3)
    value, expected = reference(trainer, rollout, advantages, mask, total, 0.2, 0.3)
    assert output.loss.item() == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert gradient == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_clipped_token_gets_no_gradient_where_cispo_would_give_one():
    output, gradient = run([0.0], [-3.0], [1.0], [True], 1)
    assert gradient == [0.0]
    assert output.metrics["clip_fraction"] == 1.0


def test_masked_tokens_may_hold_anything_and_an_empty_mask_gives_zero():
    nan, inf = float("nan"), float("inf")
    output, gradient = run([nan, -1.0], [inf, -1.0], [nan, 2.0], [False, True], 1)
    assert output.loss.item() == -2.0
    assert gradient == [0.0, -2.0]
    output, gradient = run([nan, -inf], [inf, nan], [nan, nan], [False, False], 0)
    assert output.loss.item() == 0.0
    assert gradient == [0.0, 0.0]
    assert output.metrics == {"num_tokens": 0.0}


@pytest.mark.parametrize("position", range(3))
def test_non_finite_inputs_are_refused_by_name(position):
    columns = [[-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]]
    columns[position][1] = float("nan")
    name = ("trainer_logprobs", "rollout_logprobs", "advantages")[position]
    with pytest.raises(ValueError, match=f"{name}: .* 1 others of 2"):
        run(*columns, [True, True], 2)


def test_a_ratio_beyond_all_bounds_stays_finite_in_value_and_gradient():
    output, gradient = run([0.0, 0.0], [-900.0, -900.0], [1.0, -1e-9], [True, True], 2)
    assert math.isfinite(output.loss.item())
    assert all(map(math.isfinite, gradient))


@pytest.mark.parametrize(
    "settings", [{"clip_low": 0.0}, {"clip_low": 1.0}, {"clip_high": 0.0}, {"clip_high": math.inf}]
)
def test_ranges_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ClippedRatioLoss(**settings)
