"""Text to ids and back, with content and structure kept apart.

In: a directory with ``tokenizer.json`` (byte-level BPE) and, if present, ``tokenizer_config.json`` and ``config.json``.
Out: ids of plain text that can never be control tokens, ids of control tokens by name, and exact bytes of any ids.
It does not know what a conversation looks like (``format``) and does not train (``training``). Free of torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from north_lightning.chat.batch_encoding import BatchEncoder
from north_lightning.chat.controls import BOS, BOS_ID, CONTROL_TOKENS, END_TURN, PAD, PAD_ID, TEXT_MARKERS
from north_lightning.errors import TokenizerError
from north_lightning.untrusted import read_json

MAX_BYTES = 256 << 20
_MARKER = re.compile(r"<\|[^|]*\|>")


class NorthTokenizer:
    """A loaded tokenizer whose control tokens and model settings have been checked against each other.

    ``directory`` is where it was loaded from, ``fingerprint`` the SHA-256 of its ``tokenizer.json``.
    """

    def __init__(self, directory: Path) -> None:
        """``directory`` holds ``tokenizer.json``; ``TokenizerError`` says what does not fit."""
        self.directory = Path(directory)
        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"tokenizer: expected a folder with a tokenizer.json, got '{directory}'; copy the model's, or train "
                "one: python -m north_lightning tokenizer --config ..."
            )
        if path.stat().st_size > MAX_BYTES:
            raise TokenizerError(f"{path}: expected at most {MAX_BYTES} bytes, got {path.stat().st_size}")
        content = path.read_bytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: expected a tokenizers JSON file, got: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=0) + 1
        if self.vocab_size > 2 * len(vocabulary) + 10_000:  # a table of them is made
            raise TokenizerError(f"{path}: expected ids of {len(vocabulary)} tokens, got one of {self.vocab_size - 1}")
        self._bytes = _token_bytes(self._tokenizer, vocabulary, self.vocab_size, path)
        self._controls = {name: self._find_control(name, vocabulary, path) for name in CONTROL_TOKENS}
        self._reserved = self._reserved_ids() | {ids[0] for ids in self._controls.values() if len(ids) == 1}
        self._cuts = self._find_cuts(vocabulary, path)
        self._markers = re.compile("|".join(map(re.escape, self._cuts)))
        self.pad_id = self._require(PAD, PAD_ID, vocabulary, path)
        self.bos_id = self._require(BOS, BOS_ID, vocabulary, path)
        self.eos_id = self.control_id(END_TURN)
        for name in ("config.json", "tokenizer_config.json"):
            file = self.directory / name
            if file.is_file():
                self.check(read_json(file, TokenizerError), str(file))

    @classmethod
    def load(cls, directory: Path | str) -> NorthTokenizer:
        """The tokenizer of a model or tokenizer directory; ``TokenizerError`` where it cannot be used."""
        return cls(Path(directory))

    def check(self, config: Mapping[str, Any], source: str) -> None:
        """Compare with a model or tokenizer configuration; ``TokenizerError`` names the key, expected and got.

        Keys looked at, where present: ``bos_token_id``, ``pad_token_id``, ``eos_token_id`` (an id or a list),
        ``vocab_size``, ``bos_token``, ``pad_token``, ``eos_token``.
        """
        for key, expected in (("bos_token_id", self.bos_id), ("pad_token_id", self.pad_id)):
            if config.get(key) is not None and config[key] != expected:
                raise TokenizerError(f"{source}: {key} expected {expected} (the tokenizer's), got {config[key]}")
        eos = config.get("eos_token_id")
        if eos is not None and self.eos_id not in (eos if isinstance(eos, list) else [eos]):
            raise TokenizerError(f"{source}: eos_token_id expected {self.eos_id} ({END_TURN}), got {eos}")
        size = config.get("vocab_size")
        if size is not None and size < self.vocab_size:
            raise TokenizerError(
                f"{source}: vocab_size expected at least {self.vocab_size} (the tokenizer's), got {size}"
            )
        for key, name in (("bos_token", BOS), ("pad_token", PAD), ("eos_token", END_TURN)):
            token = config.get(key)
            token = token.get("content") if isinstance(token, Mapping) else token
            if token is not None and token != name:
                raise TokenizerError(f"{source}: {key} expected {name!r}, got {token!r}")

    def __reduce__(self) -> tuple[type[NorthTokenizer], tuple[Path]]:
        return NorthTokenizer, (self.directory,)

    # ---- encoding --------------------------------------------------------------------------------------------------

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text. Control markers inside ``text`` come out as ordinary characters, never as their ids."""
        ids: list[int] = []
        start = 0
        for match in self._markers.finditer(text):
            cut = match.start() + self._cuts[match.group()]
            ids += self._raw(text[start:cut])
            start = cut
        return ids + self._raw(text[start:])

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode_text`` of many texts, on all cores."""
        is_plain = [self._markers.search(text) is None for text in texts]
        plain = [text for text, without_markers in zip(texts, is_plain, strict=True) if without_markers]
        encoded = iter(self._batch_encoder(plain))
        return [
            next(encoded) if without_markers else self.encode_text(text)
            for text, without_markers in zip(texts, is_plain, strict=True)
        ]

    def control_ids(self, name: str) -> tuple[int, ...]:
        """Ids of a control token: one id, or the fixed sequence of a marker that the vocabulary does not hold."""
        return self._controls[name]

    def control_id(self, name: str) -> int:
        """The id of a control token that is one id; ``TokenizerError`` for a marker spelled with several."""
        ids = self._controls[name]
        if len(ids) != 1:
            raise TokenizerError(f"tokenizer: expected {name} to be one token, got {len(ids)}")
        return ids[0]

    def is_control(self, token_id: int) -> bool:
        """Whether an id is structure (a control or any registered special token) and never content."""
        return token_id in self._reserved

    @cached_property
    def _batch_encoder(self) -> BatchEncoder:
        return BatchEncoder(self._tokenizer.to_str(), self._tokenizer)

    # ---- decoding --------------------------------------------------------------------------------------------------

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of any ids for people, control tokens by name; invalid UTF-8 and ids without a token become U+FFFD."""
        unknown = "\ufffd".encode()
        pieces = [self._bytes[token_id] if token_id < self.vocab_size else unknown for token_id in token_ids]
        return b"".join(pieces).decode("utf-8", errors="replace")

    def decode_bytes(self, token_ids: Iterable[int]) -> bytes:
        """Exact bytes of ids; ids beyond the tokenizer's vocabulary raise ``TokenizerError``."""
        try:
            return b"".join([self._bytes[token_id] for token_id in token_ids])
        except IndexError:
            raise TokenizerError(f"tokenizer: expected ids below {self.vocab_size}, got a larger one") from None

    # ---- reading the file ------------------------------------------------------------------------------------------

    def _raw(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _reserved_ids(self) -> set[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token_id for token_id, token in added.items() if token.special or _MARKER.fullmatch(token.content)}

    def _find_cuts(self, vocabulary: Mapping[str, int], path: Path) -> dict[str, int]:
        """Where to cut each marker inside content, so that its two parts encode to other ids than the marker's.

        A cut inside one of the marker's own tokens does that, whether the marker is registered as special, is an
        ordinary added token, or is spelled with several tokens.
        """
        markers = {token: (token_id,) for token, token_id in vocabulary.items() if token_id in self._reserved}
        cuts = {}
        for name, ids in (markers | self._controls).items():
            for cut in range(1, len(name)):
                if self._raw(name[:cut]) + self._raw(name[cut:]) != list(ids):
                    cuts[name] = cut
                    break
            else:
                raise TokenizerError(f"{path}: expected {name} to be distinguishable from text, got one byte per token")
        return cuts

    def _find_control(self, name: str, vocabulary: Mapping[str, int], path: Path) -> tuple[int, ...]:
        if name in vocabulary:
            return (vocabulary[name],)
        if name not in TEXT_MARKERS:
            raise TokenizerError(f"{path}: expected the control token {name}, found none; not a Command-4 tokenizer")
        return tuple(self._raw(name))

    def _require(self, name: str, expected: int, vocabulary: Mapping[str, int], path: Path) -> int:
        if vocabulary.get(name) != expected:
            raise TokenizerError(f"{path}: expected {name} to have id {expected}, got {vocabulary.get(name)}")
        return expected


def _token_bytes(tokenizer: Tokenizer, vocabulary: Mapping[str, int], size: int, path: Path) -> Sequence[bytes]:
    """The bytes every id stands for; ids without a token stand for none."""
    alphabet = _byte_alphabet()
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    table = [b""] * size
    for token, token_id in vocabulary.items():
        if token in added:
            table[token_id] = token.encode("utf-8")
            continue
        try:
            table[token_id] = bytes(alphabet[character] for character in token)
        except KeyError:
            raise TokenizerError(f"{path}: expected a byte-level vocabulary, got the token {token!r}") from None
    return table


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table |= {chr(256 + index): byte for index, byte in enumerate(others)}
    return table
