"""What benchmarks hold, so that it can be kept out of training: data files with source and date, and how to make one.

In: a benchmark's instances or task directories. Out: a block list: repositories with their former names, base commits,
and *fingerprints* of gold patches, problem statements and instructions. Fingerprints are one-way hashes, so a list can
be shared without giving the benchmark away. Which samples a list hits is for ``decontamination``.

The package brings the repositories of SWE-bench, SWE-bench Verified and SWE-bench Pro. Commits, patches, statements and
Terminal-Bench's instructions are taken from the benchmarks themselves, by whoever has them:
``python -m north_lightning data blocklist``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date as Date
from functools import cache
from hashlib import blake2b
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from north_lightning.data.records import decode, read_records
from north_lightning.durable import replace_text
from north_lightning.errors import ConfigError, DataError
from north_lightning.run_folders import claim

SHIPPED = ("swe_bench", "swe_bench_pro")
NGRAM_WORDS = 13
MIN_HUNK_CHARS = 40  # without blanks: shorter changes are found everywhere

_WORD = re.compile(r"\w+")
_ADDED = re.compile(r"\A\+(?!\+\+)")
_LINE_NUMBER = re.compile(r"\A\s*\d+\t")


@dataclass(frozen=True)
class BlockList:
    """One benchmark; every collection may be empty."""

    name: str
    source: str
    date: str
    repositories: dict[str, list[str]] = field(default_factory=dict)
    """``owner/name`` -> former names and owners."""
    commits: dict[str, str] = field(default_factory=dict)
    """Base commit -> instance."""
    hunks: dict[str, list[list[Any]]] = field(default_factory=dict)
    """Fingerprint of a hunk's first line -> its number of lines, the fingerprint of all, the instance."""
    statements: dict[str, list[str]] = field(default_factory=dict)
    """Instance -> fingerprints of its statement's n-grams."""
    instructions: dict[str, str] = field(default_factory=dict)
    """Fingerprint of a whole text -> task."""


def fingerprint(text: str) -> str:
    """16 hex digits that stand for ``text``."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def words_of(text: str) -> list[str]:
    """Words without case and punctuation: what two copies of a text still share."""
    return _WORD.findall(text.casefold())


def ngram_fingerprints(text: str) -> set[str]:
    """Of every run of ``NGRAM_WORDS`` words; of the whole, if it is shorter."""
    words = words_of(text)
    last = max(len(words) - NGRAM_WORDS, 0)
    return {fingerprint(" ".join(words[start : start + NGRAM_WORDS])) for start in range(last + 1)}


def code_lines(text: str) -> list[str]:
    """Lines without blanks, diff signs and line numbers; empty ones left out."""
    stripped = (_ADDED.sub("", _LINE_NUMBER.sub("", line)) for line in text.split("\n"))
    return [squeezed for line in stripped if (squeezed := "".join(line.split()))]


def added_hunks(patch: str) -> Iterator[list[str]]:
    """The runs of added lines of a patch that are long enough to be told from ordinary code."""
    run: list[str] = []
    for line in [*patch.split("\n"), ""]:
        if _ADDED.match(line):
            run += code_lines(line)
        else:
            if sum(map(len, run)) >= MIN_HUNK_CHARS:
                yield run
            run = []


@cache
def load_block_list(name: str) -> BlockList:
    """A shipped list by name, or a file; ``ConfigError`` for one that is none or does not say its source and date."""
    try:
        if name in SHIPPED:
            content = json.loads(package_files(__name__).joinpath(f"{name}.json").read_text("utf-8"))
        else:
            content = json.loads(Path(name).read_text("utf-8"))
        listed = BlockList(**content)
    except (OSError, ValueError, TypeError) as error:
        known = ", ".join(SHIPPED)
        raise ConfigError(f"block_lists: expected one of {known} or a list's file, got {name!r} ({error})") from error
    if not listed.source or not listed.date:
        raise ConfigError(f"block_lists: expected source and date in {name!r}")
    return listed


def write_block_list(
    name: str,
    source: str,
    output: Path,
    instances: list[str] | None = None,
    task_dirs: list[Path] | None = None,
    date: str | None = None,
    overwrite: bool = False,
) -> None:
    """Make a block list from a benchmark's own files.

    Args:
        name: Of the benchmark.
        source: Where the files came from: repository or data set, and its revision.
        output: The list, a JSON file.
        instances: JSONL or parquet files of instances in SWE-bench's columns: instance_id, repo, base_commit, patch,
            problem_statement; an ``instruction`` where there is one.
        task_dirs: Directories whose sub-directories are Harbor tasks (Terminal-Bench): their instruction.md is read.
        date: Of the source; today's by default.
        overwrite: Move an earlier list aside, to NAME.1, instead of refusing to replace it.
    """
    claim("output", [output], overwrite)
    records: Iterable[Mapping[str, Any]] = (decode(content) for _, content in read_records(instances or []))
    listed = BlockList(name, source, date or Date.today().isoformat(), {}, {}, {}, {}, {})
    for number, record in enumerate(records):
        _add_instance(listed, record, number)
    for directory in task_dirs or []:
        for file in sorted(directory.glob("*/instruction.md")):
            _add_instruction(listed, file.parent.name, file.read_text("utf-8"))
    if not (listed.repositories or listed.instructions):
        raise DataError(f"instances, task_dirs: expected a benchmark, found nothing in {instances} and {task_dirs}")
    replace_text(output, json.dumps(vars(listed), indent=1) + "\n")
    print(
        f"{output}: {len(listed.repositories)} repositories, {len(listed.commits)} commits, "
        f"{sum(map(len, listed.hunks.values()))} hunks, {len(listed.statements)} statements, "
        f"{len(listed.instructions)} instructions"
    )


def _add_instance(listed: BlockList, record: Mapping[str, Any], number: int) -> None:
    instance = str(record.get("instance_id") or record.get("task_id") or number)
    if repo := record.get("repo"):
        listed.repositories.setdefault(repo, [])
    if commit := record.get("base_commit"):
        listed.commits[commit] = instance
    for run in added_hunks(record.get("patch") or ""):
        entry = [len(run), fingerprint("\n".join(run)), instance]
        listed.hunks.setdefault(fingerprint(run[0]), []).append(entry)
    if statement := record.get("problem_statement"):
        listed.statements[instance] = sorted(ngram_fingerprints(statement))
    if instruction := record.get("instruction"):
        _add_instruction(listed, instance, instruction)


def _add_instruction(listed: BlockList, task: str, text: str) -> None:
    listed.instructions[fingerprint(" ".join(words_of(text)))] = task
    listed.statements[task] = sorted(ngram_fingerprints(text))
