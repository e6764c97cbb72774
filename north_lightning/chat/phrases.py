"""Finds the constant phrases of a corpus, so that scaffolding costs few tokens.

In: rendered texts (what stands between control tokens), many from the same templates. Out: strings worth one token
each. A phrase never begins or ends inside a word, so the words next to it are tokenised as they are anywhere else. It
trains nothing (``training``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

UNIT_PATTERN = (
    r"\\+(?:u[0-9a-f]{4}|[bfnrt])?|\.[a-z]{1,4}(?![A-Za-z0-9])|[A-Za-z]+|[0-9]| +|\n+|\s+|[^\sA-Za-z0-9\\.]+|\.+"
)
"""Pieces that tokens never straddle: JSON escapes (so that ``\\nkaldor`` does not hide a word), file extensions, words
without their space, single digits, runs of blanks, runs of anything else."""

_UNIT = re.compile(UNIT_PATTERN)
_WORD = re.compile(r"[A-Za-z0-9]")
_MIN_TEXTS = 10
_PREDICTABLE = 0.9  # neighbours are joined when one of them foretells the other this often


def mine_phrases(
    texts: Iterable[str], min_fraction: float = 0.01, min_chars: int = 2, max_phrases: int = 400
) -> list[str]:
    """The phrases that shorten the corpus most, longest savings first.

    Args:
        texts: Rendered texts, without control markers.
        min_fraction: A phrase, and every neighbouring pair of units in it, occurs in at least this share of the texts
            (and in ten). Random names are rarer than that, so no phrase holds one.
        min_chars: Shorter phrases are left to the ordinary merges.
        max_phrases: How many to keep.
    """
    corpus = [_UNIT.findall(text) for text in texts]
    threshold = max(_MIN_TEXTS, min_fraction * len(corpus))
    chained = _join_until_stable(corpus, threshold)
    documents: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for units in chained:
        phrases = [phrase for unit in units if len(phrase := _trim(unit)) >= min_chars]
        counts.update(phrases)
        documents.update(set(phrases))
    savings = {
        phrase: count * (estimate_tokens(phrase) - 1)
        for phrase, count in counts.items()
        if documents[phrase] >= threshold and phrase.isascii() and "<|" not in phrase
    }
    ranked = sorted(savings, key=lambda phrase: (-savings[phrase], phrase))
    return [phrase for phrase in ranked if savings[phrase] > 0][:max_phrases]


def estimate_tokens(text: str) -> int:
    """About how many tokens a text would be without phrases."""
    return sum(1 + len(unit) // 2 if unit[0].isalpha() and len(unit) > 1 else 1 for unit in _UNIT.findall(text))


def is_word_edge(character: str) -> bool:
    """Whether a phrase with this first or last character must stand between word boundaries."""
    return bool(_WORD.match(character))


def is_safe(phrase: str) -> bool:
    """Whether the phrase can become a token without cutting a neighbouring word or JSON escape in two."""
    return bool(phrase) and _trim(phrase) == phrase


def _join_until_stable(corpus: list[list[str]], threshold: float) -> list[list[str]]:
    while True:
        joined = _join_once(corpus, threshold)
        if sum(map(len, joined)) == sum(map(len, corpus)):
            return corpus
        corpus = joined


def _join_once(corpus: Sequence[Sequence[str]], threshold: float) -> list[list[str]]:
    """Join every chain of neighbours of which each pair is frequent and predictable."""
    counts: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    documents: Counter[tuple[str, str]] = Counter()
    for units in corpus:
        neighbours = list(pairwise(units))
        counts.update(units)
        pairs.update(neighbours)
        documents.update(set(neighbours))
    joins = {
        pair for pair, count in pairs.items() if documents[pair] >= threshold and _is_predictable(pair, count, counts)
    }
    return [_chain(units, joins) for units in corpus]


def _is_predictable(pair: tuple[str, str], count: int, counts: Counter[str]) -> bool:
    left, right = pair
    if left.isdigit():  # a lone digit starts no phrase: call ids, counts and years stay tokens of their own
        return False
    if right.isdigit():
        return count / counts[left] >= _PREDICTABLE
    return count / min(counts[left], counts[right]) >= _PREDICTABLE


def _chain(units: Sequence[str], joins: set[tuple[str, str]]) -> list[str]:
    chains: list[list[str]] = []
    for index, unit in enumerate(units):
        if index and (units[index - 1], unit) in joins:
            chains[-1].append(unit)
        else:
            chains.append([unit])
    return ["".join(chain) for chain in chains]


def _trim(phrase: str) -> str:
    """The longest part that has words at both ends (matched as whole words) or at neither."""
    units = _UNIT.findall(phrase)
    while units:
        starts, ends = is_word_edge(units[0][0]), is_word_edge(units[-1][-1]) and not units[-1].startswith("\\")
        if starts != ends:
            units = units[1:] if _drop_first(units, starts) else units[:-1]
        elif set(units[-1]) == {"\\"}:  # it would cut an escape in two
            units = units[:-1]
        else:
            break
    return "".join(units)


def _drop_first(units: Sequence[str], starts_with_word: bool) -> bool:
    """Which end to give up: the blank beside the lone word when there is one, else the shorter."""
    first, last = units[0], units[-1]
    if starts_with_word:
        return not last.isspace() and len(first) <= len(last)
    return first.isspace() or len(first) <= len(last)
