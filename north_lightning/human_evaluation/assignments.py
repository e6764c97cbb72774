"""Who rates which comparison, and which attempt is on the left.

In: comparisons and a secret key. Out: a list for each rater. Everything that looks random is an HMAC under the key: it
can be checked once the key is known, and not guessed before. Sides are balanced: within a functionality and a pair of
models each one is on the left as often as on the right, give or take one, for each rater and for all of them.
"""

from __future__ import annotations

import hmac
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two attempts at an item; ``pair`` numbers the pair of models, whose first one has the first attempt. ``expected``
    is the better attempt of an attention item, and empty for all others."""

    id: str
    item: str
    functionality: str
    attempts: tuple[str, str]
    pair: int = 0
    expected: str = ""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One comparison before one rater, with an id of its own."""

    id: str
    rater: str
    comparison: str
    left: str
    right: str


def keyed(key: bytes, *parts: object) -> str:
    """HMAC-SHA256 as 39 decimal digits: no name of a model is in them by chance."""
    digest = hmac.new(key, "\0".join(map(str, parts)).encode(), "sha256").digest()
    return f"{int.from_bytes(digest[:16], 'big'):039d}"


def assign(
    comparisons: Sequence[Comparison], raters: Sequence[str], double_rated: float, num_attention: int, key: bytes
) -> dict[str, list[Assignment]]:
    """Every comparison goes to one rater, a share ``double_rated`` of each functionality's to two; attention items
    (those with ``expected``) to whom has not seen the item otherwise, where there is one. Loads differ by one at most
    within a functionality."""
    real = sorted((one for one in comparisons if not one.expected), key=lambda one: keyed(key, "order", one.id))
    seats: list[tuple[Comparison, str]] = []
    for functionality in sorted({one.functionality for one in real}):
        own = [one for one in real if one.functionality == functionality]
        num_double = math.ceil(double_rated * len(own))
        for number, one in enumerate(own):
            for _ in range(1 + (number < num_double)):
                seats.append((one, raters[len(seats) % len(raters)]))
    lists: dict[str, list[Assignment]] = {rater: [] for rater in raters}
    turn: Counter[tuple[str, int]] = Counter()
    seats.sort(key=lambda seat: (raters.index(seat[1]), keyed(key, "side", *seat[1:], seat[0].id)))
    for one, rater in seats:
        kind = (one.functionality, one.pair)
        start = int(keyed(key, "start", *kind))
        lists[rater].append(_seat(one, rater, (start + turn[kind]) % 2, key))
        turn[kind] += 1
    planted = [one for one in comparisons if one.expected]
    for rater, own_list in lists.items():
        seen = {one.comparison for one in own_list}
        items = {one.item for one in comparisons if one.id in seen}
        free = sorted(planted, key=lambda one: (one.item in items, keyed(key, "attention", rater, one.id)))
        for one in islice(free, num_attention):
            own_list.append(_seat(one, rater, int(keyed(key, "side", rater, one.id)) % 2, key))
        own_list.sort(key=lambda one: keyed(key, "sequence", one.id))
    return lists


def _seat(one: Comparison, rater: str, is_swapped: int, key: bytes) -> Assignment:
    left, right = one.attempts[::-1] if is_swapped else one.attempts
    return Assignment(keyed(key, "assignment", rater, one.id), rater, one.id, left, right)
