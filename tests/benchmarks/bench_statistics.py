"""How often the intervals of an evaluation cover the truth, and how often a comparison finds what it says it finds.

Simulated studies: 500 tasks in 12 repositories of the sizes of SWE-bench Verified's, 500 and 89 tasks without
repositories, 1, 3 or 8 attempts per task. A repository's rate is Beta distributed around the true rate (its variance is
the correlation within repositories), a task's rate around its repository's, attempts are Bernoulli. Paired differences
have independent repository effects on both sides, so that the difference itself is correlated within repositories.
Power is the share of studies with p <= 0.05 for a change as large as the mean reported minimal detectable effect.

Recipes of several training runs (``crossed``): the logit of a task's rate is the sum of the task's difficulty (standard
deviation 3), a part of it that the recipe decides (0.5), a training seed's effect on all tasks, and its effect on the
task (0.5); tasks may be in repositories (0.3). The true rates are integrals over all of these. With one run the
interval is about the checkpoint: how often it covers the recipe's rate is shown beside it. Seeds' effects of 0.15, 0.4
and 1 are spreads of the runs' pass@1 of about 1.5, 4 and 9 points.

Planted gains (``planted``): +8 points on 89 tasks and +3.1 on 500, three attempts a task, one checkpoint a side. Task
rates are Beta distributed around 61%, as wide as gives the announcement's pass@10 of 80% (a + b = 0.5), and the gain is
a shift of all tasks' normal scores, in which the two models correlate by 0.98 or more.

    python tests/benchmarks/bench_statistics.py [STUDIES [SECTION ...]]     # 10000 studies; runs/bench/statistics.json

Sections: intervals, crossed, planted, published; the file keeps what the others have found before.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np

from north_lightning.evaluation import statistics
from north_lightning.evaluation.statistics import (
    count_against,
    count_estimate,
    holm,
    paired_comparison,
    rate_interval,
    recipe_comparison,
    unpaired_comparison,
)

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


# ---- training seeds --------------------------------------------------------------------------------------------------

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(81)
TASK, RECIPE, INTERACTION = 3.0, 0.5, 0.5


@cache
def center(rate: float, spread: float) -> float:
    """The mean logit whose rates average ``rate`` where logits are normal with this standard deviation."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = float(WEIGHTS @ (1 / (1 + np.exp(-(middle + spread * NODES)))) / WEIGHTS.sum())
        low, high = (middle, high) if mean < rate else (low, middle)
    return low


def recipes(rng, sizes, num_runs, rates, seed_effect, attempts):
    """One study: for each recipe the shares of solved attempts and the rates behind them, [runs, tasks] each."""
    num_tasks, grouped = sum(sizes), 0.3 if len(sizes) < sum(sizes) else 0.0
    spread = np.sqrt(TASK**2 + RECIPE**2 + INTERACTION**2 + seed_effect**2 + grouped**2)
    difficulty = rng.normal(0, TASK, num_tasks)
    for runs, rate in zip(num_runs, rates, strict=True):
        logits = center(rate, float(spread)) + difficulty + rng.normal(0, RECIPE, num_tasks)
        logits = logits + np.repeat(rng.normal(0, grouped, len(sizes)), sizes) + rng.normal(0, seed_effect, (runs, 1))
        each = 1 / (1 + np.exp(-(logits + rng.normal(0, INTERACTION, (runs, num_tasks)))))
        yield rng.binomial(attempts, each) / attempts, each


def crossed_coverage(rng, studies, sizes, runs, seed_effect, attempts, rates=(0.5, 0.6)) -> dict[str, float]:
    clusters = labels(sizes) if len(sizes) < sum(sizes) else None
    covered = np.zeros(2)
    for _ in range(studies):
        (first, _), (second, _) = recipes(rng, sizes, (runs, runs), rates, seed_effect, attempts)
        low, high = rate_interval(second, clusters)
        gain = recipe_comparison(first, second, clusters).interval
        covered += low <= rates[1] <= high, gain[0] <= rates[1] - rates[0] <= gain[1]
    return dict(zip(("rate", "difference"), np.round(covered / studies, 4).tolist(), strict=True))


def single_run_coverage(rng, studies, num_tasks, seed_effect, attempts) -> dict[str, float]:
    """How often the interval of one run covers its checkpoint's rate over all tasks, and its recipe's."""
    nodes = np.sqrt(TASK**2 + RECIPE**2 + INTERACTION**2) * NODES
    covered = np.zeros(2)
    middle = center(0.6, float(np.sqrt(TASK**2 + RECIPE**2 + INTERACTION**2 + seed_effect**2)))
    for _ in range(studies):
        own = middle + rng.normal(0, seed_effect)
        checkpoint = float(WEIGHTS @ (1 / (1 + np.exp(-(own + nodes)))) / WEIGHTS.sum())
        spread = np.sqrt(TASK**2 + RECIPE**2 + INTERACTION**2)
        each = 1 / (1 + np.exp(-(own + rng.normal(0, spread, num_tasks))))
        low, high = rate_interval(rng.binomial(attempts, each) / attempts)
        covered += low <= checkpoint <= high, low <= 0.6 <= high
    return dict(zip(("its checkpoint", "its recipe"), np.round(covered / studies, 4).tolist(), strict=True))


# ---- planted gains and published counts ------------------------------------------------------------------------------


def beta_table(rate: float, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Normal scores and the rates at them, of a Beta distribution; by quantiles of many draws."""
    draws = np.sort(np.random.default_rng(0).beta(rate * size, (1 - rate) * size, 400_000))
    scores = np.sort(np.random.default_rng(1).normal(size=400_000))
    return scores, draws


def planted_power(rng, studies, sizes, gain, correlation, attempts=3, rate=0.61, size=0.5) -> dict[str, float]:
    before, after = beta_table(rate, size), beta_table(rate + gain, size)
    shape = (studies, sum(sizes))
    shared = rng.normal(size=shape)
    sides = []
    for table in (before, after):
        score = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * rng.normal(size=shape)
        sides.append(rng.binomial(attempts, np.interp(score, *table)) / attempts)
    difference = sides[1] - sides[0]
    _, _, p_values = paired_results(rng, difference, sizes)
    return {
        "found": round(float(np.mean(p_values <= 0.05)), 4),
        "mean_gain": round(float(difference.mean()), 4),
        "standard_deviation_per_task": round(float(difference.std()), 4),
    }


def published() -> dict[str, object]:
    recipes_of = [91 + number for number in range(20)]
    pairs = [unpaired_comparison(count_estimate(a, 300), count_estimate(b, 300)).p_value
             for index, a in enumerate(recipes_of) for b in recipes_of[:index]]  # fmt: skip
    fixed = holm([count_against(0.25, one, 300).p_value for one in recipes_of])
    measured = holm(
        [unpaired_comparison(count_estimate(75, 300), count_estimate(one, 300)).p_value for one in recipes_of]
    )
    two = unpaired_comparison(count_estimate(152, 500), count_estimate(156, 500))
    return {
        "156 against 152 of 500": {"p_value": two.p_value, "detectable": two.minimal_detectable_effect},
        "20 recipes, 91 to 110 of 300": {
            "pairs_told_apart": sum(p <= 0.05 for p in holm(pairs)),
            "better_than_a_fixed_quarter": sum(p <= 0.05 for p in fixed),
            "better_than_75_of_300": sum(p <= 0.05 for p in measured),
        },
    }


def crossed(studies: int) -> dict[str, object]:
    result: dict[str, object] = {"studies": studies}
    for layout, sizes in (("89 tasks", (1,) * 89), ("12 repositories", SWE_BENCH_VERIFIED)):
        for runs, effects in ((3, (0.0, 0.15, 0.4, 1.0)), (5, (0.15, 0.4)), (2, (0.4,))):
            for effect in effects:
                where = f"{layout}, {runs} runs a recipe, seeds' effect {effect}, 3 attempts"
                result[where] = crossed_coverage(np.random.default_rng(1), studies, sizes, runs, effect, 3)
                print(where, result[where], flush=True)
    for effect in (0.15, 0.4, 1.0):
        where = f"500 tasks, one run, seeds' effect {effect}, 3 attempts"
        result[where] = single_run_coverage(np.random.default_rng(1), studies, 500, effect, 3)
        print(where, result[where], flush=True)
    return result


def planted(studies: int) -> dict[str, object]:
    result: dict[str, object] = {"studies": studies}
    for sizes, gain in (((1,) * 89, 0.08), ((1,) * 500, 0.031)):
        for correlation in (1.0, 0.99, 0.98, 0.9):
            where = f"{sum(sizes)} tasks, +{100 * gain:g} points, correlation {correlation}"
            result[where] = planted_power(np.random.default_rng(1), studies, sizes, gain, correlation)
            print(where, result[where], flush=True)
    return result


def intervals(studies: int) -> dict[str, object]:
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
    return result


def main(studies: int, sections: list[str]) -> None:
    path = Path("runs/bench/statistics.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    result = json.loads(path.read_text()) if path.exists() else {}
    for section in sections or ["intervals", "crossed", "planted", "published"]:
        if section == "intervals":
            result |= intervals(min(studies, 4000))
        else:
            result[section] = published() if section == "published" else globals()[section](studies)
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, sys.argv[2:])
