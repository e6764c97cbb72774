"""Tokenised samples, four bytes a token, and packed batches made of them.

In: samples as ``chat`` encodes them, one at a time, or a file of their tokens, which is mapped and not read. Out: their
lengths and counts for planning, and batches of those that a plan puts into one row. Forked workers share the memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch

from north_lightning.types import PackedBatch, TokenizedSample

_TRAINED = 1 << 31
"""The bit of a stored token that says that it is trained."""


class TokenStore:
    """Samples by number, counted in the order in which they were added."""

    def __init__(self) -> None:
        self.sources: list[str] = []
        self.harnesses: list[str] = []
        self._lengths, self._trained = array("q"), array("q")
        self._chunks: list[np.ndarray] = []  # one for each sample

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, sample: TokenizedSample, harness: str = "") -> None:
        """Keep a sample; ``harness`` is for reports."""
        tokens = np.array(sample.token_ids, dtype=np.uint32)
        mask = np.array(sample.loss_mask, dtype=bool)
        self._chunks.append(tokens | (mask.astype(np.uint32) * np.uint32(_TRAINED)))
        self._lengths.append(len(tokens))
        self._trained.append(int(mask.sum()))
        self.sources.append(sample.source)
        self.harnesses.append(harness)

    def take(self, other: TokenStore, number: int, source: str | None = None) -> None:
        """Keep a sample of another store too, with its own label or ``source``; its tokens are not copied."""
        self._chunks.append(other._chunks[number])
        self._lengths.append(other._lengths[number])
        self._trained.append(other._trained[number])
        self.sources.append(other.sources[number] if source is None else source)
        self.harnesses.append(other.harnesses[number])

    def write_tokens(self, path: Path) -> None:
        """All samples' tokens to a file, one after the other."""
        with path.open("wb") as file:
            for chunk in self._chunks:
                file.write(chunk.data)

    @classmethod
    def map_tokens(
        cls, path: Path, lengths: Sequence[int], trained: Sequence[int], sources: list[str], harnesses: list[str]
    ) -> TokenStore:
        """The samples whose tokens ``write_tokens`` has written; what is not used stays on disk."""
        store = cls()
        store.sources, store.harnesses = sources, harnesses
        store._lengths, store._trained = array("q", lengths), array("q", trained)
        tokens = np.asarray(np.memmap(path, np.uint32, "r")) if len(lengths) else np.empty(0, np.uint32)
        bounds = [0, *accumulate(lengths)]
        store._chunks = [tokens[start:end] for start, end in pairwise(bounds)]
        return store

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every sample [S] int64."""
        return np.array(self._lengths, dtype=np.int64)

    @property
    def trained_tokens(self) -> np.ndarray:
        """Trainable tokens of every sample [S] int64."""
        return np.array(self._trained, dtype=np.int64)

    def pack(
        self, numbers: Sequence[int], num_trained_tokens: int | None = None, num_documents: int | None = None
    ) -> PackedBatch:
        """The samples as one row. The counts are those of the whole optimizer step; the row's own by default."""
        stored = np.concatenate([self._chunks[number] for number in numbers])
        trained = [self._trained[number] for number in numbers]
        bounds = [0, *accumulate(self._lengths[number] for number in numbers)]
        return PackedBatch(
            token_ids=torch.from_numpy((stored & np.uint32(_TRAINED - 1)).astype(np.int64)),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            loss_mask=torch.from_numpy(stored >= _TRAINED),
            num_trained_tokens=sum(trained) if num_trained_tokens is None else num_trained_tokens,
            sources=[self.sources[number] for number in numbers],
            num_documents=len(numbers) if num_documents is None else num_documents,
            trained_per_document=torch.tensor(trained, dtype=torch.int64),
        )
