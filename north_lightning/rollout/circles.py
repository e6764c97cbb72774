"""Ends attempts that go in circles: the same turn with the same result, over and over.

In: the messages after each turn. Out: whether the limit is reached. Reasoning does not count: a model that thinks anew
and does the same again stands still.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from north_lightning.types import Message

MAX_SAME_TURNS = 10


class CircleDetector:
    """Counts equal turns in a row; ``max_same_turns`` 0 never finds a circle."""

    def __init__(self, max_same_turns: int = MAX_SAME_TURNS) -> None:
        self.max_same_turns = max_same_turns
        self._last = ""
        self._count = 0

    def closes(self, messages: Sequence[Message]) -> bool:
        """Whether the turn that ``messages`` end with is the last one allowed of a row of equal ones."""
        turn = _last_turn(messages)
        self._count = self._count + 1 if turn == self._last else 1
        self._last = turn
        return 0 < self.max_same_turns <= self._count


def _last_turn(messages: Sequence[Message]) -> str:
    start = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=len(messages))
    said = messages[start:]
    calls = [[call.name, dict(call.arguments)] for message in said for call in message.tool_calls]
    return json.dumps([calls, [message.content for message in said]], sort_keys=True, default=str)
