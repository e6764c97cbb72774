"""Leaks of benchmarks into training data: by repository, base commit, gold patch, statement and instruction.

In: conversations and block lists. Out: filters, each of which names one kind of leak and the instance it leads to. What
is in a list is for ``block_lists``. A leak that is paraphrased or translated is not found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from north_lightning.data.block_lists import (
    SHIPPED,
    BlockList,
    code_lines,
    fingerprint,
    load_block_list,
    ngram_fingerprints,
    words_of,
)
from north_lightning.data.instances import repositories_in, repository_of
from north_lightning.interfaces import ConversationFilter
from north_lightning.types import Conversation, Fraction

_URL = re.compile(r"^(?:https?://|git@|ssh://git@)?(?:www\.)?(?:github|gitlab)\.com[/:]|\.git/?$")
_NAME = r"([A-Za-z0-9][\w.-]{0,60}/[A-Za-z0-9][\w.-]{0,100})"
_HOST = r"(?:github\.com|gitlab\.com|bitbucket\.org)[/:]"
_CODE_OF = re.compile(  # addresses that give a repository's code, wherever they stand
    rf"git\+(?:https?|ssh|git)://[^\s/]{{0,80}}[/:]{_NAME}|(?:git://|git@){_HOST}{_NAME}"
    rf"|(?:raw\.githubusercontent\.com|codeload\.github\.com|cdn\.jsdelivr\.net/gh|api\.github\.com/repos)/{_NAME}"
    rf"|{_HOST}{_NAME}/(?:-/)?(?:archive|raw|tarball|zipball|releases/download|pull/\d+\.(?:diff|patch)"
    rf"|commit/[0-9a-f]+\.(?:diff|patch)|compare/\S{{0,80}}\.(?:diff|patch))\b|\bgithub:{_NAME}"
)
_FETCHES = re.compile(  # commands that do
    r"\b(?:git\s(?:[^\n|;&]{0,80}\s)?(?:clone|fetch|pull|ls-remote|remote\s+(?:add|set-url)|submodule\s+add"
    r"|subtree\s+add)|gh\s+(?:repo\s+(?:clone|fork|sync)|pr\s+(?:checkout|diff)|release\s+download)"
    r"|svn\s+(?:co|checkout|export)|hg\s+clone"
    r"|(?:pip3?|uv|poetry|conda|npm|pnpm|yarn|go|cargo)\s+(?:pip\s+)?(?:install|i|add|get))\s([^\n]{0,600})"
)
_ADDRESS = re.compile(rf"{_HOST}{_NAME}|(?<![\w./:@-]){_NAME}(?![\w/])")
_COMMIT = re.compile(r"(?<![0-9a-f])[0-9a-f]{12,40}(?![0-9a-f])")
_COMMIT_KEY = 12


class LeakFilter(ConversationFilter):
    """What the filters below share.

    Args:
        block_lists: names of shipped lists (``swe_bench``, ``swe_bench_pro``) or files of others.
    """

    def __init__(self, block_lists: Sequence[str] = SHIPPED) -> None:
        self.block_lists = list(block_lists)

    @cached_property
    def lists(self) -> list[BlockList]:
        return [load_block_list(name) for name in self.block_lists]


class RepositoryLeak(LeakFilter):
    """The sample is about a benchmark's repository: by its labels, under any of the repository's names, as a fork under
    another owner, as a mirror (``owner__name.1a2b3c4d``), by an instance id or an image in a text, or by what is
    cloned, fetched, installed or downloaded."""

    reason = "leak_repository"

    def find_fault(self, sample: Conversation) -> str | None:
        for where, repository in _repositories(sample):
            blocked = self._by_name.get(repository)
            if blocked is not None:
                return f"{where}: {repository} is {blocked}"
            fork_of = self._by_last_name.get(repository.partition("/")[2])
            if fork_of is not None:
                return f"{where}: {repository} has the name of {fork_of}"
        return None

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return {
            name.lower(): f"{repository} of {listed.name}"
            for listed in self.lists
            for repository, former in listed.repositories.items()
            for name in (repository, *former)
        }

    @cached_property
    def _by_last_name(self) -> dict[str, str]:
        return {name.partition("/")[2]: blocked for name, blocked in self._by_name.items()}


class CommitLeak(LeakFilter):
    """A text holds a benchmark's base commit, or twelve or more digits of one."""

    reason = "leak_commit"

    def find_fault(self, sample: Conversation) -> str | None:
        for where, text in _all_texts(sample):
            for found in _COMMIT.finditer(text):
                for commit, instance in self._by_start.get(found.group()[:_COMMIT_KEY], ()):
                    if commit.startswith(found.group()):
                        return f"{where}: base commit of {instance}"
        return None

    @cached_property
    def _by_start(self) -> dict[str, list[tuple[str, str]]]:
        table: dict[str, list[tuple[str, str]]] = {}
        for listed in self.lists:
            for commit, instance in listed.commits.items():
                table.setdefault(commit[:_COMMIT_KEY], []).append((commit, f"{instance} of {listed.name}"))
        return table


class PatchLeak(LeakFilter):
    """A text holds all added lines of a hunk of a gold patch, one after another, whatever their indentation."""

    reason = "leak_patch"

    def find_fault(self, sample: Conversation) -> str | None:
        if not self._by_first_line:
            return None
        for where, text in _all_texts(sample):
            lines = code_lines(text)
            for start, line in enumerate(lines):
                for num_lines, whole, instance in self._by_first_line.get(fingerprint(line), ()):
                    if fingerprint("\n".join(lines[start : start + num_lines])) == whole:
                        return f"{where}: {num_lines} lines of the gold patch of {instance}"
        return None

    @cached_property
    def _by_first_line(self) -> dict[str, list[tuple[int, str, str]]]:
        table: dict[str, list[tuple[int, str, str]]] = {}
        for listed in self.lists:
            for first, hunks in listed.hunks.items():
                known = [(num_lines, whole, f"{instance} of {listed.name}") for num_lines, whole, instance in hunks]
                table.setdefault(first, []).extend(known)
        return table


class StatementLeak(LeakFilter):
    """The prompt holds a large part of a benchmark's statement: so much of its n-grams of 13 words.

    Args:
        block_lists: names of shipped lists or files of others.
        min_fraction: of a statement's n-grams, from which on it is a leak.
    """

    reason = "leak_statement"

    def __init__(self, block_lists: Sequence[str] = SHIPPED, min_fraction: Fraction = 0.5) -> None:
        super().__init__(block_lists)
        self.min_fraction = min_fraction

    def find_fault(self, sample: Conversation) -> str | None:
        for index, message in enumerate(sample.messages):
            if message.role not in ("system", "user"):
                continue
            hits = Counter(
                instance for gram in ngram_fingerprints(message.content) for instance in self._by_ngram.get(gram, ())
            )
            for instance, num_hits in hits.most_common(1):
                if num_hits >= self.min_fraction * self._sizes[instance]:
                    part = num_hits / self._sizes[instance]
                    return f"messages[{index}].content: {part:.0%} of the statement of {instance}"
        return None

    @cached_property
    def _by_ngram(self) -> dict[str, list[str]]:
        table: dict[str, list[str]] = {}
        for listed in self.lists:
            for instance, grams in listed.statements.items():
                for gram in grams:
                    table.setdefault(gram, []).append(f"{instance} of {listed.name}")
        return table

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {
            f"{name} of {listed.name}": len(grams) for listed in self.lists for name, grams in listed.statements.items()
        }


class InstructionLeak(LeakFilter):
    """A message is a benchmark task's instruction, but for case and punctuation."""

    reason = "leak_instruction"

    def find_fault(self, sample: Conversation) -> str | None:
        for index, message in enumerate(sample.messages):
            if message.role in ("system", "user"):
                key = fingerprint(" ".join(words_of(message.content)))
                for listed in self.lists:
                    if key in listed.instructions:
                        task = f"{listed.instructions[key]} of {listed.name}"
                        return f"messages[{index}].content: the instruction of {task}"
        return None


def all_leaks(block_lists: Sequence[str] = SHIPPED) -> list[ConversationFilter]:
    """Every filter of this file over the same lists."""
    kinds = (RepositoryLeak, CommitLeak, InstructionLeak, StatementLeak, PatchLeak)
    return [kind(block_lists) for kind in kinds]


def normalised_repository(name: str) -> str:
    """``owner/name`` in lower case of a name, a URL or a mirror's name (``swesmith/django__django.1a2b3c4d``)."""
    name = _URL.sub("", _URL.sub("", name.strip())).strip("/")
    last = name.rpartition("/")[2]
    return (repository_of(last) if "__" in last else name).lower()


def _repositories(sample: Conversation) -> Iterator[tuple[str, str]]:
    """Every repository a sample names as its own, with the place."""
    if sample.repo:
        yield "repo", normalised_repository(sample.repo)
    if found := repository_of(sample.task_id):
        yield "task_id", found.lower()
    for where, text in _all_texts(sample):
        for repository in repositories_in(text):
            yield where, repository.lower()
        for name in _fetched(text):
            yield where, normalised_repository(name)


def _fetched(text: str) -> Iterator[str]:
    """The repositories whose code a text gets."""
    if "git" in text or "bitbucket" in text:
        for found in _CODE_OF.finditer(text):
            yield next(filter(None, found.groups()))
    if "/" in text:
        for command in _FETCHES.finditer(text.replace("\\\n", " ")):
            is_by_name = command.group().startswith("gh")
            for address in _ADDRESS.finditer(command[1]):
                if address[1] or is_by_name:
                    yield address[1] or address[2]


def _all_texts(sample: Conversation) -> Iterator[tuple[str, str]]:
    for index, message in enumerate(sample.messages):
        for name in ("content", "reasoning"):
            if text := getattr(message, name):
                yield f"messages[{index}].{name}", text
        for number, call in enumerate(message.tool_calls):
            for text in _strings(call.arguments):
                yield f"messages[{index}].tool_calls[{number}]", text


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        words = [item for item in value if isinstance(item, str)]
        if len(words) > 1:  # a command in pieces
            yield " ".join(words)
        for item in value:
            yield from _strings(item)
