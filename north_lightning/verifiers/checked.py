"""What may come out of a verifier: a ``Reward`` with a finite number, or an error."""

from __future__ import annotations

import math
from dataclasses import replace

from north_lightning.errors import VerifierError
from north_lightning.types import Reward


def checked_reward(reward: object, who: str) -> Reward:
    """``reward`` with its value as a float; ``VerifierError`` names ``who`` returned anything but a finite number."""
    if not isinstance(reward, Reward):
        raise VerifierError(f"{who}: expected a Reward, got {type(reward).__name__}")
    if not isinstance(reward.value, int | float) or not math.isfinite(reward.value):
        raise VerifierError(f"{who}: expected a finite number as value, got {reward.value!r}")
    return replace(reward, value=float(reward.value))
