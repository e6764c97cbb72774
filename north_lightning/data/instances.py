"""Names of repositories in instance ids, wherever they stand: ``owner__name-123`` and what others make of it.

In: an id or any text. Out: ``owner/name``. Data sets add attempts (``-3``, ``_0``), shards (``.1-of-1``), versions
(``__3.0``), hashes (``.1a2b3c4d``) and prefixes (``instance_``, ``sweb.eval.x86_64.``), and images write ``__`` as
``_1776_`` or ``_s_``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_ID_CHARS = 300
_OWNER = r"(?<![A-Za-z0-9-])([A-Za-z0-9][A-Za-z0-9-]{0,60})"
_INSTANCE = re.compile(
    _OWNER + r"(?:__|_1776_|_s_)([A-Za-z0-9][\w.-]{0,100}?)"
    r"(?:-\d+(?![A-Za-z0-9])|[.-][0-9a-f]{7,40}(?![A-Za-z0-9])|__v?\d+(?:\.\d+)+)"
)
_WHOLE = re.compile(r"(?:instance_)?([A-Za-z0-9][\w.-]*?)__([A-Za-z0-9][\w.-]*?)(?:-\d+)?")


def repositories_in(text: str) -> Iterator[str]:
    """The repositories of all instance ids in a text."""
    if "__" in text or "_1776_" in text or "_s_" in text:
        for found in _INSTANCE.finditer(text):
            yield f"{found[1]}/{found[2]}"


def repository_of(task_id: str) -> str:
    """The repository of an id, which may also be ``owner__name`` alone; empty if it names none."""
    if len(task_id) > MAX_ID_CHARS:
        return ""
    whole = _WHOLE.fullmatch(task_id)
    return next(repositories_in(task_id), f"{whole[1]}/{whole[2]}" if whole else "")
