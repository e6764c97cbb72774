"""Whether an attempt went in circles, as a pure function: for metrics, and for a penalty.

In: a finished rollout. Out: yes or no. It ends no attempt (that is ``rollout.circles``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

from north_lightning.types import Message, Rollout

LOOP_WINDOW_TURNS = 10
LOOP_REPEATS = 3
REPETITION_MAX_PERIOD = 64
REPETITION_MIN_TOKENS = 48
REPETITION_MIN_REPEATS = 4


def has_loop(rollout: Rollout) -> bool:
    """Whether the attempt went in circles.

    Either the same calls got the same observations three times within ten turns, or one turn repeats itself: at least
    48 tokens in which a block of at most 64 comes four times in a row.
    """
    return _repeats_exchange(rollout.messages) or any(
        _repeats_tokens(rollout.token_ids[turn.start : turn.end]) for turn in rollout.turns
    )


def _repeats_exchange(messages: Sequence[Message]) -> bool:
    exchanges = _exchanges(messages)
    for end in range(1, len(exchanges) + 1):
        recent = exchanges[max(0, end - LOOP_WINDOW_TURNS) : end]
        if recent.count(recent[-1]) >= LOOP_REPEATS:
            return True
    return False


def _exchanges(messages: Sequence[Message]) -> list[str]:
    """One text per turn with calls: what was called and what came back."""
    starts = [i for i, message in enumerate(messages) if message.role == "assistant"]
    exchanges = []
    for start, end in pairwise([*starts, len(messages)]):
        if messages[start].tool_calls:
            calls = [[call.name, dict(call.arguments)] for call in messages[start].tool_calls]
            results = [message.content for message in messages[start + 1 : end]]
            exchanges.append(json.dumps([calls, results], sort_keys=True))
    return exchanges


def _repeats_tokens(token_ids: Sequence[int]) -> bool:
    for period in range(1, min(REPETITION_MAX_PERIOD, len(token_ids) // REPETITION_MIN_REPEATS) + 1):
        needed = max(REPETITION_MIN_TOKENS, REPETITION_MIN_REPEATS * period) - period
        run = 0
        for earlier, later in zip(token_ids, token_ids[period:], strict=False):
            run = run + 1 if earlier == later else 0
            if run >= needed:
                return True
    return False
