"""LiveCodeBench: rows to tasks, answers to files, verdicts against those that the official runner gave."""

import asyncio
import base64
import json
import os
import pickle
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from north_lightning.cli import main
from north_lightning.errors import ConfigError, DataError, NorthError
from north_lightning.harnesses import SingleAnswerHarness
from north_lightning.rollout.attempt import record_scripted
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import image_of, load_tasks
from north_lightning.tasks.live_code_bench import cases_of, import_live_code_bench
from north_lightning.types import AssistantAction, Grading, Message, Rollout, Task
from north_lightning.untrusted import load_pickled_text
from north_lightning.verifiers import UnitTestVerifier
from north_lightning.verifiers.live_code_bench import grade
from tests.tasks.answer_rows import FUNCTIONAL, STDIN, answers, case, live_code_bench_row, random_answers
from tests.tasks.official_code import live_code_bench_verdicts

PACKAGES = Path(np.__file__).parents[1]
VERDICTS = json.loads(Path(__file__).with_name("live_code_bench_verdicts.json").read_text())
DOUBLE = "print(int(input()) * 2)"


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def imported(tmp_path: Path) -> dict[str, Task]:
    file = write_rows(tmp_path / "rows.jsonl", STDIN, FUNCTIONAL)
    solutions = write_rows(tmp_path / "solutions.jsonl", {"question_id": "abc_a", "code": DOUBLE})
    import_live_code_bench([file], tmp_path / "tasks", solutions=solutions)
    return {task.id: task for task in load_tasks(tmp_path / "tasks")}


def attempt(task: Task, answer: str) -> Rollout:
    async def script(messages: object) -> AssistantAction:
        return AssistantAction(content=answer)

    verifier = UnitTestVerifier(packages=PACKAGES)
    verifier.check_task(task)
    return asyncio.run(
        record_scripted(
            task, SingleAnswerHarness(), script, sandboxes=BubblewrapProvider(), verifier=verifier, image_of=image_of
        )
    )


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_public_and_private_cases_of_a_row_are_a_tasks_tests(imported: dict[str, Task]) -> None:
    tests = json.loads((imported["abc_a"].directory / "tests" / "tests.json").read_text())
    assert tests["inputs"] == ["3\n", "4\n", "-1\n"]
    assert tests["outputs"] == ["6\n", "8\n", "-2\n"]
    assert tests["fn_name"] is None
    assert json.loads((imported["double"].directory / "tests" / "tests.json").read_text())["fn_name"] == "double"
    assert imported["abc_a"].verifier_timeout_s == 7 * 3 + 5 + 60


def test_private_tests_may_be_plain_json() -> None:
    row = STDIN | {"private_test_cases": json.dumps([case("4\n", "8\n")])}
    assert cases_of(row)["inputs"] == ["3\n", "4\n"]


def test_only_problems_of_the_range_of_dates_are_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        live_code_bench_row(f"q{day}", [case("1", "2")], [], contest_date=f"2024-08-0{day}T00:00:00")
        for day in range(1, 6)
    ]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    import_live_code_bench([file], tmp_path / "tasks", start_date="2024-08-02", end_date="2024-08-04")
    assert [task.id for task in load_tasks(tmp_path / "tasks")] == ["q2", "q3", "q4"]
    said = capsys.readouterr().out
    assert "3 tasks, contests of 2024-08-02 to 2024-08-04, 2 other problems left out" in said
    assert sha256(file.read_bytes()).hexdigest() in said


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "rows.jsonl", STDIN)
    digest = sha256(file.read_bytes()).hexdigest()
    words = ["tasks", "live_code_bench", f"--rows=[{file}]", f"--output_dir={tmp_path / 'tasks'}"]
    assert main([*words, f"--sha256=[{digest}]"]) == 0
    with file.open("a") as opened:
        opened.write("\n")
    assert main([*words, f"--sha256=[{digest}]"]) == 1
    assert "get the version of the data that was meant" in capsys.readouterr().err


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/never",)


@pytest.mark.parametrize(
    "value", [Runs(), ["text"], b"bytes", 3, None, ("text",), {"a": "text"}], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_of_anything_but_a_text_is_refused_and_not_loaded(value: object, protocol: int) -> None:
    with pytest.raises(DataError, match="expected a pickle of one text"):
        load_pickled_text(pickle.dumps(value, protocol))
    assert not Path("/tmp/never").exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("text", ["", "[1]", "ä\ud800\n'\"\\", "x" * 70_000])
def test_a_pickled_text_is_read_as_pickle_reads_it(text: str, protocol: int) -> None:
    data = pickle.dumps(text, protocol)
    assert load_pickled_text(data) == pickle.loads(data) == text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "at least one test"),
        ({"private_test_cases": "!"}, "private_test_cases"),
        ({"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps("[]"))[:-4]).decode()}, "complete"),
        ({"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Runs()))).decode()}, "pickle of one text"),
        ({"private_test_cases": "[3]"}, "list of tests"),
        ({"private_test_cases": json.dumps([case("1", "2", "functional")])}, "testtype"),
        ({"private_test_cases": '[{"input": 1, "output": "2", "testtype": "stdin"}]'}, "texts"),
        ({"contest_date": "soon"}, "contest_date"),
        ({"question_id": "../x"}, "question_id"),
        ({"question_content": ""}, "question_content"),
        ({"metadata": "{"}, "JSON"),
    ],
    ids=str,
)
def test_a_bad_row_is_an_error_of_its_column(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", STDIN | change)
    with pytest.raises(DataError, match=said) as caught:
        import_live_code_bench([file], tmp_path / "tasks")
    assert f"{file}:1" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"start_date": "yesterday"}, ConfigError),
        ({"start_date": "2025-01-01"}, DataError),
        ({"sha256": []}, ConfigError),
    ],
    ids=str,
)
def test_a_mistaken_option_is_refused(options: dict[str, Any], error: type[NorthError], tmp_path: Path) -> None:
    with pytest.raises(error, match=next(iter(options))):
        import_live_code_bench([write_rows(tmp_path / "rows.jsonl", STDIN)], tmp_path / "tasks", **options)


# ---- attempts ------------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_official_one(imported: dict[str, Task]) -> None:
    system, question = SingleAnswerHarness().prompt(imported["double"]).messages
    assert system == Message("system", imported["double"].metadata["system"])
    assert question.content.startswith("### Question:\nDouble the number.\n\n### Format: You will use the following")
    assert "```python\nclass Solution:\n" in question.content
    assert question.content.endswith("### Answer: (use the provided format with backticks)")


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        (f"Draft:\n```python\nprint(1)\n```\nBetter:\n```python\n{DOUBLE}\n```\nDone.", 1.0),
        (f"```\n{DOUBLE}\n```\nor\n```python\nprint(1)\n```", 0.0),
        (DOUBLE, 0.0),
        ("", 0.0),
    ],
)
def test_the_last_fenced_block_of_the_answer_is_graded(answer: str, reward: float, imported: dict[str, Task]) -> None:
    rollout = attempt(imported["abc_a"], answer)
    assert rollout.reward is not None
    assert (rollout.reward.value, rollout.stop_reason) == (reward, "finished")


def test_an_attempt_that_ends_before_its_answer_scores_0(imported: dict[str, Task], tmp_path: Path) -> None:
    rollout = Rollout("abc_a", "answer", "live_code_bench", 0, 0, 0, stop_reason="length")
    verifier = UnitTestVerifier(packages=PACKAGES)
    assert asyncio.run(verifier.verify(imported["abc_a"], rollout, tmp_path, BubblewrapProvider())).value == 0.0


CHEATS = {
    "reads what is expected": "import glob\nprint(*(open(f).read() for f in glob.glob('/tests/*')))",
    "writes a reward": "import os\nos.write(1, b'1')\nos.close(1)",
    "answers in the runner's place": "import os\nfor n in range(3, 9):\n    try:\n        os.write(n, b'2\\n{}' * 9)\n"
    "    except OSError:\n        pass",
    "floods": "while True:\n    print('6' * 10**6)",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name == "floods")) for name in CHEATS])
def test_a_cheat_passes_no_test(name: str, imported: dict[str, Task], tmp_path: Path) -> None:
    task = imported["abc_a"]
    tests = json.loads((task.directory / "tests" / "tests.json").read_text())
    verdict = asyncio.run(grade(tests, CHEATS[name], tmp_path, BubblewrapProvider(), "/usr/bin/python3", PACKAGES))
    assert verdict.value == 0.0


def test_the_verifier_is_refused_without_the_packages_that_answers_need(imported: dict[str, Task]) -> None:
    with pytest.raises(ConfigError, match="verifier.packages: expected a directory with numpy"):
        UnitTestVerifier().check_task(imported["abc_a"])


def test_newer_official_runners_let_answers_read_the_buffer(tmp_path: Path) -> None:
    tests = {"inputs": ["3\n"], "outputs": ["6"], "fn_name": None}
    code = "import sys\nprint(int(sys.stdin.buffer.readline()) * 2)"
    for buffer in (False, True):
        row = tests | {"stdin_buffer": buffer}
        verdict = asyncio.run(grade(row, code, tmp_path, BubblewrapProvider(), "/usr/bin/python3", PACKAGES))
        assert verdict.solved is buffer


def test_a_solution_given_at_import_is_the_tasks_gold_solution(imported: dict[str, Task]) -> None:
    script = (imported["abc_a"].directory / "solution" / "solve.sh").read_text()

    async def gold() -> float:
        sandbox = await BubblewrapProvider().open(image_of(imported["abc_a"]))
        try:
            assert (await sandbox.run(script, 10)).exit_code == 0
            code = (await sandbox.run("cat solution.py", 10)).output
        finally:
            await sandbox.close()
        tests = json.loads((imported["abc_a"].directory / "tests" / "tests.json").read_text())
        verdict = await grade(tests, code, image_of(imported["abc_a"]), BubblewrapProvider(), "/usr/bin/python3", None)
        return verdict.value

    assert asyncio.run(gold()) == 1.0


# ---- verdicts ------------------------------------------------------------------------------------------------------


async def verdicts(rows: list[dict[str, Any]], image: Path, grading: Grading) -> list[bool]:
    limit = asyncio.Semaphore(4)

    async def one(row: dict[str, Any]) -> bool:
        async with limit:
            where = (image, BubblewrapProvider(), "/usr/bin/python3", PACKAGES)
            return (await grade(row["tests"], row["code"], *where, grading)).solved is True

    return list(await asyncio.gather(*map(one, rows)))


def check_disagreements(rows: list[dict[str, Any]], image: Path, grading: Grading) -> None:
    """Official grading never disagrees; strict grading does on all planted rows, and on others of its kinds only."""
    found = asyncio.run(verdicts(rows, image, grading))
    disagreed = [row for row, verdict in zip(rows, found, strict=True) if verdict != row["official"]]
    if grading == "official":
        assert disagreed == []
    assert [row for row in disagreed if not is_of_a_strict_kind(row)] == []
    planted = [row for row in rows if row["name"].startswith("strict: ")]
    assert grading == "official" or all(row in disagreed for row in planted)


def is_of_a_strict_kind(row: dict[str, Any]) -> bool:
    """Whether the code does what strict grading judges otherwise, or may: its value is not what JSON makes of it."""
    if row["name"].startswith("strict: "):
        return True
    said = row["code"].rpartition("return ")[2]
    try:
        value = eval(said, {"__builtins__": {}})
    except Exception:
        return row["tests"]["fn_name"] is not None and any(word in said for word in NOT_JSON)
    plain = json.loads(json.dumps(value, default=repr))
    return row["tests"]["fn_name"] is not None and (list(value) if isinstance(value, tuple) else value) != plain


NOT_JSON = (
    "numpy",
    "Decimal",
    "Fraction",
    "set",
    "range",
    "map",
    "iter",
    "deque",
    "namedtuple",
    "keys",
    "lambda",
    "memo",
)


@pytest.mark.parametrize("grading", ["official", "strict"])
def test_verdicts_are_those_of_the_official_runner(grading: Grading, tmp_path: Path) -> None:
    kinds = [row for row in VERDICTS if row["name"].startswith("strict: ") and "alarm" not in row["name"]]
    rows = [*VERDICTS[:: 14 if grading == "strict" else 7], *kinds]
    assert {row["official"] for row in rows} == {True, False}
    check_disagreements(rows, tmp_path, grading)


@pytest.mark.long
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("grading", ["official", "strict"])
def test_two_thousand_verdicts_are_those_of_the_official_runner(grading: Grading, part: int, tmp_path: Path) -> None:
    """In parts, because a test has a time limit: all take twenty minutes on a busy machine."""
    rows = answers()
    rows = (rows + random_answers(2000 - len(rows), 1))[part::5]
    official = live_code_bench_verdicts(rows, tmp_path)
    rows = [row | {"official": verdict} for row, verdict in zip(rows, official, strict=True)]
    assert 100 < sum(official) < 300
    (tmp_path / "work").mkdir()
    check_disagreements(rows, tmp_path / "work", grading)
