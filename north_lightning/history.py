"""What a training run has logged, read back: one JSON line per optimizer step.

In: a run's ``history.jsonl``. Out: its lines. Not here: what writes it (``callbacks``). Free of Lightning, as reports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from north_lightning.errors import DataError

HISTORY = "history.jsonl"

History = list[dict[str, Any]]
"""``{"step": 3, "time_s": 1.5, "train/loss": 0.5, ...}``, in order of ``step``."""


def read_history(path: Path) -> History:
    """The lines of a ``history.jsonl``; a last line that a crash cut off is left out.

    Raises:
        DataError: another line is damaged; names it.
    """
    texts = path.read_text().splitlines()
    lines: History = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise DataError(f"{path}:{number}: expected a JSON object, got {text[:80]!r} ({error})") from error
    return lines
