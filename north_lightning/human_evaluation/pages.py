"""An attempt as a rater sees it: structured text for the page's templates, and files for the isolated frames.

In: a submission and the names to hide. Out: ``Page``. Everything that a stranger wrote is text here, apart from
Markdown, which is rendered without HTML, links and pictures. Long texts are cut, and say so.
"""

from __future__ import annotations

import html
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from markdown_it import MarkdownIt
from PIL import Image

from north_lightning.human_evaluation.names import Names, plain
from north_lightning.human_evaluation.submissions import Message, Submission

MAX_CHARS, MAX_MESSAGE_CHARS, MAX_PAGE_CHARS = 40_000, 8_000, 400_000
"""Of one text, of one message of the transcript, of all that is shown of an attempt."""
MAX_MESSAGES, MAX_PREVIEWS = 200, 6
MAX_PIXELS = 30_000_000
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
PNG, HTML, SVG = "image/png", "text/html", "image/svg+xml"
TEXTS = {
    ".html": HTML, ".htm": HTML, ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript",
    ".json": "application/json", ".svg": SVG, ".csv": "text/csv",
}  # fmt: skip
"""Media types that a produced page needs of the files beside it. Any other text is plain."""
WITHHELD = "[left out: it spells the name of a model]"
_ELSEWHERE = re.compile(rb"""(?:src|href|from|url\(|import)\s*[=(]?\s*["']?\s*(?:https?:)?//\w""", re.IGNORECASE)

_markdown = (
    MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink", "reference"])
)


@dataclass
class Page:
    """``shown`` is what the templates need; ``files`` (path -> media type, content) are for the frames. ``length`` is
    that of answer, changes and text files, in characters. ``num_names`` were replaced; ``withheld`` spelled one."""

    shown: dict[str, Any] = field(default_factory=dict)
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    length: int = 0
    num_names: int = 0
    withheld: list[str] = field(default_factory=list)


def make_page(one: Submission, names: Names) -> Page:
    return _PageMaker(names).make(one)


def make_markdown(text: str, names: Names) -> str:
    """HTML of an instruction."""
    return _PageMaker(names).markdown(text, "the instruction")


class _PageMaker:
    def __init__(self, names: Names) -> None:
        self.names, self.page, self.room = names, Page(), MAX_PAGE_CHARS

    def make(self, one: Submission) -> Page:
        unserved = [self._add_file(path, content) for path, content in one.files.items()]
        tree: dict[str, Any] = {"files": [], "folders": {}}
        previews: list[dict[str, Any]] = []
        self.page.length = len(one.answer) + len(one.diff)
        answer, diff = self.markdown(one.answer, "the answer"), diff_files(self.text(one.diff, "the changes"))
        for path, (kind, content) in self.page.files.items():
            row: dict[str, Any] = {"path": path, "size": len(content), "text": None}
            if kind != PNG:
                text = content.decode(errors="replace")
                self.page.length += len(text)
                row["text"] = self._shortened(plain(text[: 2 * MAX_CHARS]), len(text), MAX_CHARS)
            _add_to(tree, row)
            if kind in (PNG, HTML, SVG):
                num_missing = len(_ELSEWHERE.findall(content)) if kind != PNG else 0
                previews.append({"path": path, "is_page": kind == HTML, "num_missing": num_missing})
        for other in filter(None, unserved):
            _add_to(tree, other)
        previews.sort(key=lambda row: (not row["is_page"], not row["path"].endswith("index.html"), row["path"]))
        self.page.shown = {
            "answer": answer,
            "diff": diff,
            "tree": tree,
            "previews": previews[:MAX_PREVIEWS],
            "transcript": [self._message(message) for message in one.transcript[:MAX_MESSAGES]],
            "notes": [self.text(note, "a note") for note in one.left_out],
        }
        if len(one.transcript) > MAX_MESSAGES:
            self.page.shown["notes"].append(f"{len(one.transcript) - MAX_MESSAGES} more messages of the transcript")
        return self.page

    def text(self, text: str, what: str, max_chars: int = MAX_CHARS) -> str:
        """What of a text is shown: no name, no control character, not too much."""
        scrubbed, num_names = self.names.scrub(plain(text[: 2 * max_chars]))
        self.page.num_names += num_names
        if self.names.is_hidden_in(scrubbed.encode(errors="replace")):
            self.page.withheld.append(what)
            return WITHHELD
        return self._shortened(scrubbed, len(text), max_chars)

    def markdown(self, text: str, what: str) -> str:
        shown = self.text(text, what)
        rendered = str(_markdown.render(shown))
        if self.names.is_in(html.unescape(re.sub(r"<[^<>]*>", "", rendered))):  # letter by letter, in markup
            self.page.withheld.append(what)
            return f"<p>{WITHHELD}</p>"
        return rendered

    def _shortened(self, text: str, num_chars: int, max_chars: int) -> str:
        """``text``, the beginning of one with ``num_chars``, as far as there is room."""
        room = min(max_chars, self.room)
        self.room -= min(len(text), room)
        if len(text) <= room and num_chars <= 2 * max_chars:
            return text
        return f"{text[:room]}\n[cut here: {num_chars - room:,} more characters]"

    def _message(self, message: Message) -> dict[str, Any]:
        def shown(text: str) -> str:
            return self.text(text, "the transcript", MAX_MESSAGE_CHARS)

        calls = [(shown(call.name), shown(_arguments(call.arguments))) for call in message.tool_calls]
        return {
            "role": message.role,
            "text": shown(message.content),
            "reasoning": shown(message.reasoning),
            "calls": calls,
        }

    def _add_file(self, path: str, content: bytes) -> dict[str, Any] | None:
        """Keep a file for the frames; its row where only its name is shown."""
        path = self.text(path, "the name of a file").replace("\n", " ")
        while path in self.page.files:
            path = f"{path}+"
        suffix = PurePosixPath(path).suffix.lower()
        row: dict[str, Any] = {"path": path, "size": len(content), "text": None}
        if suffix in IMAGES:
            try:
                self.page.files[path] = PNG, _pixels(content)
            except Exception as error:  # a damaged picture makes the reader raise anything
                row["text"] = f"[left out: no picture that can be shown ({type(error).__name__})]"
                return row
            return None
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return row
        text, num_names = self.names.scrub(text)
        self.page.num_names += num_names
        if self.names.is_hidden_in(text.encode()):
            self.page.withheld.append(path)
            return row | {"text": WITHHELD}
        self.page.files[path] = TEXTS.get(suffix, "text/plain"), text.encode()
        return None


def _pixels(content: bytes) -> bytes:
    """A picture made again: its pixels and nothing else."""
    with Image.open(io.BytesIO(content)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("too large")
        made = io.BytesIO()
        bare = image.convert("RGBA" if "A" in image.getbands() or "transparency" in image.info else "RGB")
        Image.frombytes(bare.mode, bare.size, bare.tobytes()).save(made, "PNG")
        return made.getvalue()


def _arguments(arguments: dict[str, Any] | str) -> str:
    """Calls as people read them: one argument a line, texts as they are."""
    if isinstance(arguments, str):
        return arguments
    lines = (
        f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for name, value in arguments.items()
    )
    return "\n".join(lines)


def _add_to(tree: dict[str, Any], row: dict[str, Any]) -> None:
    *folders, name = PurePosixPath(row["path"]).parts or ("",)
    for folder in folders:
        tree = tree["folders"].setdefault(folder, {"files": [], "folders": {}})
    tree["files"].append(row | {"name": name})


def diff_files(text: str) -> list[dict[str, Any]]:
    """A unified diff by file: its name and its lines with their kind; bytes of binary files are left out."""
    files: list[dict[str, Any]] = []
    is_binary = False
    for line in text.splitlines():
        starts = line.startswith("diff ") or (line.startswith("--- ") and not (files and files[-1]["is_new"]))
        if starts or not files:
            files.append({"title": "", "lines": [], "is_new": True})
            is_binary = False
        one = files[-1]
        if line.startswith(("--- ", "+++ ")) and one["is_new"]:
            path = re.sub(r"^[ab]/", "", line[4:].split("\t")[0])
            one["title"] = path if path != "/dev/null" else one["title"]
        elif line.startswith("diff "):
            one["title"] = line.rpartition(" b/")[2]
        elif line.startswith("GIT binary patch") or is_binary:
            if not is_binary:
                one["lines"].append(("hunk", "a binary file"))
            is_binary = True
        elif line.startswith("@@"):
            one["is_new"] = False
            one["lines"].append(("hunk", line))
        elif not one["is_new"] or not line.startswith(
            ("index ", "similarity ", "new file", "deleted file", "old mode")
        ):
            kind = {"+": "added", "-": "removed"}.get(line[:1], "context")
            one["lines"].append((kind, line))
    return [{"title": one["title"], "lines": one["lines"]} for one in files]
