"""``python -m north_lightning human-eval prepare``: attempts of two or more models, as a study that people can rate.

In: folders of attempts (``submissions``). Out: the study folder (``study``). The names of the models are replaced in
all that raters see, and at the end looked for in every file that the app reads: a study that holds one is not made.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console

from north_lightning.durable import replace_folder, unfinished_name
from north_lightning.errors import ConfigError, DataError
from north_lightning.human_evaluation.assignments import Assignment, Comparison, assign, keyed
from north_lightning.human_evaluation.names import Names
from north_lightning.human_evaluation.pages import Page, make_markdown, make_page
from north_lightning.human_evaluation.study import SEALED, Seal, write_study
from north_lightning.human_evaluation.submissions import FUNCTIONALITIES, Submission, read_side
from north_lightning.run_folders import claim
from north_lightning.tasks import load_task_sets
from north_lightning.types import Count, Fraction, Whole

RUBRICS: dict[str, list[str]] = {
    "code_explanation": [
        "What it says about the code is correct.",
        "It covers what matters for the question.",
        "It is easy to follow.",
    ],
    "code_editing": [
        "The change does what was asked.",
        "It leaves alone what should be left alone.",
        "The new code is easy to read and fits what is around it.",
    ],
    "data_visualization": [
        "It shows the data that was asked for, correctly.",
        "The kind of chart suits the data and the question.",
        "Labels, scales and colors are easy to read.",
    ],
    "implementation_from_scratch": [
        "It does what was asked.",
        "It can be used as it was delivered.",
        "The code is well organized and easy to read.",
    ],
}
"""Statements that a rater agrees with, from 1 (strongly disagree) to 5 (strongly agree)."""
MIN_NAME = 3


def prepare_study(
    sides: list[str],
    output_dir: Path = Path("runs/study"),
    raters: Count = 3,
    double_rated: Fraction = 0.25,
    attention_items: Whole = 2,
    hide: list[str] | None = None,
    task_sets: list[Path] | None = None,
    functionality: dict[str, str] | None = None,
    rubrics: dict[str, list[str]] | None = None,
    overwrite: bool = False,
) -> None:
    """Make a study: pairs of attempts at the same items, blind, for a number of raters.

    Args:
        sides: The models, as leading words NAME=FOLDER. FOLDER holds ITEM/attempt.json, or is an output folder of
            `test`; FOLDER:CHECKPOINT is one of its checkpoints. Items that every model has attempted are compared.
        output_dir: The study folder.
        raters: Number of raters; each has a token.
        double_rated: Share of the comparisons of each functionality that two raters judge. Agreement is measured there.
        attention_items: Comparisons for each rater, in addition, where one attempt belongs to another item.
        hide: Words that give a model away, beside the names in `sides`: other spellings, its maker.
        task_sets: For evaluation folders: the tasks, for their instructions and for the changes to their files.
        functionality: For evaluation folders: task family -> code_explanation, code_editing, data_visualization or
            implementation_from_scratch; the family "*" is every other.
        rubrics: Functionality -> statements, in place of the built-in ones.
        overwrite: Move an earlier study in `output_dir` aside.
    """
    tasks = {task.id: task for task in (load_task_sets(task_sets) if task_sets else [])}
    statements = _rubrics(rubrics or {})
    words = _own_words(statements)
    read, hidden, checkpoints = {}, list(hide or []), []
    for side in sides:
        name, folder, checkpoint = _side(str(side))
        if name in read:
            raise ConfigError(f"sides: expected names that differ, got {name!r} twice")
        read[name] = read_side(folder, checkpoint, tasks, functionality or {})
        hidden.append(name)
        checkpoints += [checkpoint] if len(checkpoint) >= MIN_NAME and not Names([checkpoint]).is_in(words) else []
    if len(read) < 2:
        raise ConfigError(f"sides: expected NAME=FOLDER of two models or more, got {len(read)}")
    if double_rated and raters < 2:
        raise ConfigError(
            f"raters: expected 2 or more where comparisons are judged twice, got {raters}: --double_rated 0"
        )
    for name in hidden:
        if Names([name]).is_in(words):  # it could not be told from a leak
            raise ConfigError(
                f"sides, hide: expected names that are no words of the pages, got {name!r}: choose a distinctive one"
            )
    names = Names([*hidden, *checkpoints])
    study = _StudyMaker(read, names, secrets.token_hex(32))
    people = [f"rater-{number}" for number in range(1, raters + 1)]
    study.compare(attention_items * raters)
    assignments = assign(study.comparisons, people, double_rated, attention_items, study.key.encode())
    tokens = {rater: _token(names) for rater in people}
    claim("output_dir", [output_dir], overwrite)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    written = unfinished_name(output_dir)
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir()
    seal = Seal(list(read), study.owners, study.items, study.key)
    used = {one.functionality for one in study.comparisons}
    statements = {name: statements[name] for name in FUNCTIONALITIES if name in used}
    write_study(written, study.comparisons, assignments, study.instructions, statements, study.pages, tokens, seal)
    check_sealed(written, names)
    replace_folder(written, output_dir)
    _describe(study, assignments, output_dir)


def _side(word: str) -> tuple[str, Path, str]:
    """Name, folder and checkpoint of ``NAME=FOLDER[:CHECKPOINT]``."""
    named = re.fullmatch(r"([^=/]+)=(.+)", word)
    if not named:
        raise ConfigError(f"sides: expected NAME=FOLDER, got {word!r}")
    if len(named[1]) < MIN_NAME:
        raise ConfigError(
            f"sides: expected a name of {MIN_NAME} characters or more, got {named[1]!r}: it is replaced in all texts"
        )
    folder, colon, checkpoint = (named[2], "", "") if Path(named[2]).is_dir() else named[2].rpartition(":")
    path = Path(folder if colon else named[2])
    if not path.is_dir():
        raise ConfigError(f"sides: expected a folder of attempts, '{path}' does not exist")
    return named[1], path, checkpoint


def _token(names: Names) -> str:
    while names.is_in(token := secrets.token_urlsafe(24)):
        pass
    return token


def _rubrics(own: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    for name, statements in own.items():
        if name not in FUNCTIONALITIES or not statements or len(set(statements)) < len(statements):
            raise ConfigError(
                f"rubrics: expected different statements for {', '.join(FUNCTIONALITIES)}, got {name}: {statements}"
            )
    return {**RUBRICS, **{name: list(statements) for name, statements in own.items()}}


def _own_words(rubrics: Mapping[str, Sequence[str]]) -> str:
    """What the pages themselves say."""
    own = [*rubrics, *(text for texts in rubrics.values() for text in texts)]
    own += [path.read_text() for kind in ("templates", "static") for path in (Path(__file__).parent / kind).iterdir()]
    return "\n".join(own)


class _StudyMaker:
    """Collects comparisons and the pages of their attempts."""

    def __init__(self, sides: Mapping[str, Mapping[str, Submission]], names: Names, key: str) -> None:
        self.sides, self.names, self.key = sides, names, key
        self.models = list(sides)
        shared = sorted(set.intersection(*(set(side) for side in sides.values())))
        if not shared:
            raise DataError(f"sides: expected items that {' and '.join(self.models)} have both attempted, found none")
        self.left_out = sorted(set().union(*sides.values()) - set(shared))
        self.items = {self._id("item", item): item for item in shared}
        self.comparisons: list[Comparison] = []
        self.instructions: dict[str, str] = {}
        self.pages: dict[str, Page] = {}
        self.owners: dict[str, str] = {}
        self.places: dict[str, str] = {}

    def _id(self, *parts: object) -> str:
        return keyed(self.key.encode(), *parts)

    def compare(self, attention_items: int) -> None:
        for item_id, item in self.items.items():
            functionality = self._agreed(item)
            attempts = [self._add(self.sides[model][item], item_id, model) for model in self.models]
            self.owners.update(zip(attempts, self.models, strict=True))
            asked = next(filter(None, (self.sides[model][item].instruction for model in self.models)), "")
            self.instructions[item_id] = make_markdown(asked or self.sides[self.models[0]][item].asked, self.names)
            for number, pair in enumerate(combinations(attempts, 2)):
                self.comparisons.append(Comparison(self._id("comparison", *pair), item_id, functionality, pair, number))
        if attention_items:
            self._plant(attention_items)

    def _agreed(self, item: str) -> str:
        for name in ("functionality", "instruction"):
            values = {value for model in self.models if (value := getattr(self.sides[model][item], name))}
            if len(values) > 1:
                raise DataError(f"sides: {item}: expected the same {name} from every model, got different ones")
        return self.sides[self.models[0]][item].functionality

    def _add(self, one: Submission, *name: str) -> str:
        attempt = self._id("attempt", *name)
        self.pages[attempt] = make_page(one, self.names)
        self.places[attempt] = f"{self.items[name[0]]}, {name[1]}"
        return attempt

    def _plant(self, num: int) -> None:
        """Comparisons of an attempt with an attempt of the same model at another item."""
        items = sorted(self.items, key=lambda item: self._id("planted", item))
        for number, item in enumerate(items):
            side = self.sides[self.models[number % len(self.models)]]
            good = side[self.items[item]]
            others = [side[self.items[other]] for other in items[number + 1 :] + items[:number]]
            others.sort(key=lambda one: one.functionality != good.functionality)
            wrong = next((one for one in others if _work(one) != _work(good) and any(_work(one))), None)
            if wrong is None or not any(_work(good)):
                continue
            pair = self._add(good, item, "right"), self._add(wrong, item, "wrong")
            name = self._id("comparison", *pair)
            self.comparisons.append(Comparison(name, item, good.functionality, pair, expected=pair[0]))
            if (num := num - 1) == 0:
                return
        if num and not any(one.expected for one in self.comparisons):
            raise DataError(
                "attention_items: expected different attempts at two items to make them of: --attention_items 0"
            )


def _work(one: Submission) -> tuple[Any, ...]:
    return one.answer, one.diff, one.files


def check_sealed(folder: Path, names: Names) -> None:
    """``DataError`` if a name is in anything that the app reads. Pictures hold nothing but pixels."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name == SEALED or (content := path.read_bytes()).startswith(b"\x89PNG"):
            continue
        text = content.decode()
        if path.suffix == ".json":  # as it is, not as it is escaped
            text = json.dumps(json.loads(text), ensure_ascii=False)
        if names.is_in(text):
            raise DataError(
                f"sides, hide: a name would be in {path.relative_to(folder)}: choose names that are no words of the "
                "attempts' or the study's own"
            )


def _describe(study: _StudyMaker, assignments: Mapping[str, Sequence[Assignment]], output_dir: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    kinds = Counter(one.functionality for one in study.comparisons if not one.expected)
    loads = sorted({len(rows) for rows in assignments.values()})
    console.print(f"{sum(kinds.values())} comparisons: {', '.join(f'{num} {kind}' for kind, num in kinds.items())}")
    console.print(f"{len(assignments)} raters with {' or '.join(map(str, loads))} comparisons each")
    found = [(study.places[attempt], study.pages[attempt]) for attempt in study.owners]
    replaced = [(place, page.num_names) for place, page in found if page.num_names]
    if replaced:
        console.print(f"names were replaced {sum(num for _, num in replaced)} times in {len(replaced)} attempts")
    withheld = [f"{place}: {what}" for place, page in found for what in dict.fromkeys(page.withheld)]
    if withheld:
        more = f", and {len(withheld) - 20} more" if len(withheld) > 20 else ""
        console.print(f"withheld, because it spells a name: {'; '.join(withheld[:20])}{more}", markup=False)
    if study.left_out:
        console.print(f"left out, because a model has no attempt: {', '.join(study.left_out)}")
    console.print(f"next: python -m north_lightning human-eval serve --study {output_dir}")
