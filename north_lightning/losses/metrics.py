"""Metrics of micro-batches, put together into those of an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def combine_metrics(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One mapping for several micro-batches of the same step.

    ``num_tokens`` is summed, names that end in ``_max`` take the maximum, all others the mean weighted by
    ``num_tokens`` (1 where a loss does not report it). Micro-batches without trained tokens weigh nothing.

    >>> combine_metrics([{"num_tokens": 1, "a": 4.0, "b_max": 1.0}, {"num_tokens": 3, "a": 0.0, "b_max": 2.0}])
    {'num_tokens': 4, 'a': 1.0, 'b_max': 2.0}
    """
    combined: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [part for part in parts if name in part]
        values = [part[name] for part in having]
        weights = [part.get("num_tokens", 1.0) for part in having]
        if name == "num_tokens":
            combined[name] = sum(values)
        elif name.endswith("_max"):
            combined[name] = max(values)
        else:
            total = sum(weights)
            combined[name] = sum(v * w for v, w in zip(values, weights, strict=True) if w) / total if total else 0.0
    return combined
