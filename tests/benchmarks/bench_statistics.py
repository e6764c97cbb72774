"""How often the intervals of an evaluation cover the truth, and how often a comparison finds what it says it finds.

Simulated studies: 500 tasks in 12 repositories of the sizes of SWE-bench Verified's, 500 and 89 tasks without
repositories, 1, 3 or 8 attempts per task. A repository's rate is Beta distributed around the true rate (its variance is
the correlation within repositories), a task's rate around its repository's, attempts are Bernoulli. Paired differences
have independent repository effects on both sides, so that the difference itself is correlated within repositories.
Power is the share of studies with p <= 0.05 for a change as large as the mean reported minimal detectable effect.

    python tests/benchmarks/bench_statistics.py [STUDIES]      # 4000; ten minutes; runs/bench/statistics.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from north_lightning.evaluation import statistics
from north_lightning.evaluation.statistics import paired_comparison, rate_interval

SWE_BENCH_VERIFIED = (231, 75, 44, 34, 32, 22, 22, 19, 10, 8, 2, 1)
LAYOUTS = {"12 repositories": SWE_BENCH_VERIFIED, "89 tasks": (1,) * 89, "500 tasks": (1,) * 500}
CORRELATIONS = {"12 repositories": (0.0, 0.01, 0.05, 0.2), "89 tasks": (0.0,), "500 tasks": (0.0,)}
RATES = {"12 repositories": (0.5, 0.9), "89 tasks": (0.5, 0.9, 0.03), "500 tasks": (0.5, 0.9, 0.03, 0.99)}


def draw(rng: np.random.Generator, studies: int, sizes, rate: float, correlation: float, attempts: int) -> np.ndarray:
    """Share of solved attempts, [studies, tasks]; the mean over studies is ``rate`` exactly."""
    repository = np.full((studies, len(sizes)), rate)
    if correlation:
        scale = 1 / correlation - 1
        repository = rng.beta(rate * scale, (1 - rate) * scale, size=repository.shape).clip(1e-9, 1 - 1e-9)
    mean = np.repeat(repository, sizes, axis=1)
    return rng.binomial(attempts, rng.beta(mean, 1 - mean)) / attempts


def labels(sizes) -> list[int]:
    return np.repeat(np.arange(len(sizes)), sizes).tolist()


def rate_coverage(
    rng: np.random.Generator, studies: int, sizes, rate: float, correlation: float, attempts: int
) -> float:
    clusters = labels(sizes)
    intervals = [rate_interval(row, clusters) for row in draw(rng, studies, sizes, rate, correlation, attempts)]
    return float(np.mean([low <= rate <= high for low, high in intervals]))


def paired_results(rng: np.random.Generator, differences: np.ndarray, sizes) -> tuple[np.ndarray, ...]:
    """Limits and p-values of ``paired_comparison`` for many studies at once, [studies] each."""
    sums = np.add.reduceat(differences, np.cumsum([0, *sizes[:-1]]), axis=1)
    halves = statistics._halves(len(sizes), rng)
    parts = []
    for start in range(0, len(sums), 200):
        low, high = statistics._half_means(sums[start : start + 200], np.array(sizes, float), halves)
        parts.append((statistics._limit(low), -statistics._limit(-high), statistics._p_values(low, high)))
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def paired_coverage(rng, studies, sizes, rates, correlation, attempts) -> float:
    first, second = (draw(rng, studies, sizes, rate, correlation, attempts) for rate in rates)
    low, high, _ = paired_results(rng, second - first, sizes)
    truth = rates[1] - rates[0]
    return float(np.mean((low <= truth + 1e-12) & (truth - 1e-12 <= high)))


def power(rng, studies, sizes, rate, correlation, attempts, pilots) -> dict[str, float]:
    """Share of studies with p <= 0.05 where both sides are equal, and where they differ by the mean reported effect."""
    clusters = labels(sizes)
    before, after = (draw(rng, studies, sizes, rate, correlation, attempts) for _ in range(2))
    effects = [
        paired_comparison(*pair, clusters).minimal_detectable_effect
        for pair in zip(before[:pilots], after[:pilots], strict=True)
    ]
    effect = float(np.mean(effects))
    first = draw(rng, studies, sizes, rate - effect / 2, correlation, attempts)
    second = draw(rng, studies, sizes, rate + effect / 2, correlation, attempts)
    level, found = (
        round(float(np.mean(paired_results(rng, difference, sizes)[2] <= 0.05)), 4)
        for difference in (after - before, second - first)
    )
    return {"mean_effect": round(effect, 4), "found": found, "found_without_effect": level}


def main(studies: int) -> None:
    rng = np.random.default_rng(0)
    result: dict[str, dict[str, object]] = {"rates": {}, "paired": {}, "power": {}}
    for layout, sizes in LAYOUTS.items():
        for correlation in CORRELATIONS[layout]:
            for attempts in (1, 3, 8):
                where = f"{layout}, correlation {correlation}, {attempts} attempts"
                for rate in RATES[layout]:
                    covered = rate_coverage(rng, studies, sizes, rate, correlation, attempts)
                    result["rates"][f"{where}, rate {rate}"] = round(covered, 4)
                for rates in ((0.5, 0.5), (0.4, 0.55), (0.85, 0.9)):
                    covered = paired_coverage(rng, studies, sizes, rates, correlation, attempts)
                    result["paired"][f"{where}, rates {rates[0]} and {rates[1]}"] = round(covered, 4)
                if attempts < 8:
                    result["power"][where] = power(
                        rng, studies, sizes, 0.5, correlation, attempts, 1000 if len(sizes) == 12 else 40
                    )
                print(where, *(f"{part}: {list(rows.items())[-1]}" for part, rows in result.items()), flush=True)
    for part in ("rates", "paired"):
        values = list(result[part].values())
        result[f"{part}_range"] = {"lowest": min(values), "highest": max(values), "designs": len(values)}
    found = [row["found"] for row in result["power"].values()]
    result["power_range"] = {"lowest": min(found), "highest": max(found), "designs": len(found), "claimed": 0.8}
    levels = [row["found_without_effect"] for row in result["power"].values()]
    result["level_range"] = {"lowest": min(levels), "highest": max(levels), "designs": len(levels), "claimed": 0.05}
    result["studies"] = studies
    path = Path("runs/bench/statistics.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key.endswith("range")}, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4000)
