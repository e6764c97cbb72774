"""What ``results`` writes is what the other tools' own packages read.

``tests/fixtures/interchange`` holds what it wrote for three attempts. In the long test Inspect and Harbor, installed in
environments of their own, load these files; the short one compares them with what is written now.
"""

import asyncio
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_regrade import MODEL, SolvingRunner

from north_lightning.cli import main
from north_lightning.data import SampleFilter, SampleReader
from north_lightning.data.formats import Trajectories
from north_lightning.evaluation.attempts import Attempt, append_attempts
from north_lightning.evaluation.evaluate import run_attempts
from north_lightning.evaluation.works import Works
from north_lightning.rollout import ScriptedPolicy, script_of_calls
from north_lightning.rollout.records import rollout_of
from north_lightning.tasks import load_task, write_task
from north_lightning.tasks.harbor import TaskSource
from north_lightning.types import Message, Reward, Rollout, ToolCall, Turn

FIXTURES = Path(__file__).parents[1] / "fixtures" / "interchange"


def write_evaluation(folder: Path) -> None:
    """An attempt that solved its task, one that did not, one that failed outside the model."""
    rollout = Rollout("task-a", "terminal", "copies", 1, 0, 5, duration_s=2.5, reward=Reward(1.0))
    calls = (ToolCall("0", "bash", {"command": "ls"}), ToolCall("1", "bash", {"command": "cp a b"}))
    rollout.messages = [
        Message("system", "You act."),
        Message("user", "Copy a to b."),
        Message("assistant", "", "First a look.", calls),
        Message("tool", "a", tool_call_id="0"),
        Message("tool", "", tool_call_id="1"),
        Message("assistant", "Done."),
    ]
    rollout.turns = [Turn(4, 9, "stop"), Turn(12, 14, "stop")]
    Works(folder / "works").keep_rollout("kept-a", rollout)
    (folder / "works" / "kept-a.tar.gz").write_bytes(b"")
    common: dict[str, Any] = {
        "checkpoint": "rl", "weights": "w0", "task": "t", "environment": "terminal", "harness": "react-1",
        "verifier": "V", "grader": "V",
    }  # fmt: skip
    solved = {"turns": 2, "generated_tokens": 7, "stop_reason": "finished", "duration_s": 2.5}
    attempts = [
        Attempt(**common, task_id="task-a", family="copies", seed=0, reward=1.0, solved=True, kept="kept-a", **solved),
        Attempt(**common, task_id="task-b", family="moves", seed=0, reward=0.0, stop_reason="max_turns", turns=9),
        Attempt(**common, task_id="task-c", family="moves", seed=0, reward=None, error="SandboxError: no sandbox"),
        Attempt(**common, task_id="task-b", family="moves", seed=0, reward=None, error="SamplerError: 429"),
    ]
    append_attempts(folder / "attempts.jsonl", attempts)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write_evaluation(tmp_path / "eval")
    arguments = ["--evaluation", f"{tmp_path / 'eval'}", "--output_dir", f"{tmp_path / 'out'}", "--dataset", "own/er"]
    assert main(["results", *arguments, "--benchmark", "three tasks"]) == 0
    return tmp_path / "out"


def test_what_is_written_is_what_other_packages_have_read(written: Path) -> None:
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert [str(path) for path in files] == [
        "atif/rl/task-a-0.json", "inspect/rl.json", "rl/.eval_results/results.yaml",
    ]  # fmt: skip
    dated = re.compile(r"20\d\d-\d\d-\d\d(T[\d:+]+)?|(?<=north_lightning )[\d.]+|(?<=version\": \")[\d.]+(?=\")")
    for file in files:
        expected = (FIXTURES / file.name).read_text()
        assert dated.sub("", (written / file).read_text()) == dated.sub("", expected), file


@pytest.mark.parametrize(("file", "kind"), [("atif/rl/task-a-0.json", "atif"), ("inspect/rl.json", "inspect")])
def test_what_is_written_is_read_back_as_it_was(written: Path, tmp_path: Path, file: str, kind: str) -> None:
    importer = Trajectories()
    sample, *others = SampleReader([written / file], importer)
    rollout = rollout_of(Works(tmp_path / "eval" / "works").read_record("kept-a"))
    assert list(sample.messages) == rollout.messages
    assert (sample.harness, sample.task_id, sample.verified) == ("react-1", "task-a", True)
    assert [other.verified for other in others] == ([False, None] if kind == "inspect" else [])
    assert [SampleFilter().passes(one) for one in (sample, *others)] == [True, *[False] * len(others)]
    assert importer.account()["not_understood"] == {}
    assert list(importer.account()["formats"]) == [kind]


def test_a_prediction_applied_to_the_base_is_what_the_attempt_left(tmp_path: Path) -> None:
    source = TaskSource(
        name="owner__repo-1",
        environment="terminal",
        family="swe_bench",
        instruction="Change it.",
        files={"a.py": "one\ntwo\n", "b.py": "gone\n", ".gitignore": "*.log\n"},
        tests={"test.sh": "echo 1 >/logs/verifier/reward.txt\n"},
        solve_script="",
        steps=(("bash", {"command": ""}),),
        max_turns=3,
        git=True,
    )
    task = load_task(write_task(source, tmp_path / "tasks"))

    class Editing(SolvingRunner):
        def make_policy(self, rollout: Rollout) -> ScriptedPolicy:
            command = "rm b.py; echo three >> a.py; mkdir c; printf '\\0x' > c/d; chmod +x a.py; echo x > run.log"
            return ScriptedPolicy(script_of_calls([(tool.name, {next(iter(tool.parameters["properties"])): command})]))

    tool = Editing([task]).harnesses["terminal"].prompt(task).tools[0]
    folder = tmp_path / "eval"
    works = Works(folder / "works")
    asyncio.run(run_attempts(Editing([task]), [task], MODEL, 2, folder / "attempts.jsonl", works=works))
    arguments = [
        "--evaluation",
        f"{folder}",
        "--output_dir",
        f"{tmp_path / 'out'}",
        "--task_sets",
        f"[{tmp_path}/tasks]",
    ]
    assert main(["results", *arguments]) == 0
    (line,) = (tmp_path / "out" / "predictions" / "model-0-1.jsonl").read_text().splitlines()
    prediction = json.loads(line)
    assert prediction.keys() == {"instance_id", "model_name_or_path", "model_patch"}
    tree = tmp_path / "tree"
    shutil.copytree(task.directory / "environment" / "files", tree)
    subprocess.run(["git", "apply", "-"], input=prediction["model_patch"], text=True, cwd=tree, check=True)
    left = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file() and ".git" not in path.parts}
    assert left == {"a.py", "c/d", ".gitignore"}
    assert (tree / "a.py").read_text() == "one\ntwo\nthree\n"
    assert (tree / "a.py").stat().st_mode & 0o111
    assert (tree / "c" / "d").read_bytes() == b"\0x"


INSPECT = """
import sys
from inspect_ai.log import read_eval_log
log = read_eval_log(sys.argv[1])
assert (log.status, log.eval.model, log.eval.task) == ("success", "rl", "three tasks")
assert log.results.scores[0].metrics["pass@1"].value == 0.5
samples = {one.id: one for one in log.samples}
assert samples["task-a"].scores["solved"].value == "C" and samples["task-b"].scores["solved"].value == "I"
assert samples["task-c"].error.message.startswith("SandboxError")
roles = [one.role for one in samples["task-a"].messages]
assert roles == ["system", "user", "assistant", "tool", "tool", "assistant"], roles
assert samples["task-a"].messages[2].tool_calls[1].arguments == {"command": "cp a b"}
assert samples["task-a"].messages[2].content[0].reasoning == "First a look."
"""
HARBOR = """
import json, sys
from harbor.models.trajectories import Trajectory
read = Trajectory.model_validate(json.load(open(sys.argv[1])))
assert [step.source for step in read.steps] == ["system", "user", "agent", "agent"]
assert read.steps[2].observation.results[0].content == "a"
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "python", "program", "file"),
    [("inspect-ai==0.3.285", "3.11", INSPECT, "rl.json"), ("harbor==0.25.0", "3.12", HARBOR, "task-a-0.json")],
)
def test_their_own_packages_load_it(package: str, python: str, program: str, file: str, tmp_path: Path) -> None:
    interpreter = sys.executable if python == "3.11" else shutil.which(f"python{python}")
    if interpreter is None:
        pytest.skip(f"{package} needs Python {python}")
    subprocess.run([interpreter, "-m", "venv", tmp_path / "own"], check=True)
    own = tmp_path / "own" / "bin" / "python"
    subprocess.run([own, "-m", "pip", "install", "-q", package], check=True)
    subprocess.run([own, "-c", program, FIXTURES / file], check=True)
