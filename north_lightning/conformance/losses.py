"""What a ``PolicyLoss`` promises, as checks on small batches of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from north_lightning.conformance.child import Broken
from north_lightning.interfaces import PolicyLoss, PolicyLossInputs, PolicyLossOutputs

Make = Callable[[], PolicyLoss]

NUM_TOKENS = 64


def batch(seed: int = 0) -> PolicyLossInputs:
    generator = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(NUM_TOKENS, generator=generator) * 3
    trainer = (rollout + 0.2 * torch.randn(NUM_TOKENS, generator=generator)).requires_grad_()
    advantages = torch.randn(NUM_TOKENS, generator=generator)
    mask = torch.rand(NUM_TOKENS, generator=generator) < 0.7
    sequence_ids = torch.arange(NUM_TOKENS) // (NUM_TOKENS // 4)
    return PolicyLossInputs(trainer, rollout, advantages, mask, int(mask.sum()), sequence_ids=sequence_ids)


def gradient(loss: PolicyLoss, inputs: PolicyLossInputs) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss(inputs).loss, inputs.trainer_logprobs)
    return found


def returns_a_finite_scalar(make: Make) -> None:
    """And metrics that are finite numbers."""
    outputs = make()(batch())
    if not isinstance(outputs, PolicyLossOutputs):
        raise Broken(f"expected PolicyLossOutputs, got {type(outputs).__name__}")
    if outputs.loss.shape != () or not torch.isfinite(outputs.loss):
        raise Broken(f"expected one finite number as loss, got {outputs.loss}")
    bad = {name: value for name, value in outputs.metrics.items() if not math.isfinite(value)}
    if bad:
        raise Broken(f"expected finite metrics, got {bad}")


def has_a_gradient(make: Make) -> None:
    """Finite, not zero everywhere, and zero outside of the mask."""
    inputs = batch()
    found = gradient(make(), inputs)
    if not torch.isfinite(found).all() or not found.any():
        raise Broken("expected a finite gradient that is not zero everywhere")
    if found[~inputs.loss_mask].any():
        raise Broken("tokens outside of loss_mask have a gradient")


def ignores_what_is_masked(make: Make) -> None:
    """Values outside of the mask, NaN included, change nothing."""
    inputs = batch()
    spoiled: dict[str, Any] = {name: _spoiled(getattr(inputs, name), inputs.loss_mask) for name in ALIGNED}
    changed = replace(inputs, **spoiled)
    expected, got = make()(inputs).loss, make()(changed).loss
    if not torch.equal(expected, got):
        raise Broken(f"the loss was {expected.item()}, and {got.item()} with NaN outside of loss_mask")


def refuses_what_is_not_finite(make: Make) -> None:
    """``ValueError`` for a NaN or an infinity under the mask, in each of the inputs."""
    for name in ALIGNED:
        for bad in (math.nan, math.inf):
            inputs = batch()
            values = getattr(inputs, name).detach().clone()
            values[inputs.loss_mask.nonzero()[0]] = bad
            try:
                make()(replace(inputs, **{name: values}))
            except ValueError:
                continue
            raise Broken(f"{name}: expected a ValueError for {bad} under the mask, got a loss")


def divides_by_the_whole_step(make: Make) -> None:
    """By ``num_trained_tokens``: the parts of a batch add up to the batch."""
    inputs, half = batch(), NUM_TOKENS // 2
    parts = [
        replace(inputs, **{name: getattr(inputs, name)[part] for name in (*ALIGNED, "loss_mask", "sequence_ids")})
        for part in (slice(None, half), slice(half, None))
    ]
    whole, total = make()(inputs).loss.item(), sum(make()(part).loss.item() for part in parts)
    if not math.isclose(whole, total, rel_tol=1e-4, abs_tol=1e-6):
        raise Broken(f"expected the losses of two halves to add up to {whole:.6g}, got {total:.6g}")


def takes_an_empty_batch(make: Make) -> None:
    """No trained token: a finite loss that can be differentiated."""
    inputs = replace(batch(), loss_mask=torch.zeros(NUM_TOKENS, dtype=torch.bool))
    found = gradient(make(), inputs)
    if found.any() or not torch.isfinite(make()(inputs).loss):
        raise Broken("expected a finite loss and no gradient where nothing is trained")


def keeps_its_word_on_advantages(make: Make) -> None:
    """``is_zero_without_advantage``: if it says so, advantage 0 has no loss and no gradient."""
    loss = make()
    inputs = replace(batch(), advantages=torch.zeros(NUM_TOKENS))
    if loss.is_zero_without_advantage and (loss(inputs).loss != 0 or gradient(loss, inputs).any()):
        raise Broken("is_zero_without_advantage is true, but advantage 0 has a loss or a gradient")


def is_deterministic(make: Make) -> None:
    """The same batch, the same loss, call after call."""
    loss = make()
    values = {one(batch()).loss.item() for one in (loss, loss, make())}
    if len(values) > 1:
        raise Broken(f"expected one value, got {sorted(values)}")


def _spoiled(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, math.nan)


ALIGNED = ("trainer_logprobs", "rollout_logprobs", "advantages")

CHECKS: dict[str, Callable[[Make], None]] = {
    "returns a finite scalar": returns_a_finite_scalar,
    "has a gradient": has_a_gradient,
    "ignores what is masked": ignores_what_is_masked,
    "refuses what is not finite": refuses_what_is_not_finite,
    "divides by the whole step": divides_by_the_whole_step,
    "takes an empty batch": takes_an_empty_batch,
    "keeps its word on advantages": keeps_its_word_on_advantages,
    "is deterministic": is_deterministic,
}
