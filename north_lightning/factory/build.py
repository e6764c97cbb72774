"""``python -m north_lightning tasks build``: verified software tasks from real repositories.

In: PyPI releases and local git repositories. Out: Harbor task directories in two pools, ``<output_dir>/sft`` and
``<output_dir>/rl``, that share no repository; what became of every candidate (``records/``); and ``summary.json``.

A candidate is a planted bug (``mutations``), or a commit of the history that repaired something its tests show. It
becomes a task if tests that passed fail because of it, and if its solution scores 1 and its untouched state 0, every
time. The issue is written from what the failing tests show (``issues``). A stopped build goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
import random
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from north_lightning.durable import replace_text
from north_lightning.errors import ConfigError, TaskError, printable
from north_lightning.factory import sources
from north_lightning.factory.grading import Baseline, Grader, tests_of
from north_lightning.factory.issues import issue_text
from north_lightning.factory.mutations import KINDS, Mutation, mutations
from north_lightning.interfaces import SandboxProvider
from north_lightning.run_folders import set_contents_aside, write_result
from north_lightning.sandbox.scratch import Scratch
from north_lightning.tasks import TaskSource, write_task
from north_lightning.tasks.git import git, objects_of
from north_lightning.tasks.harbor import is_written_here, patch_script
from north_lightning.types import Count, Fraction, Positive, Whole
from north_lightning.untrusted import check_name, write_files
from north_lightning.verifiers.frameworks import FOR_AGENTS, PYTEST, UNITTEST

Pool = Literal["sft", "rl"]

HISTORY = "history"
ACCEPTED = "accepted"
MAX_TASKS_PER_FUNCTION = 2
MAX_FAILING_SHARE = 0.5
CANDIDATES_PER_TASK = 6
MAX_TURNS = 30
MAX_SOURCE_CHARS = 200_000  # larger files are tables


@dataclass(frozen=True)
class Candidate:
    """What may become a task: the right files, and what is wrong in them (None: the file is not there)."""

    id: str
    kind: str
    function: str
    baseline: Baseline
    broken: Mapping[str, str | None]


@dataclass(frozen=True)
class Repository:
    """Args:
    name: As in ``owner/name``; for a release the package's name.
    files: Text files of its present state.
    git: The local repository whose history is read, if there is one.
    """

    name: str
    files: sources.Files
    git: Path | None = None


def build_tasks(
    output_dir: Path,
    sandboxes: SandboxProvider,
    packages: dict[str, str] | None = None,
    repositories: dict[str, Path] | None = None,
    cache: Path = Path("runs/cache/sdists"),
    tasks_per_repository: Count = 10,
    history_commits: Whole = 200,
    rl_share: Fraction = 0.5,
    timeout_s: Positive = 60.0,
    repeats: Count = 3,
    concurrency: Count = 2,
    seed: int = 0,
) -> None:
    """Build verified software tasks from real repositories.

    Args:
        output_dir: Parent of the pools sft and rl, of records and of summary.json.
        sandboxes: Where tests run.
        packages: Name -> version on PyPI; its source distribution must hold tests (unittest or pytest) and need no
            other package.
        repositories: Name -> a local git repository.
        cache: Where downloads are kept.
        tasks_per_repository: So many tasks at most.
        history_commits: So many commits of a git repository are looked at.
        rl_share: Share of repositories whose tasks are for RL; the others are for SFT.
        timeout_s: Limit of one run of a repository's tests.
        repeats: How often a solution must pass and an untouched state must fail.
        concurrency: Candidates at a time.
        seed: Another seed, other bugs.
    """
    if not packages and not repositories:
        raise ConfigError("packages and repositories: expected at least one, got none")
    if not 0 <= rl_share <= 1:
        raise ConfigError(f"rl_share: expected a share between 0 and 1, got {rl_share}")
    for key, value in {
        "tasks_per_repository": tasks_per_repository,
        "repeats": repeats,
        "concurrency": concurrency,
    }.items():
        if value < 1:
            raise ConfigError(f"{key}: expected at least 1, got {value}")
    sandboxes.check()
    console = Console(highlight=False)
    grader = Grader(sandboxes, timeout_s, repeats)
    summary: dict[str, Any] = {}
    wanted: list[tuple[str, str | Path]] = [*(packages or {}).items(), *(repositories or {}).items()]
    for number, (name, where) in enumerate(wanted, 1):
        started = time.monotonic()
        settings = [name, str(where), tasks_per_repository, history_commits, rl_share, timeout_s, repeats, seed]
        shelf = _Shelf(output_dir, name, pool_of(name, rl_share), settings)
        if shelf.summary is None:
            console.print(f"[{number}/{len(wanted)}] {name} ...", style="dim")
            try:
                repository = _fetch(name, where, cache)
                limit = (tasks_per_repository, history_commits, concurrency, seed)
                found = asyncio.run(_build(repository, shelf, grader, *limit))
            except TaskError as error:
                found = {"error": str(error)}
            shelf.finish({**found, **shelf.counts(), "seconds": round(time.monotonic() - started, 1)})
        assert shelf.summary is not None
        summary[name] = shelf.summary
        console.print(f"[{number}/{len(wanted)}] {name}: {escape(printable(_line(shelf.summary)))}")
    write_result(output_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    _print(summary, console)


def pool_of(repository: str, rl_share: float) -> Pool:
    """The pool a repository belongs to, whatever else is built."""
    digest = sha256(repository.lower().encode()).digest()
    return "rl" if int.from_bytes(digest[:4], "big") < rl_share * 2**32 else "sft"


def _fetch(name: str, where: str | Path, cache: Path) -> Repository:
    if isinstance(where, str):
        return Repository(name, sources.sdist_files(name, where, cache))
    return Repository(name, sources.commit_files(where, "HEAD"), where)


async def _build(
    repository: Repository, shelf: _Shelf, grader: Grader, num_tasks: int, num_commits: int, concurrency: int, seed: int
) -> dict[str, Any]:
    baseline = await grader.baseline(repository.files)
    found = {"tests": len(baseline.stable), "flaky_tests": baseline.num_flaky, "framework": baseline.framework}
    if not baseline.stable:
        return {**found, "error": "no test passes in the sandbox without installed packages"}
    history = []
    if repository.git is not None:
        history = await _historical(repository.git, shelf, grader, num_commits)
    waiting = (one for one in chain(history, _planted(repository, baseline, seed)) if one.id not in shelf.records)
    while (room := num_tasks - shelf.num_accepted) > 0 and len(shelf.records) < CANDIDATES_PER_TASK * num_tasks:
        batch = list(islice((one for one in waiting if shelf.has_room(one)), min(concurrency, room)))
        if not batch:
            break
        outcomes = await asyncio.gather(*(_try(repository, one, shelf, grader) for one in batch))
        for candidate, outcome in zip(batch, outcomes, strict=True):
            shelf.record(candidate, outcome)
    return found


def _planted(repository: Repository, baseline: Baseline, seed: int) -> Iterator[Candidate]:
    """All planted bugs, kinds taking turns, places in a drawn order."""
    rng = random.Random(f"factory/{seed}/{repository.name}")
    by_kind: dict[str, list[tuple[str, Mutation]]] = {kind: [] for kind in KINDS}
    for path, text in sorted(repository.files.items()):
        if not sources.is_source(path) or len(text) > MAX_SOURCE_CHARS:
            continue
        try:
            for mutation in mutations(text):
                by_kind[mutation.kind].append((path, mutation))
        except (SyntaxError, ValueError):
            continue  # not of this interpreter's version
    for places in by_kind.values():
        rng.shuffle(places)
    for turn in range(max(map(len, by_kind.values()))):
        for kind, places in by_kind.items():
            if turn < len(places):
                path, mutation = places[turn]
                broken = mutation.planted(repository.files[path])
                if broken is not None:
                    digest = sha256(f"{path}\0{broken}".encode()).hexdigest()[:8]
                    function = f"{path}:{mutation.function}"
                    yield Candidate(f"{kind}-{digest}", kind, function, baseline, {path: broken})


async def _historical(path: Path, shelf: _Shelf, grader: Grader, num_commits: int) -> list[Candidate]:
    """Commits that change both code and tests; the tests are those of after the commit."""
    candidates = []
    for commit, parent, _ in await asyncio.to_thread(sources.commits, path, num_commits):
        if f"{HISTORY}-{commit[:8]}" in shelf.records:
            continue
        names = await asyncio.to_thread(git, objects_of(path), "diff", "--name-only", "-z", parent, commit)
        changed = names.decode(errors="replace").split("\0")
        if not any(map(sources.is_test, changed)) or not any(map(sources.is_source, changed)):
            continue
        after = await asyncio.to_thread(sources.commit_files, path, commit)
        before = await asyncio.to_thread(sources.commit_files, path, parent)
        broken = {
            one: before.get(one)
            for one in sorted({*after, *before})
            if sources.is_source(one) and before.get(one) != after.get(one)
        }
        if broken:
            baseline = await grader.baseline(after)
            candidates.append(Candidate(f"{HISTORY}-{commit[:8]}", HISTORY, commit, baseline, broken))
    return candidates


async def _try(repository: Repository, candidate: Candidate, shelf: _Shelf, grader: Grader) -> str:
    """Make the task and validate it; ``ACCEPTED``, or why it is none."""
    stable = candidate.baseline.stable
    if not stable:
        return "no test passes"
    details = await grader.run(candidate.baseline, candidate.broken)
    if "reason" in details:
        return "the tests do not come to their end"
    failing = [one for one in stable if one not in set(details["passed"])]
    if not failing:
        return "no test notices"
    if candidate.kind != HISTORY and len(failing) > MAX_FAILING_SHARE * len(stable):
        return "most tests fail"
    source = await asyncio.to_thread(_task_source, repository, candidate, failing, details["notes"])
    with Scratch("task") as folder:
        directory = await asyncio.to_thread(write_task, source, folder)
        problem = await grader.validate(directory)
    if problem is not None:
        return problem
    await asyncio.to_thread(write_task, source, shelf.tasks)
    return ACCEPTED


def _task_source(
    repository: Repository, candidate: Candidate, failing: Sequence[str], notes: Sequence[str]
) -> TaskSource:
    right, framework = candidate.baseline.files, candidate.baseline.framework
    files = {path: text for path, text in {**right, **candidate.broken}.items() if text is not None}
    name = f"{repository.name.replace('/', '--')}-{candidate.id}"
    patch = _patch(
        {path: files.get(path) for path in candidate.broken}, {path: right.get(path) for path in candidate.broken}
    )
    ids = [*failing, *(one for one in candidate.baseline.stable if one not in set(failing))]
    script = patch_script(patch)
    return TaskSource(
        name=name,
        environment="swe",
        family=candidate.kind,
        instruction=issue_text(name, repository.name, failing, notes) + HOW_TO_TEST[framework],
        files=files,
        tests={**tests_of(right), "test.sh": TEST_SCRIPT.format(command=TEST_COMMANDS[framework], ids=shlex.join(ids))},
        solve_script=script,
        steps=(*_edits(candidate, right, script), ("submit", {}), ("submit", {})),
        max_turns=MAX_TURNS,
        git=True,
        metadata={
            "repository": repository.name if "/" in repository.name else f"{repository.name}/{repository.name}",
            "framework": framework,
            "fail_to_pass": list(failing),
            "pass_to_pass": ids[len(failing) :],
        },
    )


# For other runners of Harbor tasks; the verifier here reads [metadata] and runs the expected tests by name.
TEST_SCRIPT = """cd /work || exit 1
if {command} {ids}; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
"""
TEST_COMMANDS = {
    UNITTEST: "PYTHONPATH=/tests:/work python3 -m unittest -q",
    PYTEST: "cd /tests && PYTHONPATH=/work python3 -m pytest -q",
}
HOW_TO_TEST = {
    UNITTEST: "",
    PYTEST: f"\n\nThe tests are run by `PYTHONPATH={FOR_AGENTS} python3 -m pytest`.",
}


def _patch(broken: Mapping[str, str | None], right: Mapping[str, str | None]) -> str:
    """What ``git apply`` makes of the broken files the right ones."""
    with Scratch("task") as folder:
        for side, files in (("a", broken), ("b", right)):
            write_files(folder / side, {path: text for path, text in files.items() if text is not None})
        return git(folder, "diff", "--no-index", "--no-prefix", "a", "b", may_differ=True).decode()


def _edits(candidate: Candidate, right: sources.Files, script: str) -> list[tuple[str, dict[str, Any]]]:
    """A solver's calls: look, then replace the lines that differ; the patch where that is more than one place."""
    (path, text), *more = candidate.broken.items()
    if more or text is None or path not in right:
        return [("bash", {"command": script})]
    broken, fixed = text.splitlines(keepends=True), right[path].splitlines(keepends=True)
    start = next(
        (i for i, (a, b) in enumerate(zip(broken, fixed, strict=False)) if a != b), min(len(broken), len(fixed))
    )
    end = 0
    while end < min(len(broken), len(fixed)) - start and broken[-1 - end] == fixed[-1 - end]:
        end += 1
    while text.count("".join(broken[start : len(broken) - end])) != 1 and (start or end):
        start, end = max(start - 1, 0), max(end - 1, 0)
    old, new = ("".join(lines[start : len(lines) - end]) for lines in (broken, fixed))
    place = f"/work/{path}"
    view = {"command": "view", "path": place, "view_range": [max(start - 10, 1), min(start + 30, len(broken))]}
    edit = {"command": "str_replace", "path": place, "old_str": old, "new_str": new}
    return [("str_replace_editor", view), ("str_replace_editor", edit)]


class _Shelf:
    """What is kept of one repository: its tasks, and a line for every candidate that was tried.

    Where settings differ from those of an earlier build, what that has made is moved aside.
    """

    def __init__(self, output_dir: Path, name: str, pool: Pool, settings: list[Any]) -> None:
        self.name = check_name(name.replace("/", "--"), "name", ConfigError)
        self.pool = pool
        self.tasks = output_dir / pool
        self._records = output_dir / "records" / f"{self.name}.jsonl"
        self.records: dict[str, dict[str, str]] = {}
        self.summary: dict[str, Any] | None = None
        header = {"settings": json.loads(json.dumps(settings))}
        lines = [json.loads(line) for line in _whole_lines(self._records)]
        if lines[:1] == [header]:
            for line in lines[1:]:
                if "summary" in line:
                    self.summary = line["summary"]
                else:
                    self.records[line["id"]] = line
            return
        earlier = [self._records] if self._records.exists() else []
        for old in (path for pool_dir in ("sft", "rl") for path in (output_dir / pool_dir).glob(f"{self.name}-*")):
            kind = old.name.removeprefix(f"{self.name}-").split("-")[0]
            if kind in (*KINDS, HISTORY) and is_written_here(old):
                earlier.append(old)
        set_contents_aside(output_dir, earlier)
        replace_text(self._records, json.dumps(header) + "\n")

    @property
    def num_accepted(self) -> int:
        return sum(record["outcome"] == ACCEPTED for record in self.records.values())

    def has_room(self, candidate: Candidate) -> bool:
        """Whether its function has not been used too often."""
        used = [one for one in self.records.values() if one["function"] == candidate.function]
        return sum(one["outcome"] == ACCEPTED for one in used) < MAX_TASKS_PER_FUNCTION

    def record(self, candidate: Candidate, outcome: str) -> None:
        self.records[candidate.id] = {
            "id": candidate.id, "kind": candidate.kind, "function": candidate.function, "outcome": outcome,
        }  # fmt: skip
        self._append(self.records[candidate.id])

    def counts(self) -> dict[str, Any]:
        outcomes = Counter(record["outcome"] for record in self.records.values())
        kinds = Counter(record["kind"] for record in self.records.values() if record["outcome"] == ACCEPTED)
        return {
            "pool": self.pool,
            "tried": len(self.records),
            "tasks": outcomes.pop(ACCEPTED, 0),
            "rejected": dict(outcomes),
            "kinds": dict(kinds),
        }

    def finish(self, summary: dict[str, Any]) -> None:
        self.summary = summary
        self._append({"summary": summary})

    def _append(self, row: Mapping[str, Any]) -> None:
        with self._records.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _whole_lines(path: Path) -> list[str]:
    """Lines of a file that a killed build may have been writing; a torn last one is cut off."""
    if not path.exists():
        return []
    data = path.read_bytes()
    if not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        path.write_bytes(data)
    return data.decode().splitlines()


def _line(summary: Mapping[str, Any]) -> str:
    if "error" in summary:
        return str(summary["error"])
    return (
        f"{summary['tasks']} tasks of {summary['tried']} candidates, {summary['tests']} tests, pool {summary['pool']}"
    )


def _print(summary: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    table = Table(title="software tasks")
    for column in ("repository", "pool", "tests", "flaky", "tried", "tasks", "seconds"):
        table.add_column(column, justify="left" if column in ("repository", "pool") else "right")
    for name, row in summary.items():
        keys = ("pool", "tests", "flaky_tests", "tried", "tasks", "seconds")
        table.add_row(name, *(str(row.get(key, "–")) for key in keys))
    total = Counter(row["pool"] for row in summary.values() for _ in range(row["tasks"]))
    console.print(table)
    console.print(f"{sum(total.values())} tasks: {total['sft']} for SFT, {total['rl']} for RL")
