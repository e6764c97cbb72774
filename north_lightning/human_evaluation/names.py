"""The models' names, taken out of all that a rater can see.

In: text and files of attempts. Out: the same with ``MODEL`` in place of every name, which keeps most code working; or
the word that a file has to be withheld, because it spells a name in a way that cannot be replaced. What is drawn in a
picture, or computed by a program, is not read.
"""

from __future__ import annotations

import base64
import html
import re
import unicodedata
from collections.abc import Iterable, Iterator
from urllib.parse import unquote

PLACEHOLDER = "MODEL"
_ESCAPE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b\n]{0,400}(?:\x1b\\|\x07)|[ -/]*[0-~])|\x9b[0-?]*[ -/]*[@-~]"
)
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{8,}")


class Names:
    """Finds names with any case and any separators between their parts; short ones only as whole words."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = sorted({name for name in names if name}, key=lambda name: (-len(name), name))
        self._pattern = re.compile("|".join(map(_spellings, self.names)) or r"(?!)", re.IGNORECASE)

    def is_in(self, text: str) -> bool:
        return bool(self._pattern.search(text) or self._pattern.search(folded(text)))

    def scrub(self, text: str) -> tuple[str, int]:
        """``text`` without the names, and how often one was in it."""
        scrubbed, count = self._pattern.subn(PLACEHOLDER, text)
        if self._pattern.search(folded(scrubbed)):  # spelled with invisible or look-alike characters
            scrubbed, more = self._pattern.subn(PLACEHOLDER, folded(scrubbed))
            count += more
        return scrubbed, count

    def is_hidden_in(self, content: bytes) -> bool:
        """Whether a name is in a file in any of the usual encodings."""
        return any(map(self.is_in, _texts(content))) or any(map(self._pattern.search, _decoded(content)))


def _spellings(name: str) -> str:
    parts = [re.escape(part) for part in re.split(r"[\W_]+", name) if part] or [re.escape(name)]
    pattern = r"[\W_]{0,3}".join(parts)
    return pattern if len(name) > 3 else rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])"


def _texts(content: bytes) -> Iterator[str]:
    """What a file says to one who reads it as text, as HTML, as an address, as a program."""
    text = content.decode(errors="replace")
    yield text
    yield re.sub(r"<[^<>]{0,2000}>", "", html.unescape(text))
    yield unquote(text)
    yield re.sub(r"\\(?:u\{?([0-9a-fA-F]{4})\}?|x([0-9a-fA-F]{2}))", _character, text)


def _decoded(content: bytes) -> Iterator[str]:
    """What bytes may stand for otherwise."""
    yield content.decode("utf-16-le", errors="replace")
    yield content[1:].decode("utf-16-le", errors="replace")
    for run in _BASE64.findall(content):
        for start in range(4):
            part = run[start : len(run) - ((len(run) - start) % 4 == 1)].translate(_URL_SAFE)
            yield base64.b64decode(part + b"=" * (-len(part) % 4)).decode(errors="replace")


def _character(match: re.Match[str]) -> str:
    return chr(int(match[1] or match[2], 16))


def folded(text: str) -> str:
    """Without invisible characters, accents and other forms of the same letters."""
    if text.isascii():
        return text
    decomposed = unicodedata.normalize("NFKD", text)
    return "".join(one for one in decomposed if unicodedata.category(one) not in ("Cf", "Mn"))


def plain(text: str) -> str:
    """What a terminal would show: without escape sequences, and with all other invisible characters made visible."""
    text = _ESCAPE.sub("", text).replace("\r\n", "\n")
    text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))  # a progress bar's last state
    return re.sub(r"[^\n\t -~]", _visible, text)


def _visible(match: re.Match[str]) -> str:
    is_hidden = unicodedata.category(match[0]) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return f"‹U+{ord(match[0]):04X}›" if is_hidden else match[0]
