"""Duplicates: the same conversation again, exactly or nearly.

In: conversations, in order. Out: a filter that lets the first of its kind pass. MinHash (rensa) over runs of words; the
similarity is estimated, with a standard error of sqrt(J (1 - J) / num_hashes). It keeps a fingerprint of every
conversation that passed: about 1 KB each.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

from rensa import RMinHash, RMinHashLSH

from north_lightning.chat.render import to_json
from north_lightning.data.block_lists import words_of
from north_lightning.data.openings import read_opening
from north_lightning.errors import ConfigError
from north_lightning.interfaces import ConversationFilter
from north_lightning.seeds import run_seed
from north_lightning.types import Conversation, Count, Fraction


class Identical(ConversationFilter):
    """The very same messages again; what was thought counts. Put it last, as ``Duplicate``, of which it is a part."""

    reason = "identical"
    remembers = True

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def find_fault(self, sample: Conversation) -> str | None:
        digest = sha256(repr(sample.messages).encode(errors="backslashreplace")).digest()
        if digest in self._seen:
            return f"messages: those of kept sample {self._seen[digest]}"
        self._seen[digest] = f"{len(self._seen) + 1} {sample.source}/{sample.task_id}"
        return None


class Duplicate(ConversationFilter):
    """A conversation like an earlier one. Put it last: it remembers everything it is asked about and lets pass.

    Several attempts at one task are not duplicates of each other: what is compared is the whole conversation, but for
    the system's messages and what an agent program says around every task (``openings``).

    Args:
        min_similarity: estimated Jaccard similarity of the sets of word runs, from which on it is a duplicate.
        run_words: words in a run.
        num_hashes: of a fingerprint.
        num_bands: the hashes are compared in so many bands; more find more remote relatives.
        seed: seed of the hashes; the run's by default.
    """

    reason = "duplicate"
    remembers = True

    def __init__(
        self,
        min_similarity: Fraction = 0.9,
        run_words: Count = 5,
        num_hashes: Count = 128,
        num_bands: Count = 16,
        seed: int | None = None,
    ) -> None:
        if not 0 <= min_similarity <= 1:
            raise ConfigError(f"min_similarity: expected a number from 0 to 1, got {min_similarity}")
        self.min_similarity = min_similarity
        self.run_words = run_words
        self.num_hashes = num_hashes
        self.seed = run_seed(seed)
        self._index = RMinHashLSH(min_similarity, num_hashes, num_bands)
        self._seen: list[tuple[RMinHash, str]] = []

    def find_fault(self, sample: Conversation) -> str | None:
        hashes = RMinHash(self.num_hashes, self.seed)
        hashes.update(word_runs(sample, self.run_words))
        for key in sorted(self._index.query(hashes)):
            earlier, name = self._seen[key]
            similarity = hashes.jaccard(earlier)
            if similarity >= self.min_similarity:
                return f"messages: {similarity:.0%} like {name}"
        self._index.insert(len(self._seen), hashes)
        self._seen.append((hashes, f"kept sample {len(self._seen) + 1} {sample.source}/{sample.task_id}"))
        return None


def word_runs(sample: Conversation, length: int) -> list[str]:
    """Every run of ``length`` words of a conversation, each once; of all its words, where it has fewer."""
    words = words_of("\n".join(_texts(sample)))
    return list({" ".join(words[start : start + length]) for start in range(max(len(words) - length, 0) + 1)})


def _texts(sample: Conversation) -> Iterator[str]:
    opening = read_opening(sample.messages)
    if opening is not None:
        yield opening.task
    for index, message in enumerate(sample.messages):
        if message.role == "system" or (opening is not None and index == opening.num_messages - 1):
            continue
        yield message.role
        yield from (message.content, message.reasoning)
        yield from (f"{call.name} {to_json(call.arguments)}" for call in message.tool_calls)
