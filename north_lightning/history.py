"""What a training run has logged, read back: one JSON line per optimizer step.

In: a run's ``history.jsonl``. Out: its lines. Not here: what writes it (``callbacks``). Free of Lightning, as reports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HISTORY = "history.jsonl"

History = list[dict[str, Any]]
"""``{"step": 3, "time_s": 1.5, "train/loss": 0.5, ...}``, in order of ``step``."""


def read_history(path: Path) -> History:
    """The lines of a ``history.jsonl``; a last line that a crash cut off is left out."""
    lines: History = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
