"""Reward files as tests may write them, well or badly. Standard library only."""

from __future__ import annotations

import random

_NUMBERS = (
    *("0", "1", "0.5", "-1", "1.0", "1e0", "1e309", "-1e309", "NaN", "Infinity", "true", "false", "null", '"1"'),
    '"x"',
)
_ODD = (
    *("[]", "{}", "[1]", '{"a": {"b": 1}}', '"1"', "1", "0.5", "", " ", "{", "nonsense", '{"reward": 1', "null"),
    "true",
)
_TEXTS = (
    *("0", "1", "0.5", "1\n", " 0.25 \n", "+1", "1e-3", "1_0", "0x1", "", "\n", "nan", "inf", "-inf", "1e309", "one"),
    *("1 2", "1,5", "True", "１", "\ufeff1", "1\x00"),
)  # fmt: skip


def _json(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(_ODD)
    names = rng.sample(("reward", "style", "speed", "naïve ✓", ""), rng.randint(0, 3))
    plain = rng.random() < 0.6
    numbers = [rng.choice(_NUMBERS[:6] if plain else _NUMBERS) for _ in names]
    return "{" + ", ".join(f'"{name}": {number}' for name, number in zip(names, numbers, strict=True)) + "}"


def files(count: int) -> list[dict[str, bytes]]:
    """What is in ``/logs/verifier`` after each of ``count`` tests."""
    rows = []
    for number in range(count):
        rng = random.Random(number)
        row = {}
        if rng.random() < 0.6:
            row["reward.json"] = _json(rng).encode()
        if rng.random() < 0.6:
            row["reward.txt"] = rng.choice(_TEXTS).encode()
        if row and rng.random() < 0.05:
            name = rng.choice(sorted(row))
            row[name] = rng.choice((b"\xff", b"\xef\xbb\xbf")) + row[name]
        rows.append(row)
    return rows
