"""The columns beside the messages: labels, verdicts, and what says nothing to a model.

A verdict is read from every column that is commonly called so, as truth value, number or text: ``resolved: "False"``,
``reward: 0.0``, ``passed: 1``, ``report: {resolved: true}``, ``result: "AgentTimeoutError"``. Where several disagree,
the attempt failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from north_lightning.data.formats.base import Notes, words
from north_lightning.data.formats.tools import TOOL_KEYS
from north_lightning.data.formats.weights import number_of
from north_lightning.data.instances import repository_of

_LABELS = {
    "source": ("source", "dataset"),
    "harness": ("harness", "agent"),
    "environment": ("environment",),
    "repo": ("repo",),
    "task_id": ("task_id", "instance_id", "task", "task_name"),
}
_HARNESSES = {
    "sweagent": "swe_agent",
    "minisweagent": "mini_swe_agent",
    "mini": "mini_swe_agent",
    "terminus2": "terminus2",
    "opencode": "opencode",
    "reactterminal": "react_terminal",
}
"""Our harnesses by the names others give them, without case and punctuation."""
_VERDICTS = words(
    "verified resolved is_resolved passed pass success successful is_success solved is_solved correct is_correct "
    "reward rewards score scores result outcome verdict target label kto_tag report test_result verifier_result "
    "eval_result"
)
_ONLY_TRUTH = ("target", "label", "kto_tag", "correct")  # columns that hold many other things
_YES = words("true yes pass passed success succeeded successful resolved solved correct c")
_NO = words(
    "false no fail failed failure unresolved unsolved incorrect wrong error i n p resolved_no empty_patch timeout"
)
_METADATA = words(
    "id uuid idx index model model_name model_provider teacher license timestamp date created_at trajectory_id "
    "traj_id session_id run_id trial_name episode patch model_patch generated_patch test_patch gold_patch cost "
    "usage metrics num_tokens num_turns length language lang category version split exit_status stop_reason "
    "eval_logs hints_text base_commit problem_statement instruction verifier_output trace_source notes "
    "final_metrics continued_trajectory_ref info loss_weight weight train trainable original_id conversation_id "
    "image_name"
)
COLUMNS = _VERDICTS | frozenset([*(key for keys in _LABELS.values() for key in keys), *_METADATA, *TOOL_KEYS])
"""Columns that are read, or that hold nothing for a model. Verdicts are counted where they could not be read."""


def labels_of(record: Mapping[str, Any], source: str, harness: str) -> dict[str, str]:
    """The labels of a record, or the given ones where it carries none."""
    labels = {label: _first(record, keys) for label, keys in _LABELS.items()}
    found = labels["harness"] or harness
    labels["harness"] = _HARNESSES.get(re.sub(r"[\W_]", "", found).lower(), found)
    labels["source"] = labels["source"] or source
    labels["repo"] = labels["repo"] or repository_of(labels["task_id"])
    return labels


def verdict_of(record: Mapping[str, Any], notes: Notes) -> bool | None:
    """Whether an attempt was judged sound; None where nobody judged."""
    verdicts = list(_verdicts(record, "$.", notes))
    return all(verdicts) if verdicts else None


def _verdicts(record: Mapping[str, Any], place: str, notes: Notes) -> Iterator[bool]:
    for key, value in record.items():
        if key not in _VERDICTS or value in (None, "", [], {}):
            continue
        if isinstance(value, Mapping):  # of several graders, or a report
            named = any(below in _VERDICTS for below in value)
            yield from _verdicts(value if named else {"reward": list(value.values())}, f"{place}{key}.", notes)
            continue
        values = value if isinstance(value, list) else [value]
        for one in values:
            one = one.get("value") if isinstance(one, Mapping) else one
            verdict = None if key in _ONLY_TRUTH and number_of(one) not in (0, 1) else _read(one, key)
            if verdict is not None:
                yield verdict
            elif one is not None and str(one).strip().lower() not in ("", "none", "null", "nan", "unknown", "n/a"):
                notes.not_understood[f"{place}{key}"] += 1


def _read(value: Any, key: str) -> bool | None:
    number = number_of(value)
    if number is not None:
        is_scale = key in ("score", "scores") and not isinstance(value, bool) and number not in (0, 1)
        return None if is_scale else number >= 1  # a score of 4 may be of 5
    word = value.strip().lower() if isinstance(value, str) else ""
    if word in _YES:
        return True
    return False if word in _NO or re.fullmatch(r"\w+(?:error|exception)", word) else None


def _first(record: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    values = (record.get(key) for key in keys)
    return next((str(value) for value in values if value and isinstance(value, str | int)), "")
