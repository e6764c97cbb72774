"""SciCode: rows to tasks, chains of answers, and verdicts against those of its own code."""

import asyncio
import base64
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import north_lightning.verifiers
from north_lightning.errors import DataError
from north_lightning.harnesses import SingleAnswerHarness
from north_lightning.rollout.attempt import record_scripted
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import image_of, load_task, load_tasks
from north_lightning.tasks.scicode import extract_function, import_scicode
from north_lightning.types import AssistantAction, Grading, Message, Reward, Rollout, Task
from north_lightning.verifiers import UnitTestVerifier
from tests.tasks.official_code import scicode_verdicts
from tests.tasks.scicode_rows import CLOSE, DEPENDENCIES, STRICT_CODES, problem, steps

h5py = pytest.importorskip("h5py")
pytest.importorskip("scipy")

PACKAGES = Path(np.__file__).parents[1]
RUNNERS = Path(north_lightning.verifiers.__file__).parent
BLOCK = "def __init__(self):\n        self.n = 3.0"
CLASS = f"class Block:\n    {BLOCK}\n\n    def double(self):\n        return 2 * self.n"


def saved(path: Path, row: dict[str, Any], *values: float) -> Path:
    """``test_data.h5`` for a row whose steps expect these numbers, in every test."""
    with h5py.File(path, "w") as file:
        for step, value in zip(row["sub_steps"], values, strict=True):
            for number in range(len(step["test_cases"])):
                file[f"{step['step_number']}/test{number + 1}/var1"] = value
    return path


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chain(folder: Path, **options: Any) -> Task:
    """Three steps; the last two use the first."""
    row = problem([{"test": CLOSE}, {"test": CLOSE.replace("f()", "g()"), "repeat": 2}, {"test": CLOSE}])
    data = saved(folder / "test_data.h5", row, 3.0, 6.0, 9.0)
    import_scicode([write(folder / "rows.jsonl", row)], data, folder / "tasks", **options)
    return load_tasks(folder / "tasks")[0]


def attempt(task: Task, answers: list[str]) -> Rollout:
    said: list[str] = []

    async def script(messages: list[Message]) -> AssistantAction:
        said.append(messages[-1].content)
        return AssistantAction(content=answers[len(said) - 1])

    verifier = UnitTestVerifier(packages=PACKAGES)
    verifier.check_task(task)
    return asyncio.run(
        record_scripted(
            task, SingleAnswerHarness(), script, sandboxes=BubblewrapProvider(), verifier=verifier, image_of=image_of
        )
    )


def fenced(code: str) -> str:
    return f"Here:\n```python\nimport numpy as np\n{code}\n```\nand ```more```"


F, G, H = "def f():\n    return 3.0", "def g():\n    return 2 * f()", "def f():\n    return 9.0"


def test_each_step_is_a_turn_with_the_code_before_it_and_is_graded_by_its_own_tests(tmp_path: Path) -> None:
    rollout = attempt(chain(tmp_path), [fenced(F), fenced("def g():\n    return 7"), fenced(H)])
    asked = [message.content for message in rollout.messages if message.role == "user"]
    assert len(asked) == 3
    assert F not in asked[0]
    assert "Step 1.\nBackground of step 1.\n\n" in asked[1]
    assert asked[1].index("Step 1.") < asked[1].index(F) < asked[1].index("NEXT STEP")
    assert asked[2].index(F) < asked[2].index("------") < asked[2].index("Step 2.")
    assert "def g():\n    return 7" in asked[2]
    reward = rollout.reward
    assert reward is not None
    assert (reward.value, reward.solved) == (pytest.approx(2 / 3), False)
    assert reward.details["passed"] == ["90.1", "90.3"]
    assert reward.details["extraction"] == "extract"
    assert reward.numbers == {"reward": reward.value, "steps_passed": 2.0, "steps": 3.0}


def test_all_steps_solved_is_the_problem_solved_and_a_wrong_first_step_fails_those_that_use_it(tmp_path: Path) -> None:
    task = chain(tmp_path)
    right, wrong = (
        attempt(task, [fenced(first), fenced(G), fenced(H)]).reward for first in (F, "def f():\n    return 4")
    )
    assert right is not None
    assert (right.value, right.solved) == (1.0, True)
    assert wrong is not None
    assert wrong.details["passed"] == ["90.3"]


CHEATS = (
    STRICT_CODES[0],
    "def f():\n    import h5py\n    return h5py.File('/tests/targets.h5')['90.1/test1/var1'][()]",
    "def f():\n    import h5py\n    return h5py.File('/logs/verifier/targets.h5')['90.1/test1/var1'][()]",
    "open('/logs/verifier/reward.json', 'w').write('{\"reward\": 1}')",
    "open('/logs/verifier/results', 'a').write('90.1\\n')\nraise ValueError",
    "open('/tests/problem.json', 'w').write('{}')",
    "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
)


@pytest.mark.parametrize(
    "cheat", [pytest.param(one, marks=[pytest.mark.long] * (n % 5 != 0)) for n, one in enumerate(CHEATS)]
)
def test_a_cheat_solves_no_step(cheat: str, tmp_path: Path) -> None:
    reward = attempt(chain(tmp_path), [fenced(cheat).replace("import numpy as np\n", "")] * 3).reward
    assert reward is not None
    assert reward.value == 0.0


@pytest.mark.parametrize(
    ("extraction", "code"), [("extract", "def __init__(self):\n    self.n = 3.0"), ("verbatim", CLASS)]
)
def test_a_given_step_is_not_asked_and_extraction_loses_its_class(extraction: Any, code: str, tmp_path: Path) -> None:
    row = problem([{"test": CLOSE}] * 2, "62")
    row["sub_steps"][0] |= {"function_header": f"class Block:\n    {BLOCK}", "test_cases": []}
    data = saved(tmp_path / "test_data.h5", row, 3.0, 6.0)
    given = tmp_path / "given"
    given.mkdir()
    (given / "62.1.txt").write_text(CLASS)
    import_scicode([write(tmp_path / "rows.jsonl", row)], data, tmp_path / "tasks", extraction, given)
    task = load_task(tmp_path / "tasks" / "scicode-62")
    assert (task.max_turns, task.family) == (1, f"scicode_{extraction}")
    assert code in task.instruction
    reward = attempt(task, [fenced("def f():\n    return Block().double()")]).reward
    assert reward is not None
    assert reward.solved is (extraction == "verbatim")


DRIVER = """
import json, os, sys
import apart, h5py, scicode_runner
folder = apart.LOGS = sys.argv[1]
given = json.load(open(f"{folder}/steps.json"))
for name in ("expected", "secrets", "results"):
    with open(f"{folder}/{name}", "w") as file:
        file.writelines(f"{number}\\n" for number in range(1, len(given["steps"]) + 2) if name != "results")
os.link(f"{folder}/results", f"{folder}/verdicts")
judge = apart.Judge()
with h5py.File(f"{folder}/test_data.h5") as file:
    for number, step in enumerate(given["steps"], 1):
        targets = scicode_runner.read_targets(file, f"90.{number}", 1)
        work = (given["dependencies"], [step["code"]], [step["test"]], targets)
        scicode_runner.run_apart(judge, sys.argv[2] == "official", str(number), *work)
judge.end()
"""


def strict(found: list[dict[str, Any]], grading: Grading) -> list[int]:
    """Numbers of the steps that this grading judges otherwise than the official code."""
    return [n for n, one in enumerate(found, 1) if grading == "strict" and one["code"] in STRICT_CODES]


def disagreements(folder: Path, official: list[bool], grading: Grading) -> list[int]:
    """Numbers of the steps in ``folder`` on which our runner says something else."""
    driver = folder / "driver.py"
    driver.write_text(f"import sys\nsys.path.insert(0, {str(RUNNERS)!r})\n{DRIVER}")
    subprocess.run([sys.executable, driver, folder, grading], cwd=folder, capture_output=True)
    passed = {line for line in (folder / "verdicts").read_text().splitlines() if not line.startswith("!")}
    return [number for number, verdict in enumerate(official, 1) if verdict != (str(number) in passed)]


@pytest.mark.parametrize("grading", ["official", "strict"])
def test_verdicts_are_those_of_the_official_code(grading: Grading, tmp_path: Path) -> None:
    recorded = json.loads(Path(__file__).with_name("scicode_verdicts.json").read_text())
    official = recorded["official"]
    found = {"steps": steps(len(official), 0), "dependencies": DEPENDENCIES}
    (tmp_path / "steps.json").write_text(json.dumps(found))
    (tmp_path / "test_data.h5").write_bytes(zlib.decompress(base64.b64decode(recorded["test_data"])))
    assert set(official) == {True, False}
    assert disagreements(tmp_path, official, grading) == strict(found["steps"], grading)


@pytest.mark.long
@pytest.mark.parametrize("part", range(5))
@pytest.mark.parametrize("grading", ["official", "strict"])
def test_two_thousand_verdicts_are_those_of_the_official_code(grading: Grading, part: int, tmp_path: Path) -> None:
    """In parts, because a test has a time limit."""
    found = steps(2000, 1)[part::5]
    official = scicode_verdicts(found, tmp_path)
    assert 40 < sum(official) < 360
    assert disagreements(tmp_path, official, grading) == strict(found, grading)


def test_the_official_extraction_of_the_published_headers() -> None:
    assert extract_function("def g(): pass\ndef f(x):\n    return  x", "def f(x):\n    '''class K('''") == (
        "def f(x):\n    return x"
    )
    assert (
        extract_function(CLASS, "class Block(object):\n    pass").replace("\n    \n", "\n\n").split() == CLASS.split()
    )
    with pytest.raises(DataError, match="function_header"):
        extract_function(CLASS, "x = 3")


def test_ground_truth_code_is_the_gold_solution(tmp_path: Path) -> None:
    row = problem([{"test": CLOSE}] * 2)
    for step, code in zip(row["sub_steps"], (F, H), strict=True):
        step["ground_truth_code"] = code
    data = saved(tmp_path / "test_data.h5", row, 3.0, 9.0)
    import_scicode([write(tmp_path / "rows.jsonl", row)], data, tmp_path / "tasks")
    task = load_task(tmp_path / "tasks" / "scicode-90")

    async def verdict(script: str) -> Reward:
        sandbox = await BubblewrapProvider().open(image_of(task))
        try:
            await sandbox.run(script, 10)
            await sandbox.snapshot(tmp_path / "left")
        finally:
            await sandbox.close()
        rollout = Rollout(task.id, task.environment, task.family, 0, 0, 0)
        return await UnitTestVerifier(packages=PACKAGES).verify(task, rollout, tmp_path / "left", BubblewrapProvider())

    gold = asyncio.run(verdict((task.directory / "solution" / "solve.sh").read_text()))
    assert gold.value == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"problem_id": "../x"}, "problem_id"),
        ({"required_dependencies": ""}, "required_dependencies"),
        ({"sub_steps": []}, "sub_steps"),
        ({"sub_steps": [{"step_number": "90.1", "test_cases": []}]}, "test_cases"),
        ({"sub_steps": problem([{"test": CLOSE}], "91")["sub_steps"]}, "test_data: expected a group 91.1/test1"),
        ({"sub_steps": problem([{"test": CLOSE}] * 2, "76")["sub_steps"][1:]}, "test_data"),
        ({"sub_steps": problem([{"test": CLOSE}], "62")["sub_steps"]}, "given: expected a directory with 62.1.txt"),
    ],
    ids=str,
)
def test_a_bad_row_is_an_error_of_its_column(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    row = problem([{"test": CLOSE}])
    data = saved(tmp_path / "test_data.h5", row, 3.0)
    with pytest.raises(DataError, match=said):
        import_scicode([write(tmp_path / "rows.jsonl", row | change)], data, tmp_path / "tasks")
