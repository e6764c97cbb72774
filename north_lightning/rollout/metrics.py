"""Numbers about rollouts, as pure functions: how often tasks are solved, and how the model behaves on the way.

In: rollouts or groups. Out: flat dictionaries of floats. It logs nothing and holds no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from north_lightning.types import Rollout, RolloutGroup
from north_lightning.verifiers.checked import TAMPERED
from north_lightning.verifiers.loops import has_loop

Metrics = dict[str, float]

PERCENTILES = (10, 50, 90, 99)


def rollout_metrics(rollouts: Sequence[Rollout]) -> Metrics:
    """Means over ``rollouts``; empty for no rollouts.

    ``pass@1`` share solved; ``invalid_call_rate`` turns that were no valid action over all turns,
    ``invalid_rollouts`` rollouts with one; ``truncated`` ended by a token limit; ``loop_rate`` see ``has_loop``;
    ``tampered`` changed what judges them; ``model_error`` did what could not be carried out;
    ``concluded`` submitted or answered; ``false_success`` concluded but unsolved, over concluded; turns; lengths in
    tokens. Turns, seconds and lengths have their percentiles beside them (``turns/p90``).
    """
    if not rollouts:
        return {}
    num_turns = sum(len(rollout.turns) for rollout in rollouts)
    num_invalid = [num_invalid_turns(rollout) for rollout in rollouts]
    concluded = [rollout for rollout in rollouts if rollout.stop_reason == "finished"]
    metrics = {
        "pass@1": _share(rollouts, is_solved),
        "reward": _mean([rollout.reward.value for rollout in rollouts if rollout.reward is not None]),
        "invalid_call_rate": sum(num_invalid) / num_turns if num_turns else 0.0,
        "invalid_rollouts": sum(count > 0 for count in num_invalid) / len(rollouts),
        "truncated": _share(rollouts, lambda rollout: rollout.stop_reason in ("length", "context")),
        "max_turns_reached": _share(rollouts, lambda rollout: rollout.stop_reason == "max_turns"),
        "loop_rate": _share(rollouts, has_loop),
        "tampered": _share(rollouts, is_tampered),
        "model_error": _share(rollouts, lambda rollout: rollout.stop_reason == "model_error"),
        "concluded": len(concluded) / len(rollouts),
        "false_success": _share(concluded, lambda rollout: not is_solved(rollout)) if concluded else 0.0,
    }
    spread: dict[str, Sequence[float]] = {
        "turns": [len(rollout.turns) for rollout in rollouts],
        "duration_s": [rollout.duration_s for rollout in rollouts],
        "generated_tokens": [rollout.num_sampled_tokens for rollout in rollouts],
        "total_tokens": [len(rollout.token_ids) for rollout in rollouts],
    }
    for name, values in spread.items():
        metrics[name] = _mean(values)
        metrics |= {f"{name}/p{q}": percentile(values, q) for q in PERCENTILES}
    return metrics


def group_metrics(groups: Sequence[RolloutGroup]) -> Metrics:
    """``solve_all`` and ``solve_none``: shares of groups whose attempts all, or none, solved the task: no signal in
    either. ``lost_rollouts``: attempts of a group that infrastructure lost."""
    if not groups:
        return {}
    solved = [[is_solved(rollout) for rollout in group.rollouts] for group in groups]
    return {
        "solve_all": sum(all(attempts) for attempts in solved) / len(groups),
        "solve_none": sum(not any(attempts) for attempts in solved) / len(groups),
        "lost_rollouts": _mean([group.num_lost for group in groups]),
    }


def metrics_by_environment(groups: Sequence[RolloutGroup]) -> Metrics:
    """Both of the above over everything, and again as ``<environment>/<name>``."""
    environments = sorted({group.environment for group in groups})
    metrics = _all_metrics(groups)
    for environment in environments:
        members = [group for group in groups if group.environment == environment]
        metrics |= {f"{environment}/{name}": value for name, value in _all_metrics(members).items()}
    return metrics


def is_solved(rollout: Rollout) -> bool:
    """Whether the verifier says so; its reward may be scaled by more than that."""
    return rollout.reward is not None and bool(rollout.reward.solved)


def is_tampered(rollout: Rollout) -> bool:
    """Whether the verifier found that the attempt changed what judges it."""
    return rollout.reward is not None and rollout.reward.details.get("reason") == TAMPERED


def num_invalid_turns(rollout: Rollout) -> int:
    """Turns that were no valid action: unparseable, an unknown tool, wrong arguments, or forbidden by the harness."""
    return sum(turn.error is not None for turn in rollout.turns)


def percentile(values: Sequence[float], q: float) -> float:
    """The ``q``-th percentile with linear interpolation between the two nearest values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _all_metrics(groups: Sequence[RolloutGroup]) -> Metrics:
    return rollout_metrics([rollout for group in groups for rollout in group.rollouts]) | group_metrics(groups)


def _share(rollouts: Sequence[Rollout], holds: Callable[[Rollout], bool]) -> float:
    return sum(map(holds, rollouts)) / len(rollouts)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
