"""What a message or a record says about whether it is to be learned, under every name that is in use.

OpenAI, Mistral and axolotl write ``weight``, axolotl ``train`` too, LLaMA-Factory ``loss_weight``, ms-swift ``loss``,
others ``trainable``; ATIF marks ``is_copied_context`` and, with ``llm_call_count`` 0, what no model wrote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from north_lightning.data.formats.base import Notes, words

_POSITIVE = words(
    "weight loss loss_weight loss_scale loss_mask train trainable is_trainable training train_on train_on_turn "
    "compute_loss llm_call_count"
)
_NEGATIVE = words("mask masked is_masked ignore ignore_loss is_copied_context is_demo")
_PARTLY = ("train_detail", "training_detail")  # axolotl's spans of characters
_OF_RECORD = ("weight", "loss_weight", "train", "trainable")
WEIGHT_KEYS = (*sorted(_POSITIVE | _NEGATIVE), *_PARTLY)
_WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0, "none": 0.0}


def is_trained(message: Mapping[str, Any], role: str, notes: Notes) -> bool:
    """Whether a message's turn is learned. A weight that we have no place for is counted as not understood."""
    trained = True
    for key in WEIGHT_KEYS:
        if (value := message.get(key)) is None:
            continue
        amount = number_of(value)
        has_no_place = amount not in (0, 1) or (role != "assistant" and amount and key in _POSITIVE)
        if has_no_place and key != "llm_call_count":
            notes.not_understood[f"$.messages[].{key}={str(value)[:20]}"] += 1
        if key in _PARTLY or amount is None:
            trained = False
        else:
            trained = trained and (amount > 0 if key in _POSITIVE else amount == 0)
    return trained


def is_zero(record: Mapping[str, Any]) -> bool:
    """Whether a whole record is marked as not to be learned."""
    amounts = [number_of(record[key]) for key in _OF_RECORD if record.get(key) is not None]
    return any(amount is not None and amount <= 0 for amount in amounts)


def number_of(value: Any) -> float | None:
    """A truth value or a number, also as text; None for anything else."""
    if isinstance(value, str):
        word = value.strip().lower()
        try:
            value = _WORDS[word] if word in _WORDS else float(word)
        except ValueError:
            return None
    if isinstance(value, bool | int | float) and not math.isnan(value):
        return float(value)
    return None
