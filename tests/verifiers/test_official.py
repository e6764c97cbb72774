"""Verdicts on rows of SWE-bench and SWE-bench Pro against the benchmarks' own."""

from __future__ import annotations

import ast
import asyncio
import base64
import importlib.util
import json
import random
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from north_lightning.errors import ConfigError, DataError, VerifierError
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import load_task, swe_bench
from north_lightning.tasks.git import without_binary
from north_lightning.tasks.swe_rows import import_rows, read_row
from north_lightning.tasks.swe_tasks import write_instance
from north_lightning.types import Reward, Rollout, Task
from north_lightning.verifiers import UnitTestVerifier
from north_lightning.verifiers.official import APPLY_PATCH, grade_log, grade_output

SCRIPT = Path(__file__).with_name("official_swe_bench.py")


def disagreements(count: int, seed: int, folder: Path) -> tuple[list[Any], Counter[bool]]:
    """Rows that the package's own harness and the verifier here judge differently, and how often each verdict was."""
    command = [sys.executable, "-X", "utf8", str(SCRIPT), str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == count
    slots = asyncio.Semaphore(4)

    async def differs(number: int, row: dict[str, Any], theirs: dict[str, Any]) -> Any:
        async with slots:
            instance = read_row(row)
            written = json.loads(json.dumps(instance.grading))
            logs = folder / str(number) / "logs"
            logs.mkdir(parents=True)
            (logs / "log").write_bytes(base64.b64decode(row["log"]))
            ours = await grade_log(instance.id, written, logs)
            script = theirs.pop("eval_script").removeprefix("#!/bin/bash\nset -uxo pipefail\n")
            same_script = script.strip() in instance.scripts["eval.sh"]
            same = ours["resolved"] == theirs["resolved"] and ours["passed"] == theirs.get("passed", [])
            return None if same and same_script else (row, theirs, ours)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(differs(i, one["row"], one["official"]) for i, one in enumerate(rows)))

    found = [one for one in asyncio.run(all_of_them()) if one is not None]
    return found, Counter(one["official"]["resolved"] for one in rows)


def test_verdicts_on_rows_of_swe_bench_are_those_of_its_own_harness(tmp_path: Path) -> None:
    found, verdicts = disagreements(57, 9, tmp_path)
    assert found == []
    assert min(verdicts[True], verdicts[False]) >= 10


@pytest.mark.long
@pytest.mark.parametrize("seed", range(8))
def test_verdicts_on_2000_rows_of_swe_bench_are_those_of_its_own_harness(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, verdicts = disagreements(250, seed, tmp_path)
    with capsys.disabled():
        print(f"\n250 rows, {verdicts[True]} resolved: {len(found)} disagreements")
    assert found == []
    assert min(verdicts[True], verdicts[False]) >= 40


# ---- SWE-bench Pro: what its parser wrote ---------------------------------------------------------------------------


def resolved_by_description(output: bytes, fail: list[str], keep: list[str]) -> bool:
    """The benchmark's description: resolved if and only if all tests of both lists are PASSED in output.json."""
    try:
        found = json.loads(output.decode("utf-8"))
        passed = []
        for test in found["tests"]:
            if test["status"] == "PASSED":
                passed.append(test["name"])
        return all(name in set(passed) for name in fail + keep)
    except Exception:
        return False


def generated_output(rng: random.Random, names: list[str]) -> bytes:
    status = ("PASSED",) * 30 + ("FAILED", "SKIPPED", "ERROR", "passed", "XFAIL", "", None, True)
    tests: list[Any] = [{"name": name, "status": rng.choice(status)} for name in names if rng.random() < 0.97]
    tests += [{"name": rng.choice(names), "status": rng.choice(status)} for _ in range(rng.randint(0, 2))]
    tests += [{"name": f"other {i}", "status": "FAILED", "time": float("nan")} for i in range(rng.randint(0, 2))]
    if rng.random() < 0.1:
        tests.append(
            rng.choice([{}, {"name": "x"}, {"status": "PASSED"}, "text", None, 3, {"name": ["x"], "status": "PASSED"}])
        )
    rng.shuffle(tests)
    whole: Any = {"tests": tests}
    if rng.random() < 0.1:
        whole = rng.choice(
            [tests, {}, {"tests": None}, {"tests": "abc"}, None, 3, {"tests": {"a": 1}}, {"results": tests}]
        )
    text = json.dumps(whole, ensure_ascii=rng.random() < 0.5)
    broken = (b"", b"\xef\xbb\xbf" + text.encode(), text.encode()[:-1], text.encode("utf-16"), b"\xff" + text.encode())
    return rng.choice(broken) if rng.random() < 0.08 else text.encode()


def test_verdicts_on_2000_outputs_of_swe_bench_pro_are_as_it_describes_them(tmp_path: Path) -> None:
    names = [
        "tests/test_a.py::test_b[x-y]",
        "TestGo/sub_case",
        "test/a.spec.js | renders <b> twice",
        "naïve ✓",
        "a 'b' \\ c",
    ]
    verdicts: Counter[bool] = Counter()
    for number in range(2000):
        rng = random.Random(number)
        expected = rng.sample(names, rng.randint(1, 4))
        fail, keep = expected[:1], expected[1:]
        output = generated_output(rng, names)
        (tmp_path / "output.json").write_bytes(output)
        instance = {"FAIL_TO_PASS": fail, "PASS_TO_PASS": keep}
        verdict = asyncio.run(grade_output("a", instance, tmp_path))
        assert verdict["resolved"] == resolved_by_description(output, fail, keep), output
        verdicts[verdict["resolved"]] += 1
    assert min(verdicts[True], verdicts[False]) > 300
    (tmp_path / "output.json").unlink()
    assert asyncio.run(grade_output("a", instance, tmp_path))["resolved"] is False
    (tmp_path / "parser_exit_code").write_text("127\n")
    with pytest.raises(VerifierError, match="python was not found"):
        asyncio.run(grade_output("a", instance, tmp_path))


def test_binary_hunks_are_left_out_of_generated_patches(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(20):
        root = tmp_path / str(number)
        root.mkdir()
        git(root, "init", "-q")
        for step in range(2):
            for name in ("a.txt", "b/ü.txt", "c.bin", "d d.bin", "diff --git a"):
                (root / name).parent.mkdir(exist_ok=True)
                text = rng.choice(
                    [b"", b"GIT binary patch\n", b"Binary files a and b differ\n", b"diff --git a/x b/x\n", b"x"]
                )
                (root / name).write_bytes(
                    text + bytes([step]) * rng.randint(0, 2) if "bin" in name else text * (1 + step)
                )
            git(root, "add", "-A")
            git(root, "commit", "-q", "--allow-empty", "-m", "x")
        option = rng.choice(["--binary", "--no-color"])
        stripped = without_binary(git(root, "diff", option, "HEAD~1", "HEAD"))
        changed = git(root, "diff", "--numstat", "-z", "HEAD~1", "HEAD").split("\0")
        texts = {line.split("\t")[2] for line in changed if line and not line.startswith("-")}
        git(root, "checkout", "-q", "HEAD~1")
        if stripped:
            subprocess.run(["git", "apply", "--index", "-"], input=stripped, text=True, cwd=root, check=True)
        touched = git(root, "diff", "--cached", "--name-only", "-z", "HEAD").split("\0")
        assert {name for name in touched if name} == texts


# ---- real sandboxes -------------------------------------------------------------------------------------------------

WRONG, RIGHT = "def double(x):\n    return x + 2\n", "def double(x):\n    return x * 2\n"
CASES = "two 2 4\n"
NEW_CASES = CASES + "three 3 6\n"
# Reads cases and says what became of each, in the words of a framework.
RUNNER = """import sys
from number import double
good, bad = sys.argv[2:4]
for line in open(sys.argv[1]):
    name, given, wanted = line.split()
    print((good if double(int(given)) == int(wanted) else bad).format(name))
"""
KINDS = {
    "pytest": ("tests/cases.py::test_{} PASSED", "tests/cases.py::test_{} FAILED", r"^(?P<name>\S+) (?P<word>PASSED|FAILED)"),
    "go": ("    --- PASS: TestDouble/{} (0.00s)", "    --- FAIL: TestDouble/{} (0.00s)", r"^ *--- (?P<word>\w+): (?P<name>\S+)"),
    "javascript": ("  ✓ doubles | {} times", "  ✕ doubles | {} times", r"^ *(?P<word>\S) (?P<name>.*)"),
}  # fmt: skip
NAMES = {"pytest": "tests/cases.py::test_{}", "go": "TestDouble/{}", "javascript": "doubles | {} times"}
RUN_SCRIPT = """#!/bin/bash
cd /app
run() { python3 tests/runner.py "$1" '%s' '%s'; }
IFS=, read -ra files <<<"$1"
for file in "${files[@]}"; do PYTHONPATH=/app run "$file"; done
[ -e logo.bin ] && echo "a binary file came along" >&2
exit 1
"""
PARSER = """import json, re, sys
pattern = %r
words = {"PASSED": "PASSED", "PASS": "PASSED", "✓": "PASSED"}
found = [re.match(pattern, line) for line in open(sys.argv[1], encoding="utf-8").read().splitlines()]
tests = [{"name": m["name"], "status": words.get(m["word"], "FAILED")} for m in found if m]
if "binary" in open(sys.argv[2]).read():
    tests = []
json.dump({"tests": tests}, open(sys.argv[3], "w"))
"""


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.quotePath=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clone")
    git(root, "init", "-q", "-b", "main")
    (root / "tests").mkdir()
    (root / "tests" / "runner.py").write_text(RUNNER)
    (root / ".gitignore").write_text("kept.txt\n*.log\n")
    (root / "kept.txt").write_text("committed although ignored\n")
    for code, cases in ((WRONG, CASES), (RIGHT, NEW_CASES)):
        (root / "number.py").write_text(code)
        (root / "tests" / "cases.txt").write_text(cases)
        git(root, "add", "-A", "-f")
        git(root, "commit", "-q", "-m", "state")
    return root


def common(clone: Path) -> dict[str, Any]:
    before, after = git(clone, "rev-parse", "HEAD~1").strip(), git(clone, "rev-parse", "HEAD").strip()
    return {
        "instance_id": "instance_a__n-1", "repo": "a/n", "base_commit": before, "problem_statement": "double is wrong.",
        "patch": git(clone, "diff", before, after, "--", "number.py"), "after": after,
    }  # fmt: skip


def pro_task(kind: str, clone: Path, folder: Path, **changes: Any) -> Task:
    good, bad, pattern = KINDS[kind]
    row = common(clone)
    scripts = folder / "run_scripts" / row["instance_id"]
    scripts.mkdir(parents=True)
    (scripts / "run_script.sh").write_text(RUN_SCRIPT % (good, bad))
    (scripts / "parser.py").write_text(PARSER % pattern)
    row |= {
        "requirements": "Twice.", "interface": "None.", "dockerhub_tag": "a.n-1",
        "fail_to_pass": repr([NAMES[kind].format("three")]), "pass_to_pass": repr([NAMES[kind].format("two")]),
        "selected_test_files_to_run": repr(["tests/cases.txt"]),
        "before_repo_set_cmd": f"git clean -fd\ngit checkout {row['after']} -- tests/cases.txt",
    }  # fmt: skip
    return load_task(write_instance(read_row(row | changes, scripts.parent), clone, folder / "tasks"))


def attempt(task: Task, folder: Path, change: Callable[[Path], object]) -> Path:
    work = folder / "work"
    subprocess.run(["rm", "-rf", work], check=True)
    subprocess.run(["cp", "-r", task.directory / "environment" / "files", work], check=True)
    change(work)
    return work


def graded(task: Task, work: Path, provider: BubblewrapProvider | None = None) -> Reward:
    rollout = Rollout(task.id, "swe", task.family, 0, 0, 0)
    return asyncio.run(UnitTestVerifier(60).verify(task, rollout, work, provider or BubblewrapProvider()))


def solve(work: Path) -> None:
    script = (work.parent / "tasks" / "instance_a__n-1" / "solution" / "solve.sh").read_text()
    subprocess.run(["bash", "-c", script.replace("cd /work", f"cd {work}")], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_scripts_of_swe_bench_pro_run_in_the_sandbox(kind: str, clone: Path, tmp_path: Path) -> None:
    task = pro_task(kind, clone, tmp_path)
    assert (task.verifier_timeout_s, task.agent_timeout_s, task.family) == (3600.0, 1800.0, "swe_bench_pro")
    assert "\n\nRequirements:\nTwice.\n\nNew interfaces introduced:\nNone." in task.instruction
    untouched = graded(task, attempt(task, tmp_path, lambda work: None))
    assert (untouched.value, untouched.details["passed"]) == (0.0, [NAMES[kind].format("two")])
    solution = graded(task, attempt(task, tmp_path, solve))
    assert solution.value == 1.0, solution.details


def test_an_attempt_at_swe_bench_pro_is_its_patch(clone: Path, tmp_path: Path) -> None:
    task = pro_task("go", clone, tmp_path)

    def change(work: Path) -> None:
        solve(work)
        (work / "logo.bin").write_bytes(b"\0\1")  # a binary hunk is stripped
        (work / "tests" / "cases.txt").write_text("three 3 7\n")  # tests are the benchmark's
        (work / "ignored.log").write_text("x")
        (work / "tests" / "cases.py").symlink_to("/etc/passwd")
        git(work, "commit", "-qam", "the attempt's own")
        (work / ".git" / "config").write_text("[core]\n\tfsmonitor = touch /work/ran\n")

    reward = graded(task, attempt(task, tmp_path, change))
    assert reward.value == 1.0, reward.details
    broken = graded(task, attempt(task, tmp_path, lambda work: (work / "tests" / "runner.py").unlink()))
    assert broken.value == 0.0

    def keep_it_wrong(work: Path) -> None:
        solve(work)
        (work / "kept.txt").unlink()  # committed, although a rule ignores it: part of the patch
        (work / "tests" / "runner.py").write_text("import os\nassert os.path.exists('kept.txt')\n" + RUNNER)

    assert graded(task, attempt(task, tmp_path, keep_it_wrong)).value == 0.0


EVAL_SCRIPT = """#!/bin/bash
set -uxo pipefail
source /opt/miniconda3/bin/activate
cd /testbed
git config --global --add safe.directory /testbed
git checkout {commit} tests/cases.txt
git apply -v - <<'EOF_114329324912'
{patch}EOF_114329324912
: '>>>>> Start Test Output'
PYTHONPATH=. python3 tests/runner.py tests/cases.txt 'PASSED tests/cases.py::test_{{}}' 'FAILED tests/cases.py::test_{{}} - no'
: '>>>>> End Test Output'
git checkout {commit} tests/cases.txt
"""


def swe_bench_row(clone: Path) -> dict[str, Any]:
    row = common(clone)
    patch = git(clone, "diff", "HEAD~1", "HEAD", "--", "tests")
    return row | {
        "image": "sweb/a:1", "version": "1", "log_parser": "parse_log_pytest", "eval_type": "PASS_AND_FAIL",
        "FAIL_TO_PASS": json.dumps([NAMES["pytest"].format("three")]), "PASS_TO_PASS": [NAMES["pytest"].format("two")],
        "test_patch": patch, "eval_script": EVAL_SCRIPT.format(commit=row["base_commit"], patch=patch),
    }  # fmt: skip


def test_the_script_of_a_row_of_swe_bench_runs_on_a_clone(clone: Path, tmp_path: Path) -> None:
    task = load_task(write_instance(read_row(swe_bench_row(clone)), clone, tmp_path / "tasks"))
    assert (task.verifier_timeout_s, task.agent_timeout_s) == (1800.0, 1800.0)
    touched = graded(task, attempt(task, tmp_path, lambda work: (work / "more.py").write_text("")))
    assert (touched.value, touched.details["passed"]) == (0.0, [NAMES["pytest"].format("two")])
    solution = graded(task, attempt(task, tmp_path, solve))
    assert solution.value == 1.0, solution.details
    crash = graded(
        task, attempt(task, tmp_path, lambda work: (work / "number.py").write_text("import os\nos._exit(0)\n"))
    )
    assert crash.value == 0.0


def test_a_row_begins_with_its_image_and_one_commit(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "sandbox"))
    import root_file_system

    monkeypatch.setattr(root_file_system, "PROGRAMS", (*root_file_system.PROGRAMS, "git"))
    root = root_file_system.make_root_file_system(tmp_path / "root")
    row = swe_bench_row(clone)
    subprocess.run(["cp", "-r", clone, root / "testbed"], check=True)
    git(root / "testbed", "checkout", "-q", row["base_commit"])
    (root / "testbed" / "built.log").write_text("what a build left\n")
    tmp_path.chmod(0o755)
    task = load_task(write_instance(read_row(row), None, tmp_path / "tasks"))
    provider = BubblewrapProvider(images={"sweb/a:1": root})

    async def attempts() -> str:
        sandbox = await provider.open(None, root=task.root)
        try:
            look = f"git log --all --format=%s; git cat-file -e {row['after']} || echo gone; cat built.log"
            seen = await sandbox.run(f"cd /testbed; {look}", 60)
            await sandbox.snapshot(tmp_path / "untouched")
            await sandbox.run((task.directory / "solution" / "solve.sh").read_text(), 60)
            await sandbox.snapshot(tmp_path / "solved")
            return seen.output
        finally:
            await sandbox.close()

    seen = asyncio.run(attempts()).splitlines()
    assert (seen[0], seen[-2:]) == ("initial", ["gone", "what a build left"])
    assert graded(task, tmp_path / "untouched", provider).value == 0.0
    assert graded(task, tmp_path / "solved", provider).value == 1.0


def test_a_patch_is_applied_as_the_package_applies_it(clone: Path, tmp_path: Path) -> None:
    """The package's commands in its order."""
    package = importlib.util.find_spec("swebench")
    assert package is not None
    source = Path(str(package.origin)).with_name("harness") / "run_evaluation.py"
    lists = {node.targets[0].id: node.value for node in ast.parse(source.read_text()).body
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip
    commands = ast.literal_eval(lists["GIT_APPLY_CMDS"])
    assert shlex.split(APPLY_PATCH["swe_bench"].split(" in ")[1].split(";")[0].replace("\\\n", "")) == commands
    task = load_task(write_instance(read_row(swe_bench_row(clone)), clone, tmp_path / "tasks"))

    def with_binary(work: Path) -> None:
        solve(work)
        (work / "logo.bin").write_bytes(b"\0\1")

    assert graded(task, attempt(task, tmp_path, with_binary)).value == 1.0


def test_an_empty_patch_resolves_nothing_even_where_the_untouched_repository_passes(
    clone: Path, tmp_path: Path
) -> None:
    row = swe_bench_row(clone)
    row |= {"FAIL_TO_PASS": row["PASS_TO_PASS"], "PASS_TO_PASS": []}
    task = load_task(write_instance(read_row(row), clone, tmp_path / "tasks"))
    assert graded(task, attempt(task, tmp_path, lambda work: None)).value == 0.0
    touched = graded(task, attempt(task, tmp_path, lambda work: (work / "more.py").write_text("")))
    assert touched.value == 1.0, touched.details


# ---- no verdict ------------------------------------------------------------------------------------------------------


def test_without_the_package_there_is_no_verdict(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task(write_instance(read_row(swe_bench_row(clone)), clone, tmp_path / "tasks"))
    swe_bench.known.cache_clear()
    monkeypatch.setattr(swe_bench.importlib.util, "find_spec", lambda name: None)
    remedy = re.escape("swebench is not installed: pip install 'north-lightning[evaluation]'")
    for ask in (
        lambda: read_row(swe_bench_row(clone)),
        lambda: UnitTestVerifier().check_task(task),
        lambda: graded(task, task.directory),
    ):
        with pytest.raises(ConfigError, match=remedy):
            ask()
    monkeypatch.undo()
    monkeypatch.setattr(swe_bench.importlib.metadata, "version", lambda name: "4.1.0")
    with pytest.raises(ConfigError, match="swebench 5.*got version 4.1.0"):
        swe_bench.grader_version()


@pytest.mark.parametrize("runner", [("sleep", "60"), ("false",)])
def test_a_grader_that_hangs_or_fails_gives_no_verdict(
    runner: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swe_bench, "RUNNER", runner)
    monkeypatch.setattr(swe_bench, "TIMEOUT_S", 0.5)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log").write_text("x" * 1000)
    with pytest.raises(VerifierError, match=r"a: the package swebench 5.*(within 0.5 s|failed)"):
        asyncio.run(grade_log("a", {"instance_id": "a"}, tmp_path / "logs"))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_rows_are_pinned_and_begin_with_their_images(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(swe_bench_row(clone)) + "\n")
    import_rows([file], tmp_path / "tasks")
    digest = re.findall(r"sha256 ([0-9a-f]{64})", capsys.readouterr().out)
    assert digest == subprocess.run(["sha256sum", file], capture_output=True, text=True).stdout.split()[:1]
    import_rows([file], tmp_path / "tasks", sha256=[digest[0].upper()])
    with pytest.raises(DataError, match=rf"sha256: {file}: expected {'0' * 64}, got {digest[0]}"):
        import_rows([file], tmp_path / "others", sha256=["0" * 64])
    with pytest.raises(ConfigError, match="sha256: expected one for each of 1 files, got 2"):
        import_rows([file], tmp_path / "others", sha256=digest * 2)
    assert not (tmp_path / "others").exists()
    task = load_task(tmp_path / "tasks" / "instance_a__n-1")
    assert task.root is not None
    assert task.root.workdir == "/testbed"
    assert task.own_verifier is not None
    assert task.own_verifier.root is not None
    assert (task.own_verifier.root.image, task.own_verifier.root.workdir) == ("sweb/a:1", "/testbed")
    assert task.unsupported == ()
    assert (task.directory / "environment" / "Dockerfile").read_text().startswith("FROM sweb/a:1\nWORKDIR /testbed\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_parser": "parse_log_nothing"}, "log_parser: expected one of parse_log_ant, .*got 'parse_log_nothing'"),
        ({"eval_type": "any"}, "eval_type: expected one of pass_and_fail, fail_only, got 'any'"),
        (
            {"repo": "django/django", "eval_script": None, "log_parser": None},
            "eval_script: expected .* parse_log_django",
        ),
    ],
)
def test_a_row_of_swe_bench_that_cannot_be_graded_names_the_column(
    change: dict[str, Any], message: str, clone: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_row(swe_bench_row(clone) | change)


def test_an_older_row_is_graded_as_the_package_knows_its_repository(clone: Path) -> None:
    old = {key: value for key, value in swe_bench_row(clone).items() if key not in ("log_parser", "eval_type", "image")}
    kinds = {
        "astropy/astropy": ("parse_log_pytest_v2", "pass_and_fail"), "django/django": ("parse_log_django", "pass_and_fail"),
        "eslint/eslint": ("parse_log_eslint", "fail_only"), "prometheus/prometheus": ("parse_log_gotest", "pass_and_fail"),
    }  # fmt: skip
    for repository, kind in kinds.items():
        grading = read_row(old | {"repo": repository, "instance_id": "django__django-11099"}).grading
        assert (grading["log_parser"], grading["eval_type"]) == kind
        assert grading["image"] == "swebench/sweb.eval.x86_64.django_1776_django-11099:latest"


def test_a_row_of_swe_bench_pro_without_its_scripts_names_the_key(clone: Path, tmp_path: Path) -> None:
    pro_task("go", clone, tmp_path)
    row = common(clone) | {"fail_to_pass": "['a']", "pass_to_pass": "[]", "selected_test_files_to_run": "['a']"}
    with pytest.raises(DataError, match=r"run_scripts: expected .* with instance_a__n-1/run_script.sh, got None"):
        read_row(row)
    scripts = tmp_path / "run_scripts"
    with pytest.raises(DataError, match="selected_test_files_to_run: expected a list"):
        read_row(row | {"selected_test_files_to_run": "a"}, scripts)
    assert read_row(row, scripts).statement == ("double is wrong.\n\nRequirements:\n\n\nNew interfaces introduced:\n")
