"""``python -m north_lightning human-eval export`` and ``import``: a study for Label Studio and back, ratings as tables.

In: a study and its ratings; a JSON export of Label Studio. Out: ``label_studio/KIND.xml`` (labeling configuration) and
``KIND.json`` (tasks, with what was rated as annotations), ``ratings.jsonl`` and ``ratings.csv``; ratings in the study.
No model is named, the seal is not read. Label Studio does not keep the order of the two steps; the app does.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from north_lightning.errors import DataError
from north_lightning.human_evaluation.app import CHOICES, PREFERENCES, SIDES, make_templates, ratings_of
from north_lightning.human_evaluation.assignments import Assignment
from north_lightning.human_evaluation.store import Judgment, Store
from north_lightning.human_evaluation.study import RATINGS, Study
from north_lightning.run_folders import write_result
from north_lightning.untrusted import MAX_FILE_BYTES, load_json


def export_ratings(study: Path, output_dir: Path) -> None:
    """Write a study for Label Studio, and its ratings as JSON lines and CSV. No model is named.

    Args:
        study: The study folder.
        output_dir: Where to.
    """
    opened, judgments = Study(study), Store(study / RATINGS).judgments()
    seats = [one for rows in opened.assignments.values() for one in rows]
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "label_studio").mkdir(exist_ok=True)
    template = make_templates().get_template("plain.html.jinja")
    for kind, questions in opened.rubrics.items():
        own = [one for one in seats if opened.comparison_of(one).functionality == kind]
        tasks = [
            {
                "id": number,
                "data": {
                    "assignment": one.id,
                    "rater": one.rater,
                    "instruction": opened.instructions[opened.comparison_of(one).item],
                    **{side: template.render(page=opened.page(getattr(one, side))) for side in SIDES},
                },
                "annotations": [_annotation(one, judgments[one.id], questions)] if one.id in judgments else [],
            }
            for number, one in enumerate(own, 1)
        ]
        write_result(output_dir / "label_studio" / f"{kind}.json", json.dumps(tasks, indent=1) + "\n")
        write_result(output_dir / "label_studio" / f"{kind}.xml", labeling_config(questions) + "\n")
    rows = list(_rows(opened, seats, judgments))
    write_result(output_dir / "ratings.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["rater", "comparison", "functionality", "side", "attempt", "statement", "rating"])
    for row in rows:
        common = (row["rater"], row["comparison"], row["functionality"])
        for side in SIDES:
            for statement, value in row["ratings"][side].items():
                writer.writerow([*common, side, row[side], statement, "" if value is None else value])
        writer.writerow([*common, "both", "", "preference, 1 left to 5 right", row["preference"] or ""])
    write_result(output_dir / "ratings.csv", table.getvalue())
    print(f"{output_dir}: {len(rows)} judgments of {len(seats)}")


def import_ratings(study: Path, files: list[Path]) -> None:
    """Take ratings from Label Studio into a study.

    Args:
        study: The study folder.
        files: JSON exports of the projects that were made of `human-eval export`'s files.
    """
    opened, store = Study(study), Store(study / RATINGS)
    seats = {one.id: one for rows in opened.assignments.values() for one in rows}
    read = [found for file in files for found in _annotated(file, opened, seats)]
    for one, answers, preference, comment in read:
        store.save_ratings(one.id, answers)
        store.save_preference(one.id, preference, comment)
    print(f"{study}: {len(read)} judgments taken")


def labeling_config(questions: list[str]) -> str:
    """Label Studio's configuration: both attempts, the statements about each, the preference."""
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "HyperText", name="instruction", value="$instruction")
    for label, side in zip("AB", SIDES, strict=True):
        ElementTree.SubElement(view, "Header", value=f"Attempt {label}")
        ElementTree.SubElement(view, "HyperText", name=side, value=f"${side}")
        for number, question in enumerate(questions):
            ElementTree.SubElement(view, "Header", value=f"{label}: {question}", size="5")
            _add_choices(view, f"{side}-{number}", side, CHOICES)
    ElementTree.SubElement(view, "Header", value="All in all:")
    _add_choices(view, "preference", "left", PREFERENCES)
    ElementTree.SubElement(view, "TextArea", name="comment", toName="left", placeholder="Why? (optional)")
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode")


def _add_choices(view: ElementTree.Element, name: str, side: str, choices: tuple[tuple[str, str], ...]) -> None:
    settings = {"name": name, "toName": side, "choice": "single-radio", "required": "true", "showInline": "true"}
    element = ElementTree.SubElement(view, "Choices", settings)
    for _, text in choices:
        ElementTree.SubElement(element, "Choice", value=text)


def _annotation(one: Assignment, judgment: Judgment, questions: list[str]) -> dict[str, Any]:
    said = {
        f"{side}-{number}": dict(CHOICES)[str(judgment.answers[getattr(one, side)][question] or 0)]
        for side in SIDES
        for number, question in enumerate(questions)
    }
    said["preference"] = dict(PREFERENCES)[str(judgment.preference or 0)]
    results: list[dict[str, Any]] = [
        {
            "from_name": name,
            "to_name": "right" if name.startswith("right") else "left",
            "type": "choices",
            "value": {"choices": [text]},
        }
        for name, text in said.items()
    ]
    if judgment.comment:
        text = {"text": [judgment.comment]}
        results.append({"from_name": "comment", "to_name": "left", "type": "textarea", "value": text})
    return {"result": results}


def _annotated(
    file: Path, study: Study, seats: Mapping[str, Assignment]
) -> Iterator[tuple[Assignment, dict[str, dict[str, int | None]], int | None, str]]:
    numbers = {text: number for number, text in CHOICES}, {text: number for number, text in PREFERENCES}
    if file.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"files: {file}: expected at most {MAX_FILE_BYTES} bytes, got more")
    tasks = load_json(file.read_bytes())
    for place, task in enumerate(tasks if isinstance(tasks, list) else [None]):
        try:
            one = seats[task["data"]["assignment"]]
            done = [each for each in task.get("annotations", []) if not each.get("was_cancelled")]
            if not done:
                continue
            values = {result["from_name"]: result["value"] for result in done[-1]["result"]}
            comment = "\n".join(values.pop("comment", {"text": []})["text"])
            preference = numbers[1][values.pop("preference")["choices"][0]]
            form = {name: numbers[0][value["choices"][0]] for name, value in values.items()}
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(
                f"files: {file}: task {place + 1}: expected a finished task of this study's export, got none "
                f"({type(error).__name__}: {error})"
            ) from error
        answers, missing = ratings_of(form, one, study.questions(one))
        if missing:
            raise DataError(f"files: {file}: task {place + 1}: expected an answer to {missing[0]!r}, got none")
        yield one, answers, int(preference) or None, comment


def _rows(study: Study, seats: list[Assignment], judgments: Mapping[str, Judgment]) -> Iterator[dict[str, Any]]:
    for one in seats:
        if (judgment := judgments.get(one.id)) is not None:
            comparison = study.comparison_of(one)
            yield {
                "rater": one.rater,
                "comparison": one.comparison,
                "functionality": comparison.functionality,
                "is_attention_item": bool(comparison.expected),
                **{side: getattr(one, side) for side in SIDES},
                "ratings": {side: judgment.answers[getattr(one, side)] for side in SIDES},
                "preference": judgment.preference,
                "comment": judgment.comment,
            }
