"""Random names for generated tasks, in two sets that never meet.

A name is two syllables, each onset + vowel + coda (``kandor``): 64 x 64 = 4,096 of them. The consonants of onset and
coda are disjoint, so a byte-pair tokenizer learns the syllables, and copying an unseen name is copying two known
tokens; the fewer syllables, the sooner a small model learns to. A name belongs to the training or to the held-out set
by a hash of its letters, whoever asks.
"""

from __future__ import annotations

import random
from hashlib import sha256
from typing import Literal

Split = Literal["train", "heldout"]

ONSETS = "bdgkmptz"
VOWELS = "aeio"
CODAS = "nr"
HELDOUT_IN = 5
"""One in so many names is held out."""


def split_of(word: str) -> Split:
    """The set a name or number belongs to, for ever."""
    return "heldout" if sha256(word.encode()).digest()[0] % HELDOUT_IN == 0 else "train"


class NameSource:
    """Draws names and numbers of one split, none twice."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self._rng, self._split = rng, split
        self._used: set[str] = set()

    def _syllable(self) -> str:
        return self._rng.choice(ONSETS) + self._rng.choice(VOWELS) + self._rng.choice(CODAS)

    def name(self) -> str:
        """A new name of this split."""
        while True:
            word = self._syllable() + self._syllable()
            if word not in self._used and split_of(word) == self._split:
                self._used.add(word)
                return word

    def number(self, low: int = 1_000, high: int = 9_999) -> int:
        """A new number of this split in [low, high]."""
        while True:
            value = self._rng.randint(low, high)
            if str(value) not in self._used and split_of(str(value)) == self._split:
                self._used.add(str(value))
                return value
