"""One seed per run, and seeds derived from names: the same (seed, group, attempt, turn) gives the same number on every
machine and after every resume.

In: ``seed_everything`` of ``fit``, or a command's ``seed``. Out: the seed of every part that draws.
"""

from __future__ import annotations

import hashlib
import os

from north_lightning.errors import ConfigError

VARIABLE = "PL_GLOBAL_SEED"
"""Environment variable in which Lightning's ``seed_everything`` leaves the run's seed, for all processes of a run."""
MAX_SEED = 2**32 - 1


def run_seed(own: int | None = None) -> int:
    """A part's own seed where it was set apart, else the run's; 0 where nobody has chosen one."""
    seed = int(os.environ.get(VARIABLE, 0)) if own is None else own
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed: expected a number from 0 to {MAX_SEED}, got {seed}")
    return seed


def set_run_seed(seed: int) -> None:
    """Make ``seed`` the run's, for this process and those it starts."""
    os.environ[VARIABLE] = str(run_seed(seed))


def derive_seed(*parts: int | str) -> int:
    """A 31-bit number (every sampler and random generator accepts it) that is a pure function of ``parts``."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
