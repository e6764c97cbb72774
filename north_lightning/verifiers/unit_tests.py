"""The unit-test reward: 1 if the task's tests pass on what an attempt left behind, else 0.

In: a task and the snapshot of the attempt's ``/work``. Out: a ``Reward``. The tests run in a *fresh* sandbox that no
process of the attempt has seen; the task's ``tests/`` is mounted read-only at ``/tests``, a new directory at
``/logs/verifier``. What is not the attempt's doing (no sandbox, no reward file, no interpreter) raises.

**Grading** is ``official`` or ``strict``. Official is the verdict of the benchmark's own grader on the same work, and
what numbers are reported by. Strict, for training, also fails what no honest attempt does:

- a terminal task's process that outlives ``test.sh``, as it may have rewritten the reward;
- a step of a task that cannot be made ready, as the step before may have seen to that (``rollout.steps``);
- a LiveCodeBench answer that outlasts the limit of a test with the alarm silenced, that is far longer than what is
  expected, or whose value is not what is expected once it is JSON (``live_code_bench``);
- a SciCode step that ends its process before its tests have run, or replaces what they compare with
  (``scicode_runner``).

Rows of SWE-bench and SWE-bench Pro are graded the same in both (``official``). Both give no verdict on a link where the
reward should be. Both grade a terminal task on what is in ``/work``, where Harbor grades in the attempt's own
environment: a task whose tests need a service, or a file elsewhere, is to be left out.

**Infrastructure failures** are errors, never a score. Tests that do not end score 0, because what they wait for may be
what the attempt left. The verdict says so (``Reward.unended``), and an evaluation then runs them on the task's own
solution, or on the untouched task if it has none: tests that do not end there either hang, or the machine is too slow
for their limit, and there is no verdict (``evaluation.controls``). Errors at once are: a runner of ours that does not
start, a grader that fails or hangs, a sandbox in which the machine ran out of memory and killed a process, and a full
disk where an unsolved attempt was graded.

**Terminal tasks** follow Harbor: ``test.sh`` runs in ``/work``, its exit code is ignored, ``reward.json`` beats
``reward.txt``.

Where a task has its verifier in an environment of its own, that is as the task gives it, with the declared artifacts
of the attempt put in place of what is there; one that is missing is left out, as in Harbor.

**Rows of benchmarks** (``tasks.swe_rows``) bring a test command of their own framework; its log is read, and every
expected test must be in it as passed. As in the benchmarks themselves, code under test can print such a log. Rows of
SWE-bench and SWE-bench Pro are graded by what these grade with (``official``).

**Single answers** (``tasks.live_code_bench``, ``tasks.scicode``) are graded as their benchmark's own grader does; a
step of SciCode is what a software test is.

**Software tasks** are judged by a parent process that the code under test never enters (``apart``): it alone has the
secret of each expected test, and hands it back for what its children, one for each file of tests, say has passed. In
each child the tests stand among canaries (``canaries``), of which half expect what is wrong. Where one of those passes,
or one of the others fails, the reason is ``tampered`` and the reward 0, as it is where what judges, what the tests
import from the standard library, or the tests' own functions and constants have changed (``seal``). A class that the
code under test brings along cannot claim to equal what it does not (``strict``). ``graded_tree`` says what of the
attempt is graded at all.

Not defended: in a child, the code under test shares an interpreter with its tests. Code that is made for this grader
can tell canaries from tests by their sources, write a child's memory, change a caller's local variables or an
instance's attributes through its frame, replace an assertion and put it back before the test ends, or stand between a
child and its parent. Two objects of one class of the code under test are equal if that class says so, and what a test
lets the standard library compare (``operator.eq``, ``list.index``) is decided by what is compared. The code can also
read ``/tests`` while it is being graded. A terminal task whose ``test.sh`` executes a program of the attempt lets that
program write the reward before ``test.sh`` ends, or in the microseconds until what is left is stopped. Where this
process may not mount, only the size of each file in the logs is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Container, Mapping, Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from north_lightning.errors import ConfigError, RewardFileError, UploadRefusedError, VerifierError
from north_lightning.interfaces import RewardVerifier, SandboxProvider
from north_lightning.sandbox.scratch import Scratch
from north_lightning.sandbox.trees import mount_tmpfs
from north_lightning.sandbox.upload import upload
from north_lightning.tasks import image_of
from north_lightning.tasks.logs import PARSERS
from north_lightning.types import (
    CommandResult,
    Count,
    Grading,
    Positive,
    Reward,
    Rollout,
    Task,
    VerifierEnvironment,
)
from north_lightning.verifiers import live_code_bench
from north_lightning.verifiers.checked import TAMPERED
from north_lightning.verifiers.frameworks import GRADER, PACKAGES, PYTEST, UNITTEST, Framework, framework_of
from north_lightning.verifiers.graded_tree import Allowance, UngradableTree, build_graded_tree
from north_lightning.verifiers.official import check_official, grader_of, read_untrusted, verify_official

END = "-"
VARIABLES = ".variables"
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}")
"""Alone in a value, as in Harbor."""

LIVE_CODE_BENCH = "live_code_bench"
OWN_GRADERS = {
    LIVE_CODE_BENCH: ("live_code_bench_runner", "nvidia-livecodebench 26.3"),
    "scicode": ("scicode_runner", "nvidia-scicode 26.3"),
}
"""Our program that grades, and the package whose verdicts official grading gives."""
ANSWER_PACKAGES = {LIVE_CODE_BENCH: ("numpy",), "scicode": ("numpy", "scipy", "sympy", "h5py", "matplotlib")}
SCICODE_MOUNTS = {f"{GRADER}/{name}": Path(__file__).with_name(name) for name in ("scicode_runner.py", "apart.py")}

MAX_REPORT_BYTES = 1_000_000
MAX_OUTPUT_CHARS = 2_000

MIN_FREE_BYTES = 1 << 20

LEFT_RUNNING = 77
RUN_TEST_SCRIPT = f"""cd /work || exit
state() {{ stat -c '%n %i %s %z' /logs/verifier/* 2>/dev/null; }}
trap 'stopped=1' CONT
before=(/proc/[0-9]*)
/bin/bash /tests/test.sh </dev/null
kill -STOP -- -1 2>/dev/null
found=$(state)
kill -CONT -- -1 2>/dev/null
for wait in 0 0.05 0.2; do
    [ $wait = 0 ] || /bin/sleep $wait
    after=(/proc/[0-9]*)
    [ ${{#after[@]}} -gt ${{#before[@]}} ] && continue
    [ -z "$stopped" ] && [ "$found" = "$(state)" ] && exit 0
    break
done
exit {LEFT_RUNNING}"""
"""A process that is left may end, but what it writes from then on counts against it, as does stopping this one."""
_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,20}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?\s*", re.ASCII)
LOG_BYTES, OFFICIAL_LOG_BYTES = 64 << 20, 1 << 30
RUN_LIKE_HARBOR = "cd /work || exit\n/bin/bash /tests/test.sh </dev/null\nexit 0"


class UnitTestVerifier(RewardVerifier):
    """1 if the task's unit tests pass on the attempt's ``/work`` in a fresh sandbox, else 0.

    Args:
        timeout_s: Limit of one run of the tests of a task that sets none (``[verifier] timeout_sec`` in its
            ``task.toml``); reaching it scores 0.
        python: The interpreter inside the sandbox for software tasks.
        max_snapshot_mib: A software attempt that leaves more than this scores 0.
        variables: Names of this process's environment variables that tasks may ask for (``${NAME}`` in their
            ``[verifier] env``); a task that asks for another one, and has no default for it, is refused. Tests, and so
            the attempt's own code in them, can read the values; rewards and records do not show them.
        packages: Directory of the packages that single answers may import, made for ``python`` with ``pip install
            --target``: numpy for LiveCodeBench; numpy, scipy, sympy, h5py and matplotlib for SciCode.
        grading: Whether the verdict on a benchmark's task is that of its own grader (official), or also fails what no
            honest attempt does (strict): evaluations report the first, training needs the second.
    """

    def __init__(
        self,
        timeout_s: Positive = 60.0,
        python: str = "/usr/bin/python3",
        max_snapshot_mib: Count = 256,
        variables: list[str] | None = None,
        packages: Path | None = None,
        grading: Grading = "strict",
    ) -> None:
        self.timeout_s = timeout_s
        self.python = python
        self.max_snapshot_mib = max_snapshot_mib
        self.variables = variables or []
        self.packages = packages
        self.grading = grading

    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        """``VerifierError`` or ``SandboxError`` if the tests could not be run; any other outcome is a ``Reward``."""
        scratch = Scratch("verify")
        try:
            tests = await asyncio.to_thread(tests_of, task, scratch.path)
            how = self._verify_by_script
            if "grader" in task.metadata:
                how = self._verify_answers if "answer_files" in task.metadata else self._verify_officially
            elif "log_parser" in task.metadata:
                how = self._verify_by_log
            elif task.environment == "swe":
                how = self._verify_by_name
            reward = await how(task, tests, workdir, scratch.path, sandboxes)
            if not reward.solved and shutil.disk_usage(scratch.path).free < MIN_FREE_BYTES:
                raise VerifierError(f"{scratch.path}: the disk is full, so what the tests wrote may be cut off")
            return reward
        except (UngradableTree, UploadRefusedError) as error:
            return Reward(0.0, {"reason": str(error)})
        finally:
            await asyncio.to_thread(scratch.delete)

    def grader(self, task: Task) -> str:
        """As the benchmark or framework is named, with its version, or a digest of our program."""
        kind = task.metadata.get("grader", "")
        if kind in OWN_GRADERS:
            runner, official = OWN_GRADERS[kind]
            return f"{runner.replace('_', ' ')} {_digest(runner)}, equals {official} ({self.grading})"
        if kind:
            return grader_of(task)
        if "log_parser" in task.metadata:
            return f"log of {task.metadata['log_parser']}"
        if task.environment == "swe":
            name = task.metadata.get("framework", UNITTEST)
            return f"{name} by name, runner {_digest(f'{name}_runner')}"
        return f"test.sh, as Harbor 0.25.0 ({self.grading})"

    def check_task(self, task: Task) -> None:
        self._variables(task)
        if "answer_files" in task.metadata:
            self._check_packages(task)
        elif "grader" in task.metadata:
            check_official(task)

    def _check_packages(self, task: Task) -> None:
        needed = ANSWER_PACKAGES[task.metadata["grader"]]
        missing = [name for name in needed if self.packages is None or not (self.packages / name).is_dir()]
        if missing:
            raise ConfigError(
                f"verifier.packages: expected a directory with {', '.join(missing)} for task {task.id}, got "
                f"{self.packages}: {self.python} -m pip install --target DIR {' '.join(needed)}"
            )

    def _variables(self, task: Task) -> tuple[dict[str, str], list[str]]:
        """What is set for ``task``'s tests, and those of its values that come from this process's environment."""
        values, secret = dict(task.verifier_env), []
        for name, text in task.verifier_env.items():
            if found := _VARIABLE.fullmatch(text):
                given = os.environ.get(found["name"]) if found["name"] in self.variables else None
                if given is None and found["default"] is None:
                    raise ConfigError(
                        f"task {task.id}: [verifier] env asks for this process's {found['name']}, which is not given; "
                        "to give it, set it and name it in the verifier's variables"
                    )
                values[name] = found["default"] if given is None else given
                secret += [given] if given else []
        return values, secret

    @property
    def reward_range(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.grading == "strict" else (-math.inf, math.inf)

    def limit_s(self, task: Task) -> float:
        """Of one run of ``task``'s tests."""
        return self.timeout_s if task.verifier_timeout_s is None else task.verifier_timeout_s

    # ---- terminal tasks: Harbor's test.sh --------------------------------------------------------------------------

    async def _verify_by_script(
        self, task: Task, tests: Path, workdir: Path, scratch: Path, sandboxes: SandboxProvider
    ) -> Reward:
        logs = make_writable(scratch / "logs")
        variables, secret = self._variables(task)
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())
        (logs / VARIABLES).write_text(exports)  # not on a command line, which every user of the machine can read
        script = RUN_LIKE_HARBOR if self.grading == "official" else RUN_TEST_SCRIPT
        command = f". /logs/verifier/{VARIABLES}; rm -f /logs/verifier/{VARIABLES}\n{script}"
        result = await self._run(task, sandboxes, workdir, {"/tests": tests}, logs, command, task.own_verifier)
        output = result.output
        for value in secret:
            output = output.replace(value, "[secret]")
        details = {"output": output[-MAX_OUTPUT_CHARS:]}
        if fault := self._fault(task, result, details):
            return fault
        numbers = read_reward(logs, task.id, self.grading == "strict")
        number = only_reward(numbers, task.id)
        if self.grading == "strict" and not 0 <= number <= 1:
            raise RewardFileError(f"task {task.id}: expected a reward from 0 to 1, got {number:g}")
        return Reward(number, {**details, **numbers}, numbers=numbers)

    def _fault(self, task: Task, result: CommandResult, details: Mapping[str, Any]) -> Reward | None:
        """The verdict on tests that did not end as they should; ``VerifierError`` if they were killed."""
        if result.timed_out:
            reason = f"the tests did not end within {self.limit_s(task):g} s"
            return Reward(0.0, {**details, "reason": reason}, unended=True)
        if result.exit_code == LEFT_RUNNING:
            return Reward(0.0, {**details, "reason": "a process outlived the tests"})
        if result.exit_code != 0:
            raise VerifierError(
                f"task {task.id}: the tests were killed (exit code {result.exit_code}): {details['output']}"
            )
        return None

    async def _verify_officially(
        self, task: Task, tests: Path, workdir: Path, scratch: Path, sandboxes: SandboxProvider
    ) -> Reward:
        logs = make_writable(scratch / "logs", OFFICIAL_LOG_BYTES)
        return await verify_official(task, tests, workdir, logs, sandboxes, self.limit_s(task))

    # ---- software tasks: expected tests by name --------------------------------------------------------------------

    async def _verify_by_name(
        self, task: Task, tests: Path, workdir: Path, scratch: Path, sandboxes: SandboxProvider
    ) -> Reward:
        framework = framework_of(task)
        expected = expected_tests(task, tests, framework)
        graded, logs = await self._build_graded(task, workdir, scratch), make_writable(scratch / "logs")
        with Exchange(logs, expected) as exchange:
            result = await self._run(
                task, sandboxes, graded, {"/tests": tests, **framework.mounts}, logs,
                f"cd /work && exec {self.python} -I -S -E -B -c {shlex.quote(framework.program)} </dev/null",
            )  # fmt: skip
            if not exchange.was_taken():
                raise VerifierError(
                    f"task {task.id}: the test runner did not start (exit code {result.exit_code}): "
                    f"{result.output[-MAX_OUTPUT_CHARS:]}"
                )
            passed, ended, notes = exchange.read()
        details = _listed(result, expected, passed) | {"notes": notes}
        orderly = ended and result.exit_code == 0 and not result.timed_out
        if any(note.startswith(f"{END} tampered ") for note in notes):
            details["reason"] = TAMPERED
        elif not orderly:
            within = f" within {self.limit_s(task):g} s" if result.timed_out else ""
            details["reason"] = f"the tests did not run to their end{within}"
        solved = orderly and not details["failed"] and "reason" not in details
        return Reward(float(solved), details, unended=result.timed_out)

    # ---- single answers --------------------------------------------------------------------------------------------

    async def _verify_answers(
        self, task: Task, tests: Path, workdir: Path, scratch: Path, sandboxes: SandboxProvider
    ) -> Reward:
        files = task.metadata["answer_files"]
        if task.metadata["grader"] == LIVE_CODE_BENCH:
            try:
                code = await asyncio.to_thread(read_regular_file, workdir / files[0])
            except FileNotFoundError:  # the attempt ended before the answer
                code = ""
            cases = json.loads(await asyncio.to_thread((tests / "tests.json").read_bytes))
            where = (image_of(task), sandboxes, self.python, self.packages)
            return await live_code_bench.grade(cases, code, *where, self.grading)
        logs = make_writable(scratch / "logs")
        await asyncio.to_thread(shutil.copyfile, tests / "targets.h5", logs / "targets.h5")
        (logs / "targets.h5").chmod(0o666)
        steps = [name.removesuffix(".py") for name in files]
        mounts = {"/tests/problem.json": tests / "problem.json", **SCICODE_MOUNTS}
        mounts |= {PACKAGES: self.packages} if self.packages else {}
        with Exchange(logs, steps) as exchange:
            result = await self._run(
                task, sandboxes, workdir, mounts, logs,
                f"cd /work && exec {self.python} -I -B {GRADER}/scicode_runner.py {self.grading} </dev/null",
            )  # fmt: skip
            if not exchange.was_taken() or result.timed_out:  # the runner itself ends its steps
                raise VerifierError(
                    f"task {task.id}: the runner of SciCode did not start or end (exit code {result.exit_code}): "
                    f"{result.output[-MAX_OUTPUT_CHARS:]}"
                )
            passed, _, notes = exchange.read()
        details = _listed(result, steps, passed) | {"notes": notes, "extraction": task.metadata["extraction"]}
        numbers = {"reward": len(passed) / len(steps), "steps_passed": float(len(passed)), "steps": float(len(steps))}
        return Reward(numbers["reward"], details, len(passed) == len(steps), numbers)

    # ---- benchmark rows: expected tests by name, in a test framework's log -----------------------------------------

    async def _verify_by_log(
        self, task: Task, tests: Path, workdir: Path, scratch: Path, sandboxes: SandboxProvider
    ) -> Reward:
        """1 if the log says of every expected test that it passed; a test that it does not name has failed."""
        expected = [name for key in ("fail_to_pass", "pass_to_pass") for name in task.metadata.get(key) or ()]
        parse = PARSERS.get(str(task.metadata["log_parser"]))
        if parse is None or not expected:
            raise VerifierError(
                f"task {task.id}: expected tests and a log_parser of {', '.join(PARSERS)}, got "
                f"{len(expected)} tests and {task.metadata['log_parser']!r}"
            )
        graded, logs = await self._build_graded(task, workdir, scratch), make_writable(scratch / "logs")
        result = await self._run(task, sandboxes, graded, {"/tests": tests}, logs, RUN_TEST_SCRIPT)
        if fault := self._fault(task, result, _listed(result, expected, ())):
            return fault
        try:
            outcomes = parse(read_regular_file(logs / "log"))
        except FileNotFoundError as error:
            raise VerifierError(
                f"task {task.id}: test.sh wrote no /logs/verifier/log: {result.output[-500:]}"
            ) from error
        details = _listed(result, expected, {test for test, outcome in outcomes.items() if outcome == "passed"})
        return Reward(float(not details["failed"]), details)

    async def _build_graded(self, task: Task, workdir: Path, scratch: Path) -> Path:
        """The task's files with the attempt's changes; ``UngradableTree`` says why there are none."""
        pristine, allowance = task.directory / "environment" / "files", Allowance(self.max_snapshot_mib * 2**20)
        await asyncio.to_thread(build_graded_tree, pristine, workdir, scratch / "work", allowance)
        return scratch / "work"

    async def _run(
        self,
        task: Task,
        sandboxes: SandboxProvider,
        image: Path,
        read_only: Mapping[str, Path],
        logs: Path,
        command: str,
        apart: VerifierEnvironment | None = None,
    ) -> CommandResult:
        """Run ``command`` in a fresh sandbox that begins with ``image``, or in an environment ``apart``, with nothing
        of ``image`` but the declared artifacts; no process of it is left when this returns."""
        start: Path | None = image
        root = task.root if apart is None else apart.root
        if apart is not None:
            start = None if root is not None else image_of(task)
            read_only = {} if apart.brings_tests else read_only
        sandbox = await sandboxes.open(start, read_only=read_only, writable={"/logs/verifier": logs}, root=root)
        try:
            for artifact in apart.artifacts if apart is not None else ():
                found = declared(image, artifact.path)
                if found is not None:
                    inside = str(PurePosixPath("/work", artifact.path))
                    await upload(sandbox, found, inside, artifact.exclude, replace=True)
            return await sandbox.run(command, self.limit_s(task))
        finally:
            await sandbox.close()


def _listed(result: CommandResult, expected: Sequence[str], passed: Container[str]) -> dict[str, Any]:
    """The details of a verdict on tests by name."""
    return {
        "output": result.output[-MAX_OUTPUT_CHARS:],
        "passed": [test for test in expected if test in passed],
        "failed": [test for test in expected if test not in passed],
    }


def _digest(program: str) -> str:
    return sha256(Path(__file__).with_name(f"{program}.py").read_bytes()).hexdigest()[:8]


class Exchange:
    """The files between verifier and runner: ids of expected tests and a secret for each go in, secrets come back.

    All are read through file descriptors opened before the sandbox starts, so that removing, replacing or
    linking them inside changes nothing here.
    """

    def __init__(self, logs: Path, expected: Sequence[str]) -> None:
        self._secrets = {secrets.token_hex(16): test for test in (*expected, END)}
        self._expected = self._create(logs / "expected", "".join(f"{test}\n" for test in expected))
        self._given = self._create(logs / "secrets", "".join(f"{secret}\n" for secret in self._secrets))
        self._results = self._create(logs / "results")

    def was_taken(self) -> bool:
        """Whether the runner came so far as to read and remove the ids."""
        return os.fstat(self._expected).st_nlink == 0

    def read(self) -> tuple[set[str], bool, list[str]]:
        """Passed tests, whether the run came to its end, and what the runner noted on the others (for people only)."""
        lines = os.pread(self._results, MAX_REPORT_BYTES, 0).decode(errors="replace").splitlines()
        handed_back = {self._secrets[line] for line in lines if line in self._secrets}
        notes = [line[2:] for line in lines if line.startswith("! ")]
        return handed_back - {END}, END in handed_back, notes

    @staticmethod
    def _create(path: Path, text: str = "") -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.fchmod(descriptor, 0o666)
        os.write(descriptor, text.encode())
        return descriptor

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *exception: object) -> None:
        for descriptor in (self._expected, self._given, self._results):
            os.close(descriptor)


def tests_of(task: Task, scratch: Path) -> Path:
    """The directory of ``task``'s tests; a step's own are laid over the task's in ``scratch``."""
    tests = task.directory / "tests"
    if task.step_tests is not None:
        whole = scratch / "tests"
        for part in (tests, task.step_tests):
            if part.is_dir():
                shutil.copytree(part, whole, symlinks=True, dirs_exist_ok=True)
        return whole
    if not tests.is_dir() and not (task.own_verifier and task.own_verifier.brings_tests):
        raise VerifierError(f"task {task.id}: expected a directory {tests}")
    return tests


def declared(workdir: Path, path: str) -> Path | None:
    """The artifact ``path`` in what an attempt left; None if it is not there. No link on the way is followed."""
    found = workdir
    for part in PurePosixPath(path).parts:
        if found.is_symlink() or not found.is_dir():
            return None
        found = found / part
    return found if found.is_symlink() or found.exists() else None


def make_writable(path: Path, size_bytes: int = LOG_BYTES) -> Path:
    """A new directory that whoever the sandbox runs as may write in; where this process may mount, no more than so
    many bytes. Deleting the ``Scratch`` around it unmounts it."""
    path.mkdir()
    with contextlib.suppress(OSError):
        mount_tmpfs(path, size_bytes, 1000)
    path.chmod(0o777)
    return path


def expected_tests(task: Task, tests: Path, framework: Framework) -> list[str]:
    """FAIL_TO_PASS and PASS_TO_PASS of ``[metadata]``: ids of tests whose file lies under ``tests``."""
    ids: list[str] = []
    for key in ("fail_to_pass", "pass_to_pass"):
        names = task.metadata.get(key)
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise VerifierError(f"task {task.id}: expected a list of test ids in metadata {key!r}, got {names!r}")
        ids.extend(names)
    if not task.metadata["fail_to_pass"]:
        raise VerifierError(f"task {task.id}: expected at least one test id in metadata 'fail_to_pass'")
    for name in ids:
        if not framework.is_id(name, tests):
            shape = "file.py::test" if framework.name == PYTEST else "module.Class.method"
            raise VerifierError(f"task {task.id}: expected test id {shape} of a file in {tests}, got {name!r}")
    return list(dict.fromkeys(ids))


def read_reward(logs: Path, task_id: str, is_strict: bool = False) -> dict[str, float]:
    """The numbers of ``reward.json``, or else of ``reward.txt`` as ``{"reward": x}``; ``RewardFileError`` without any.

    They are finite. Graded strictly, they are written as numbers: no ``true``, no ``1_000``.
    """
    for name in ("reward.json", "reward.txt"):
        try:
            text = read_untrusted(logs / name).decode()
        except FileNotFoundError:
            continue
        except (VerifierError, UnicodeDecodeError) as error:
            raise RewardFileError(f"task {task_id}: {name}: {error}") from error
        try:
            if name == "reward.txt" and is_strict and not _NUMBER.fullmatch(text):
                raise ValueError("as the tests of a task write it")
            numbers = json.loads(text) if name == "reward.json" else {"reward": float(text)}
            kinds = {type(number) for number in numbers.values()}
            if not kinds <= ({int, float} if is_strict else {int, float, bool}):
                raise TypeError("numbers")
            numbers = {key: float(number) for key, number in numbers.items()}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise RewardFileError(f"task {task_id}: expected numbers by name in {name}, got {text[:80]!r}") from error
        if not numbers or not all(math.isfinite(number) for number in numbers.values()):
            raise RewardFileError(f"task {task_id}: expected finite numbers in {name}, got {text[:80]!r}")
        return numbers
    raise RewardFileError(f"task {task_id}: test.sh wrote neither reward.json nor reward.txt to /logs/verifier")


def only_reward(numbers: Mapping[str, float], task_id: str) -> float:
    """The number named ``reward``, or the only one."""
    if "reward" not in numbers and len(numbers) != 1:
        raise RewardFileError(f"task {task_id}: expected a number named 'reward' in reward.json, got {sorted(numbers)}")
    return numbers.get("reward", next(iter(numbers.values())))


def read_regular_file(path: Path) -> str:
    """The beginning of a file that untrusted code may have placed, as text."""
    return read_untrusted(path, MAX_REPORT_BYTES).decode(errors="replace")
