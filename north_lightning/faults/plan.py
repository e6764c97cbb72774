"""Which call fails, and how.

In: a seed, and what a call is about. Out: the kind of fault that strikes it, or none. The answer depends on nothing
else, least of all on time, threads and processes, so the same seed fails the same calls again. What a kind of fault
does is known to those who ask.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from north_lightning.seeds import derive_seed, run_seed


@dataclass(frozen=True)
class FaultPlan:
    """Draws faults. Picklable: the same plan works in several processes.

    A fault strikes its call once, and the call succeeds when it is made again; a lasting one strikes every time.

    Args:
        folder: Where every fault that has struck leaves an empty file with its name; shared by all processes.
        seed: Seed of the draws; the run's by default.
        rates: Kind of fault -> share of the calls that it strikes. A kind that is not named never strikes.
        lasting: Share of the faults that last, where a call can fail for ever at all.
    """

    folder: Path
    seed: int = field(default_factory=run_seed)
    rates: Mapping[str, float] = field(default_factory=dict)
    lasting: float = 0.0

    def strike(self, kinds: Sequence[str], *call: int | str, may_last: bool = False) -> str | None:
        """The one of ``kinds`` that strikes this call now; None for none."""
        draw = random.Random(derive_seed(self.seed, *kinds, *call))
        value = draw.random()
        for kind in kinds:
            value -= self.rates.get(kind, 0.0)
            if value < 0:
                is_first = self._leave_mark(kind, call)
                return kind if is_first or (may_last and draw.random() < self.lasting) else None
        return None

    def struck(self) -> Counter[str]:
        """How many faults of each kind have struck; a lasting one counts once."""
        return Counter(mark.split(" ")[0] for mark in self.schedule())

    def schedule(self) -> list[str]:
        """Every fault that has struck: its kind, and the call."""
        return sorted(path.name for path in self.folder.glob("*")) if self.folder.exists() else []

    def _leave_mark(self, kind: str, call: Sequence[int | str]) -> bool:
        """Whether it was not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            (self.folder / " ".join([kind, *map(str, call)]).replace("/", "_")).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
