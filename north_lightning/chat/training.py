"""Trains the small tokenizer of a small model.

In: rendered texts and the phrases mined from them. Out: a directory that ``NorthTokenizer.load`` and transformers'
``AutoTokenizer`` read: ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``.

Three layers, in the order they apply: control tokens; phrases (added tokens matched leftmost-longest, before anything
else, never inside a word); byte-level BPE over the units of ``phrases.UNIT_PATTERN``. A random name is one unit
whatever stands beside it, so it has one tokenization.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from north_lightning.chat.controls import BOS, CONTROL_TOKENS, END_TURN, PAD, RESERVED_TOKENS, TEXT_MARKERS
from north_lightning.chat.phrases import UNIT_PATTERN, is_safe, is_word_edge
from north_lightning.chat.template import CHAT_TEMPLATE
from north_lightning.chat.tokenizer import NorthTokenizer
from north_lightning.errors import ConfigError

_LATE_REPEATS = 3  # of what is merged whole, but last
_MAX_REPEATS = 1000  # of one blank or punctuation piece in the training text: its rank matters, not its exact count


def train_tokenizer(
    texts: Iterable[str], phrases: Sequence[str], vocab_size: int, output_dir: Path | str
) -> NorthTokenizer:
    """Write a tokenizer to ``output_dir`` and load it.

    Args:
        texts: Rendered texts, without control markers.
        phrases: Strings that become one token each (``mine_phrases``).
        vocab_size: At most this many ids: control tokens, phrases, 256 bytes, then merges.
        output_dir: Made if it is missing.
    """
    controls = [*RESERVED_TOKENS, *(name for name in CONTROL_TOKENS if name not in RESERVED_TOKENS)]
    _check(phrases, len(controls), vocab_size)
    tokenizer = _train_merges(_words(texts, phrases), vocab_size - len(controls) - len(phrases))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        _added(token_id, token, special=token_id < len(controls) and token not in TEXT_MARKERS)
        for token_id, token in enumerate([*controls, *phrases])
    ]
    vocabulary = {token["content"]: token["id"] for token in content["added_tokens"]}
    for token in sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__):
        vocabulary.setdefault(token, len(vocabulary))  # a merge may spell a phrase: one id for both
    content["model"]["vocab"] = vocabulary
    directory = Path(output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "tokenizer.json", content)
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return NorthTokenizer.load(directory)


def _check(phrases: Sequence[str], num_controls: int, vocab_size: int) -> None:
    smallest = num_controls + len(phrases) + 256
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size: expected at least {smallest} ({len(phrases)} phrases), got {vocab_size}")
    if len(set(phrases)) != len(phrases):
        raise ConfigError("phrases: expected each once, got duplicates")
    for phrase in phrases:
        if len(phrase) < 2 or not phrase.isascii() or "<|" in phrase or not is_safe(phrase):
            raise ConfigError(
                "phrases: expected two or more ASCII characters, no control marker, words at both ends or at neither, "
                f"no backslash at the end, got {phrase!r}"
            )


def _words(texts: Iterable[str], phrases: Sequence[str]) -> list[str]:
    """What the merges are learned from: every word once, so that frequent ones never bend the syllables of rare ones.

    Blanks and punctuation come as often as they occur; file extensions, and words that are phrases (which do not match
    right behind a JSON escape), a little more than once: they are merged whole, but after all syllables.
    """
    longest_first = sorted(phrases, key=len, reverse=True)
    split = re.compile("|".join(map(_phrase_pattern, longest_first))) if phrases else None
    counts: Counter[str] = Counter()
    for text in texts:
        for piece in split.split(text) if split else [text]:
            counts.update(re.findall(UNIT_PATTERN, piece))
    whole_words, words = set(phrases), []
    for unit in sorted(counts):
        words += [unit] * min(counts[unit], _LATE_REPEATS if unit in whole_words else _max_repeats(unit))
    return words


def _max_repeats(unit: str) -> int:
    if unit[0].isalpha():
        return 1
    return _LATE_REPEATS if unit[0] == "." and unit[-1].isalpha() else _MAX_REPEATS


def _phrase_pattern(phrase: str) -> str:
    pattern = re.escape(phrase)
    return rf"(?<!\w){pattern}(?!\w)" if is_word_edge(phrase[0]) else pattern


def _train_merges(words: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(UNIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def _added(token_id: int, content: str, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "single_word": is_word_edge(content[0]),
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END_TURN,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 500_000,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
