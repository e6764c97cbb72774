"""Seeds from names: the same (seed, group, attempt, turn) gives the same number on every machine and after every
resume."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 31-bit number (every sampler and random generator accepts it) that is a pure function of ``parts``."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
