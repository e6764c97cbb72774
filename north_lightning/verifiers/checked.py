"""What may come out of a verifier: a ``Reward`` with a number of its declared range, or an error."""

from __future__ import annotations

import math
from dataclasses import replace

from north_lightning.errors import VerifierError
from north_lightning.interfaces import RewardVerifier
from north_lightning.types import Reward

TAMPERED = "tampered"
"""The reason where the code under test changed what judges it, or a test that must fail has passed."""


def checked_reward(reward: object, verifier: RewardVerifier, who: str) -> Reward:
    """``reward`` with its value as a float; ``VerifierError`` names ``who`` returned anything but a number of the
    ``verifier``'s range: no bool, no text, no NaN."""
    if not isinstance(reward, Reward):
        raise VerifierError(f"{who}: expected a Reward, got {type(reward).__name__}")
    low, high = verifier.reward_range
    if type(reward.value) not in (int, float) or not (low <= reward.value <= high and abs(reward.value) < math.inf):
        raise VerifierError(
            f"{who}: expected a finite number from {low:g} to {high:g} as value, got {reward.value!r}; reward_range "
            "declares another range"
        )
    return replace(reward, value=float(reward.value))
