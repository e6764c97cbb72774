"""Studies of planted quality, and raters of planted biases."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from north_lightning.cli import main
from north_lightning.human_evaluation.assignments import Assignment
from north_lightning.human_evaluation.store import Store
from north_lightning.human_evaluation.study import RATINGS, Seal, Study

KINDS = ("code_explanation", "code_editing", "data_visualization", "implementation_from_scratch")
QUALITY, LEFT, TWICE_AS_LONG = 0.8, 0.5, 0.4
"""Log-odds that the raters of ``judge`` are moved by, towards the better model, the left side, the longer attempt."""
THRESHOLDS = (-1.8, -0.6, 0.6, 1.8)


def write_attempt(folder: Path, kind: str, answer: str, instruction: str = "Do it.", **more: Any) -> None:
    """``more``: ``diff``, and ``files`` by path."""
    folder.mkdir(parents=True)
    transcript = [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
    attempt = {"format": 1, "functionality": kind, "instruction": instruction, "transcript": transcript}
    (folder / "attempt.json").write_text(json.dumps(attempt | more.get("attempt", {})))
    if "diff" in more:
        (folder / "changes.diff").write_text(more["diff"])
    for path, content in more.get("files", {}).items():
        (folder / "files" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def write_sides(folder: Path, models: Sequence[str], num_items: int, seed: int = 0) -> list[str]:
    """Attempts of different lengths; what ``prepare`` takes for them."""
    rng = random.Random(seed)
    for number in range(num_items):
        for model in models:
            words = " ".join(["word"] * rng.choice((8, 20, 50, 120)))
            answer = f"Item {number}, {words}. I am {model}."
            write_attempt(folder / model / f"item-{number:03d}", KINDS[number % 4], answer, f"Do thing {number}.")
    return [f"{model}={folder / model}" for model in models]


def prepare(sides: Sequence[str], study: Path, *arguments: str) -> Study:
    assert main(["human-eval", "prepare", *sides, "--output_dir", str(study), *arguments]) == 0
    return Study(study)


def judge(
    study: Study, one: Assignment, seal: Seal, strengths: Mapping[str, float], rng: random.Random
) -> tuple[dict[str, dict[str, int]], int]:
    """A rater who is moved by quality, side and length, and by nothing else; attention items are answered right."""
    comparison = study.comparison_of(one)
    if comparison.expected:
        preference = 1 if comparison.expected == one.left else 5
        levels = (5, 1) if preference == 1 else (1, 5)
    else:
        left, right = (strengths[seal.attempts[side]] for side in (one.left, one.right))
        longer = math.log2((study.lengths[one.right] + 1) / (study.lengths[one.left] + 1))
        noise = math.log(1 / rng.uniform(1e-12, 1) - 1)
        pull = right - left - LEFT + TWICE_AS_LONG * longer + noise
        preference = 1 + sum(pull > threshold for threshold in THRESHOLDS)
        levels = tuple(min(5, max(1, round(3 + value + rng.gauss(0, 0.5)))) for value in (left, right))
    questions = study.questions(one)
    answers = {side: dict.fromkeys(questions, level) for side, level in zip((one.left, one.right), levels, strict=True)}
    return answers, preference


def judge_all(study: Study, strengths: Mapping[str, float], seed: int = 0) -> None:
    """Every rater does all comparisons, without the app."""
    store, seal, rng = Store(study.folder / RATINGS), study.unseal(), random.Random(seed)
    for seats in study.assignments.values():
        for one in seats:
            answers, preference = judge(study, one, seal, strengths, rng)
            store.save_ratings(one.id, answers)
            store.save_preference(one.id, preference, "")


def form_of(
    answers: Mapping[str, Mapping[str, int | None]], one: Assignment, questions: Sequence[str]
) -> dict[str, str]:
    """What the form of step 1 sends."""
    return {
        f"{side}-{number}": str(answers[attempt][question] or 0)
        for side, attempt in (("left", one.left), ("right", one.right))
        for number, question in enumerate(questions)
    }
