"""SWE-bench's own harness over generated rows: ``python official_swe_bench.py COUNT SEED`` prints a JSON object a row.

A row has a log in the manner of one of the package's parsers, expected tests taken from what that parser reads in it,
and the verdict of the package, reached as its harness reaches it: ``make_test_spec`` of the row, ``get_eval_report`` of
the log. Clients that the package imports and no verdict needs (Docker, Modal, data sets) are empty modules here.
"""

from __future__ import annotations

import base64
import contextlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

for name in ("modal", "datasets", "dotenv", "swebench.harness.modal_eval"):
    sys.modules[name] = MagicMock()

from swebench.harness.constants import FAIL_ONLY_REPOS  # noqa: E402
from swebench.harness.grading import get_eval_report  # noqa: E402
from swebench.harness.log_parsers import PARSER_REGISTRY  # noqa: E402
from swebench.harness.utils import make_test_spec  # noqa: E402

START, END, CODE = ">>>>> Start Test Output", ">>>>> End Test Output", ">>>>> Test Exit Code"
STATUSES = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")
NAMES = (
    "tests/test_a.py::test_one", "tests/test_a.py::TestB::test_two[1-2]", "t/test_u.py::test_p[log(photon /s)]",
    "t/test_u.py::test_p[log(photon)]", "t/test_u.py::test_p[a b - c]", "t/test_u.py::test_x[/tmp/a/b.py]",
    "test_x (m.Case)", "test_y (m.Case)", "Words of a docstring, not a name.", "TestGo/sub", "suite > does it", "[100%]",
    "renders a <b>:", "module::case", "naïve ✓ test", "--version is equivalent to version",
)  # fmt: skip


def lines(rng: random.Random, name: str, status: str) -> list[str]:
    """Ways in which test frameworks say what became of a test."""
    good, skipped = status in ("PASSED", "XFAIL"), status == "SKIPPED"
    word = {"PASSED": "ok", "XFAIL": "expected failure", "SKIPPED": "skipped 'no'", "FAILED": "FAIL"}.get(
        status, "ERROR"
    )

    def choice(passed: str, failed: str, left_out: str) -> str:
        return left_out if skipped else passed if good else failed

    return rng.choice(
        [
            [f"{status} {name}"],
            [f"{status} {name} - AssertionError: no - really"],
            [f"\x1b[32m{status}\x1b[0m {name}"],
            [f"SKIPPED [3] {name}: no"],
            [f"{name} {status}"],
            [f"{name} ... {word}"],
            [f"{name} ... noise", word],
            [f"{name} ... Internal Server Error: /x/", "ok"],
            [f"{word.upper()}: {name}"],
            [f"{name} {choice('ok', 'F', 'E')}"],
            [f"____ {name}.py:{name} ____"],
            [f"--- {choice('PASS', 'FAIL', 'SKIP')}: {name} (0.01s)"],
            [f"[{choice('ok', 'err', 'skip')}]: {name} (3 ms)"],
            [f"{choice('PASS', 'FAIL', 'SKIP')}: {name}"],
            [f"{choice('pass', 'FAIL', 'skip')} {name}"],
            [f"[ {choice('OK', 'FAILED', 'SKIPPED')} ] {name} (1 ms)"],
            [f"test {name.replace(' ', '_')} ... {choice('ok', 'FAILED', 'ignored')}"],
            [f"Suite ({name})", f" {choice('✔', '✘', '↩')} {name}"],
            [f"  {choice('✓', '✕', '○')} {name} (12 ms)"],
            [f"  {choice('✓', '×', '↓')} {name} 12ms"],
            ["Starting browser Chrome", "    suite", f"      {choice('✔', '✖', '-')} {name}"],
            [f"{choice('PASS', 'FAIL', 'SKIP')} {name} (1.2 s)"],
            [f"{choice('ok', 'not ok', 'ok')} 3 {name}"],
            [f"[{choice('PASSED', 'FAILED', 'PENDING')}] {name}"],
            [f"+ mvn -Dtest={name.replace(' ', '_')}", f"[INFO] BUILD {choice('SUCCESS', 'FAILURE', 'SUCCESS')}"],
            [f"+ mvn -Dtest={name.replace(' ', '_')}"],
            [f" [junit] [{choice('PASS', 'FAIL', 'ERR')}] {name}"],
            [f"com.Test > {name.replace(' ', '_')}", choice("PASSED", "FAILED", "SKIPPED")],
            [f"{name}. = 0.01 s = {choice('.', 'F', 'S')}"],
            [f"{name} ....{choice('.', 'F', '-')}"],
            [f"test: {name}: {choice('.', 'F', 'O')}: (0.1)"],
            [f"{name} - {choice('passed', 'failed', 'pending')}"],
            [f"{choice('', '3) ', '')}{name}", f"  {choice('', '1) ', '')}{name}", "     AssertionError: x"],
            [f"Chrome 1.2 (Linux x86_64) {name} FAILED", "Executed 3 of 3"],
            [f"Chrome Headless 1.2 (Linux x86_64) {name} FAILED"],
            [f"case {name}: mismatch", "'case': ok"],
            ['<doctest><TestCase name="a"><SubCase name="b"><Expression success="true"/></SubCase></TestCase></doctest>'],
            ["+ ./node_modules/.bin/mocha tests/run.js --reporter json", '{"failures": [], "passes": [{"fullTitle": "a b"}]}'],
            ["+ ./node_modules/.bin/jest --x", "  suite", f"    {choice('✓', '✕', '○')} {name} (3ms)", "Test Suites: 1"],
            ["running 3 test files", "  suite", f"    {choice('✔', '2)', '-')} {name}", "  1 passing"],
            [f"[smoke] > {name} ... \x1b[{choice('32mok', '31mFAILED', '33mignored')}"],
            ["+ xvfb-run x", "Starting browser Chrome", "  suite", f"    {choice('✓', '✗', '-')} {name}", "TOTAL: 1"],
            ["Running: x)\n\n\n  suite", f"    {choice('✓', '1)', '-')} {name} (1"],
        ]
    )  # fmt: skip


EVIDENCE = (
    "Executed 0 of 0",
    "Executed 3 of 3",
    "4 passing",
    "0 passing",
    "Tests: 2",
    "5 specs, 0 failures",
    "x': ok",
    "# tests 0",
)


def generated(rng: random.Random, number: int, parser: str) -> dict[str, Any]:
    body: list[str] = []
    while len(body) < 400:  # until the parser has read something, or not
        for name in rng.sample(NAMES, rng.randint(1, 6)):
            status = rng.choice(STATUSES if rng.random() < 0.4 else ("PASSED",))
            body += lines(rng, name, status)
            if rng.random() < 0.1:
                body += lines(rng, name, rng.choice(STATUSES))
        if rng.random() < 0.1 or found(parser, "\n".join(body)):
            break
    if rng.random() < 0.08:
        body = []
    body += [rng.choice(EVIDENCE)] if rng.random() < 0.3 else []
    end = rng.choice(("\n",) * 9 + ("\r\n",))
    text = end.join(body)
    status = found(parser, text)
    marked = ["+ git checkout", rng.choice(("", "PASSED outside.py::test")), START, text, END]
    if rng.random() < 0.1:
        marked.remove(rng.choice((START, END)))
    if rng.random() < 0.05:
        marked.insert(
            rng.randint(0, len(marked)), rng.choice((START, END, ">>>>> Patch Apply Failed", ">>>>> Tests Timed Out"))
        )
    if rng.random() < 0.05:
        marked = [START, END, *body]
    if rng.random() < 0.8:
        marked.append(f"{CODE}: {rng.choice((0, 0, 0, 1, 137, -9))}")
    log = end.join(marked).encode() + rng.choice((b"\n", b"", b"\xff\xfe", "\u2028".encode(), b"\0", b"Killed\n"))
    passing = [name for name, word in status.items() if word in ("PASSED", "XFAIL")]
    kept = [name for name in status if status[name] != "FAILED" and status[name] != "ERROR"]
    anything = [*status, *NAMES]

    def pick(good: list[str]) -> list[str]:
        some = rng.sample(good, min(len(good), rng.randint(0, 3)))
        return some + (rng.sample(anything, 1) if rng.random() < 0.15 else [])

    def cut(name: str) -> str:
        is_cut = "[" in name and rng.random() < 0.3
        return name[: rng.randint(name.index("[") + 1, len(name) - 1)] if is_cut else name

    fail, keep = (
        [cut(name) for name in pick(passing)] or ["tests/test_a.py::test_one"],
        [cut(name) for name in pick(kept)],
    )
    written = json.dumps if rng.random() < 0.5 else list
    return {
        "instance_id": rng.choice((f"a__n-{number}", "a__n-2006", "a__n-9141", "a__n-8761")), "image": "i", "repo": "a/n",
        "version": rng.choice(("1.27", "9.5", "3.1", "1.0")), "log_parser": parser,
        "FAIL_TO_PASS": written(fail), "PASS_TO_PASS": written(keep),
        "eval_type": rng.choice(("pass_and_fail", "pass_and_fail", "fail_only")),
        "eval_script": "#!/bin/bash\nset -uxo pipefail\ncd /testbed\n: '>>>>> Start Test Output'\npytest\n: '>>>>> End Test Output'\n",
        "base_commit": "0" * 40, "patch": "x", "problem_statement": "s", "log": base64.b64encode(log).decode(),
    }  # fmt: skip


class Spec:
    version, instance_id = "1.0", "a__n-9141"


def found(parser: str, text: str) -> dict[str, str]:
    with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
        return dict(PARSER_REGISTRY[parser](text, Spec()))
    return {}


def verdict(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    log = folder / "test_output.txt"
    log.write_text(base64.b64decode(row["log"]).decode(errors="replace"), newline="")
    prediction = {"instance_id": row["instance_id"], "model_patch": "x", "model_name_or_path": "m"}
    spec = make_test_spec(row)
    try:
        report = get_eval_report(spec, prediction, log, include_tests_status=True)[row["instance_id"]]
    except Exception as error:  # the harness logs it and writes no report: not resolved
        return {"resolved": False, "error": type(error).__name__, "eval_script": spec.eval_script}
    passed = [test for kind in report.get("tests_status", {}).values() for test in kind["success"]]
    return {"resolved": report["resolved"], "passed": passed, "eval_script": spec.eval_script}


def main(count: int, seed: int) -> None:
    parsers = sorted(PARSER_REGISTRY)
    assert len(FAIL_ONLY_REPOS) == 6
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            row = generated(random.Random(f"{seed}/{number}"), number, parsers[number % len(parsers)])
            with contextlib.redirect_stdout(sys.stderr):
                official = verdict(row, Path(folder))
            print(json.dumps({"row": row, "official": official}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
