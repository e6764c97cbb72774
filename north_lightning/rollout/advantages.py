"""Leave-one-out advantages: the rewards of a group in, one advantage per rollout out. It changes no rollout."""

from __future__ import annotations

import math
from collections.abc import Sequence


def rloo_advantages(rewards: Sequence[float]) -> list[float]:
    """``A_i = R_i - mean(R_j for j != i)``, without division by the standard deviation (RLOO, arXiv 2402.14740, eq. 5).

    Args:
        rewards: One per rollout of the group.

    Returns:
        One advantage per reward; they sum to zero.

    Raises:
        ValueError: fewer than two rewards, or one that is not finite.

    >>> rloo_advantages([1.0, 0.0, 0.0])
    [1.0, -0.5, -0.5]
    """
    if len(rewards) < 2:
        raise ValueError(f"rewards: expected at least 2 in a group (each is the other's baseline), got {len(rewards)}")
    if not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"rewards: expected finite numbers, got {list(rewards)}")
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)  # exactly: a rounding error would pass for a signal
    total = math.fsum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]
