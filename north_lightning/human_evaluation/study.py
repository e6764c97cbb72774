"""The study folder: what raters see, who rates what, and, apart from that, whose attempts they are.

In: the comparisons and pages of ``prepare``. Out: the folder, and ``Study``, which is all that the app knows of it:

    study.json          items, comparisons, rubric questions, assignments; no model is named
    content/ID/         an attempt: page.json and its files, numbered
    raters.json         the token of each rater
    sealed.json         whose attempts they are, and the key of the randomization; only `report` reads it
    ratings.sqlite      what the raters say (``store``)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from north_lightning.errors import DataError
from north_lightning.human_evaluation.assignments import Assignment, Comparison
from north_lightning.human_evaluation.pages import Page

FORMAT = 1
STUDY, SEALED, RATERS, RATINGS = "study.json", "sealed.json", "raters.json", "ratings.sqlite"
SCALE = (1, 2, 3, 4, 5)


@dataclass(frozen=True, slots=True)
class Seal:
    """What the raters must not know: the model of every attempt, and the key."""

    models: Sequence[str]
    attempts: Mapping[str, str]
    items: Mapping[str, str]
    key: str


def digest(content: bytes) -> str:
    """SHA-256 as a decimal number."""
    return str(int.from_bytes(hashlib.sha256(content).digest(), "big"))


class Study:
    """A study as the app knows it."""

    def __init__(self, folder: Path) -> None:
        path = folder / STUDY
        if not path.is_file():
            raise DataError(
                f"study: expected the folder of a study, '{path}' does not exist: `human-eval prepare` makes it"
            )
        read = json.loads(path.read_text())
        if read.get("format") != FORMAT:
            raise DataError(f"{path}: expected a study of format {FORMAT}, got {read.get('format')}: prepare it again")
        self.folder = folder
        self.rubrics: dict[str, list[str]] = read["rubrics"]
        self.instructions: dict[str, str] = read["instructions"]
        self.lengths: dict[str, int] = read["lengths"]
        self.sealed_digest: str = read["sealed_digest"]
        self.comparisons = {
            row["id"]: Comparison(**row | {"attempts": tuple(row["attempts"])}) for row in read["comparisons"]
        }
        self.assignments = {rater: [Assignment(**row) for row in rows] for rater, rows in read["assignments"].items()}
        self.raters: dict[str, str] = json.loads((folder / RATERS).read_text())

    def comparison_of(self, assignment: Assignment) -> Comparison:
        return self.comparisons[assignment.comparison]

    def questions(self, assignment: Assignment) -> list[str]:
        return self.rubrics[self.comparison_of(assignment).functionality]

    def page(self, attempt: str) -> dict[str, Any]:
        return _read_page(self.folder / "content" / attempt / "page.json")

    def file(self, attempt: str, path: str) -> tuple[str, Path] | None:
        """Media type and place of an attempt's file."""
        if attempt not in self.lengths:
            return None
        row = self.page(attempt)["files"].get(path)
        return (row[0], self.folder / "content" / attempt / row[1]) if row else None

    def unseal(self) -> Seal:
        """``DataError`` if the seal is not the one that was made with the study."""
        path = self.folder / SEALED
        content = path.read_bytes() if path.is_file() else b""
        if digest(content) != self.sealed_digest:
            raise DataError(
                f"{path}: expected the file that was made with the study, got {'another' if content else 'none'}"
            )
        return Seal(**json.loads(content))


@lru_cache(maxsize=256)
def _read_page(path: Path) -> dict[str, Any]:
    page: dict[str, Any] = json.loads(path.read_text())
    return page


def write_study(
    folder: Path,
    comparisons: Sequence[Comparison],
    assignments: Mapping[str, Sequence[Assignment]],
    instructions: Mapping[str, str],
    rubrics: Mapping[str, Sequence[str]],
    pages: Mapping[str, Page],
    tokens: Mapping[str, str],
    seal: Seal,
) -> None:
    """Write all but the ratings into the new directory ``folder``."""
    for attempt, page in pages.items():
        place = folder / "content" / attempt
        place.mkdir(parents=True)
        files = {path: (kind, str(number)) for number, (path, (kind, _)) in enumerate(page.files.items())}
        for number, (_, content) in enumerate(page.files.values()):
            (place / str(number)).write_bytes(content)
        (place / "page.json").write_text(json.dumps(page.shown | {"files": files}) + "\n")
    sealed = (json.dumps(asdict(seal), indent=1) + "\n").encode()
    for name, content in ((SEALED, sealed), (RATERS, (json.dumps(tokens, indent=1) + "\n").encode())):
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(content)
    study = {
        "format": FORMAT,
        "sealed_digest": digest(sealed),
        "rubrics": rubrics,
        "instructions": instructions,
        "lengths": {attempt: page.length for attempt, page in pages.items()},
        "comparisons": [asdict(one) | {"attempts": sorted(one.attempts)} for one in comparisons],
        "assignments": {rater: [asdict(one) for one in rows] for rater, rows in assignments.items()},
    }
    (folder / STUDY).write_text(json.dumps(study, indent=1) + "\n")
