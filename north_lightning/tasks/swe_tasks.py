"""Task directories of benchmark rows.

In: an ``Instance``. Out: a Harbor task directory. The repository is a local clone's, exported at the instance's base
commit, or else the one in the image that the row names, which stays where it is in the image; no image is pulled here.
Either way an attempt sees one new commit, so that no later commit, remote, tag or reflog is there to look the answer up
in. The tests are beside the task, not in it.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from north_lightning.errors import ConfigError, TaskError
from north_lightning.sandbox.layers import BoundedEntry, unpack
from north_lightning.sandbox.scratch import Scratch
from north_lightning.tasks import swe_bench
from north_lightning.tasks.git import git, objects_of, without_binary
from north_lightning.tasks.harbor import TaskSource, patch_script, write_task
from north_lightning.tasks.logs import PARSERS
from north_lightning.untrusted import check_commit, parts_of

Parser = Literal["pytest", "unittest"]

MAX_TURNS = 100
COMMANDS = {
    "pytest": "python -m pytest -rA --tb=short -p no:cacheprovider {places}",
    "unittest": "python3 -m unittest -v {places}",
}
SWE_BENCH, PRO = "swe_bench", "swe_bench_pro"
WORKDIRS = {SWE_BENCH: "/testbed", PRO: "/app"}
TIME_LIMITS = {SWE_BENCH: (1800.0, 1800.0), PRO: (1800.0, 3600.0)}
"""Seconds of the commands of SWE-agent, and of the tests in the benchmarks' own harnesses."""
_UNITTEST_ID = re.compile(r"(\w+) \(([\w.]+)\)")
_CHECKOUT = re.compile(r"git checkout ([0-9a-f]{7,40}) -- ([^;&|<>$`]+)")


@dataclass(frozen=True)
class Instance:
    """One row, whichever benchmark it is of.

    ``bug_patch`` makes the broken state of ``commit`` and is undone; otherwise ``solution`` repairs ``commit``.
    ``tests`` are files as text, beside what ``test_patch`` changes. ``grading`` is what the benchmark's own grader is
    asked with, ``scripts`` run its tests, and ``image`` is the one that the benchmark runs them in.
    """

    id: str
    benchmark: str
    repository: str  # owner/name
    commit: str
    statement: str
    fail_to_pass: list[str]
    pass_to_pass: list[str]
    solution: str | None = None
    bug_patch: str | None = None
    test_patch: str = ""
    tests: Mapping[str, str] | None = None
    image: str | None = None
    grading: Mapping[str, Any] = field(default_factory=dict)
    scripts: Mapping[str, str] = field(default_factory=dict)


def write_instance(
    instance: Instance, clone: Path | None, parent: Path, parser: Parser = "pytest", test_command: str | None = None
) -> Path:
    """One task directory under ``parent``; ``TaskError`` if a commit is missing or a patch does not apply."""
    with Scratch("task") as folder:
        base = folder / "base" if clone is not None else None
        test_patch = without_binary(instance.test_patch, with_content=True)
        solution = instance.bug_patch or without_binary(instance.solution or "")
        if clone is not None and base is not None:
            objects = objects_of(clone)
            _export(objects, instance.commit, base)
            if instance.bug_patch:
                _apply(base, instance.bug_patch, "patch")
            test_patch = _patch_of_checkout(objects, instance) or test_patch
            if test_patch:
                _apply(base, test_patch, "test_patch", "--check")
            solution = solution or _repair(objects, instance)
        solve = patch_script(solution, "--reverse " if instance.bug_patch else "")
        tests = {f"files/{path}": text for path, text in (instance.tests or {}).items()}
        ids = [*instance.fail_to_pass, *instance.pass_to_pass]
        places = " ".join(map(shlex.quote, _places(ids, parser, [*(instance.tests or ()), *_touched(test_patch)[1]])))
        command = (test_command or COMMANDS[parser]).replace("{places}", places)
        metadata: dict[str, Any] = {"repository": instance.repository}
        if instance.grading:
            tests = _official_tests(instance, test_patch, command, in_image=clone is None)
            metadata |= {"grader": instance.grading["grader"]}
        else:
            tests["test.sh"] = TEST_SCRIPT % command
            metadata |= {"fail_to_pass": instance.fail_to_pass, "pass_to_pass": instance.pass_to_pass}
            metadata |= {"log_parser": parser}
        source = TaskSource(
            name=instance.id,
            environment="swe",
            family=instance.benchmark,
            instruction=instance.statement.strip(),
            files={},
            base=base,
            image=(str(instance.image), WORKDIRS[instance.benchmark]) if clone is None else None,
            tests=tests,
            solve_script=solve,
            steps=(("bash", {"command": solve}), ("submit", {}), ("submit", {})),
            max_turns=MAX_TURNS,
            git=True,
            time_limits=TIME_LIMITS.get(instance.benchmark, (600.0, 60.0)),
            metadata=metadata,
        )
        return write_task(source, parent)


# For the verifier here, which reads the log. The tests of the row replace whatever the attempt made of them.
TEST_SCRIPT = """cd /work || exit 1
[ -d /tests/files ] && cp -r /tests/files/. .
%s >/tmp/log 2>&1 </dev/null
tail -c 900000 /tmp/log > /logs/verifier/log
"""
SWE_BENCH_SCRIPT = "cd /work && /bin/bash /tests/eval.sh >/logs/verifier/log 2>&1 </dev/null\n"
EVAL_SCRIPT = f"""[ -f /opt/miniconda3/bin/activate ] && . /opt/miniconda3/bin/activate testbed
cd /work || exit 1
%s
echo '>>>>> Start Test Output'
%s
echo '{swe_bench.END_OF_TESTS}'
"""
PRO_SCRIPT = """cd /work || exit 1
. /tests/set_up.sh
/bin/bash /tests/run_script.sh %s >/logs/verifier/stdout.log 2>/logs/verifier/stderr.log </dev/null
"$(command -v python || command -v python3)" /tests/parser.py /logs/verifier/{stdout.log,stderr.log,output.json}
echo $? >/logs/verifier/parser_exit_code
"""


def _official_tests(instance: Instance, test_patch: str, command: str, in_image: bool) -> dict[str, str]:
    """What the benchmark runs. On a clone, the repository is elsewhere and has one commit, and a patch brings the tests
    that the image would take from a later commit."""
    tests = dict(instance.scripts)
    bring = _bring_tests(test_patch)
    if instance.benchmark == SWE_BENCH:
        tests |= {"test.sh": SWE_BENCH_SCRIPT}
        tests.setdefault("eval.sh", swe_bench.with_exit_code(EVAL_SCRIPT % (bring, command)))
    elif not tests["set_up.sh"].strip() or (not in_image and _CHECKOUT.fullmatch(tests["set_up.sh"].strip())):
        tests["set_up.sh"] = f"{bring}\n"
    if not in_image:
        place = re.compile(rf"(?<![\w./-]){WORKDIRS[instance.benchmark]}(?![\w.-])")
        tests = {name: place.sub("/work", text.replace(instance.commit, "HEAD")) for name, text in tests.items()}
    if test_patch:
        tests["test.patch"] = test_patch
    return {**tests, "instance.json": json.dumps(instance.grading)}


def _bring_tests(patch: str) -> str:
    """Commands that undo what an attempt did to the files that ``patch`` touches, and apply it."""
    old, new = (" ".join(map(shlex.quote, paths)) for paths in _touched(patch))
    git_here = "git -c safe.directory='*'"
    commands = [f"rm -rf -- {new}"] * bool(new) + [f"{git_here} checkout -q HEAD -- {old}"] * bool(old)
    commands += [f"{git_here} apply --whitespace=nowarn /tests/test.patch"] * bool(patch)
    return "\n".join(commands)


def _touched(patch: str) -> tuple[list[str], list[str]]:
    """The files that ``patch`` changes, by their names before and after it."""
    sides = (r"^(?:--- a/|rename from )([^\t\r\n]+)", r"^(?:\+\+\+ b/|rename to )([^\t\r\n]+)")
    old, new = (list(dict.fromkeys(re.findall(side, patch, re.M))) for side in sides)
    return old, new


def _places(ids: list[str], parser: Parser, tests: Iterable[str]) -> list[str]:
    """What to run: the files (or classes) of the expected tests; every test file where ids name none."""
    if parser == "unittest":
        found = [match[2] for one in ids if (match := _UNITTEST_ID.fullmatch(one))]
    else:
        found = [one.partition("::")[0] for one in ids if "::" in one]
    return list(dict.fromkeys(found)) or [path for path in tests if path.endswith(".py")]


def _export(objects: Path, commit: str, directory: Path) -> None:
    check_commit(commit.removesuffix("~1"), "base_commit")
    archive = git(objects, "archive", "--format=tar", commit)
    directory.mkdir()
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), tarinfo=BoundedEntry) as tar:
            for member in tar:
                parts_of(member.name, commit)
            unpack(tar, directory)
    except (ConfigError, tarfile.TarError, OSError) as error:
        raise TaskError(f"{commit}: {error}") from error


def _patch_of_checkout(objects: Path, instance: Instance) -> str:
    """What SWE-bench Pro's ``git checkout COMMIT -- FILES`` brings, as a patch; none where the clone lacks that."""
    found = _CHECKOUT.fullmatch(instance.scripts.get("set_up.sh", "").strip())
    if found is None:
        return ""
    try:
        changed = git(objects, "diff", "--binary", instance.commit, found[1], "--", *shlex.split(found[2]))
    except (TaskError, ValueError):
        if instance.test_patch:
            return ""
        raise
    return changed.decode(errors="surrogateescape")


def _repair(objects: Path, instance: Instance) -> str:
    """What the commit after the base changed, tests apart."""
    repairing = instance.commit.removesuffix("~1")
    changed = git(objects, "diff", instance.commit, repairing, "--", ".", ":!*test*")
    return changed.decode(errors="surrogateescape")


def _apply(tree: Path, patch: str, what: str, *options: str) -> None:
    try:
        newline = "" if patch.endswith("\n") else "\n"
        git(tree, "apply", *options, "--whitespace=nowarn", "-", stdin=patch + newline)
    except TaskError as error:
        raise TaskError(f"{what} does not apply: {error}") from error


assert COMMANDS.keys() == PARSERS.keys()
