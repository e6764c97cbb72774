"""``predict`` keeps what the verifier passes, and loses nothing when killed; ``test`` asks servers from a config.

The model is a program behind a real HTTP server that speaks the chat protocol; sandboxes and verifier are real.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import yaml

sys.path.append(str(Path(__file__).parent / "harnesses"))

from peers.scripted_server import ScriptedServer

from north_lightning import cli
from north_lightning.data import read_samples
from north_lightning.data.dedup import Identical
from north_lightning.data.filters import NothingToTrain
from north_lightning.errors import ConfigError
from north_lightning.evaluation.attempts import Attempt
from north_lightning.rollout import ChatServer
from north_lightning.synthesis import KeptSamples, SynthesisModule, TaskDataModule, summarise
from north_lightning.tasks import load_tasks, solution_steps, write_task
from north_lightning.tasks.software import software_task
from north_lightning.tasks.terminal import terminal_task
from north_lightning.types import Conversation, Message

ROOT = Path(__file__).parent.parent


class SolverServer(ScriptedServer):
    """Solves tasks as their scripted solution does, from the ``first_success``-th attempt on; before, it gives up.

    A request for a task whose number of attempts has reached ``stalls`` waits until ``go_on`` is set.
    """

    def __init__(self, tasks, first_success=None, stalls=None):
        super().__init__([])
        self.solutions = {task.instruction: (task.id, solution_steps(task)) for task in tasks}
        self.first_success = first_success or {}
        self.stalls = stalls or {}
        self.go_on, self.stalled = threading.Event(), threading.Event()
        self.attempts: Counter[str] = Counter()

    def turn_for(self, body, number):
        said = next(m["content"] for m in body["messages"] if m["role"] == "user")
        task, steps = next(found for instruction, found in self.solutions.items() if instruction in said)
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        if turn == 0:
            self.attempts[task] += 1
            if self.attempts[task] == self.stalls.get(task):
                self.stalled.set()
                self.go_on.wait(180)
        gives_up = self.attempts[task] < self.first_success.get(task, 1)
        if turn >= len(steps) or gives_up:
            return {"content": "Done.", "reasoning_content": "Nothing is left."}
        return {"content": f"Step {turn}.", "tool_calls": [steps[turn]]}


@pytest.fixture
def tasks(tmp_path):
    write_task(software_task(0, 0, "train"), tmp_path / "tasks")
    for index in range(3):
        write_task(terminal_task(index, 0, "train"), tmp_path / "tasks")
    return load_tasks(tmp_path / "tasks")


ROLLOUTS = {
    "harnesses": {
        "terminal": {"class_path": "north_lightning.harnesses.ReActTerminalHarness"},
        "swe": {"class_path": "north_lightning.harnesses.SWEAgentHarness"},
    },
    "verifier": {"class_path": "north_lightning.verifiers.UnitTestVerifier"},
    "sandboxes": {"class_path": "north_lightning.sandbox.BubblewrapProvider"},
    "max_turn_tokens": 100,
    "max_context_tokens": 1000,
}


def write_config(tmp_path, server, **model) -> str:
    """The shipped config with this server, these tasks and less of everything."""
    config = yaml.safe_load((ROOT / "configs/north_mini/synthesise.yaml").read_text())
    config["trainer"]["default_root_dir"] = str(tmp_path / "out")
    config["model"]["init_args"] |= {
        "output_dir": str(tmp_path / "out"),
        "server": {"url": server.url, "model": "scripted"},
        "rollouts": ROLLOUTS,
        "num_samples": 3,
        "max_per_task": 1,
        "concurrency": 2,
        **model,
    }
    config["data"]["init_args"] = {"task_sets": [str(tmp_path / "tasks")]}
    path = tmp_path / "synthesise.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predict_keeps_the_first_verified_attempt_at_each_task_and_accounts_for_the_others(tmp_path, tasks, capfd):
    second, never = tasks[1].id, tasks[2].id
    with SolverServer(tasks, {second: 2, never: 9}) as server:
        assert cli.main(["predict", "--config", write_config(tmp_path, server)]) == 0
        assert server.attempts == {tasks[0].id: 1, second: 2, never: 3, tasks[3].id: 1}
        samples = list(read_samples(tmp_path / "out" / "samples.jsonl"))
        asked = len(server.requests)
        assert cli.main(["predict", "--config", write_config(tmp_path, server)]) == 0
        assert len(server.requests) == asked, "the second run asks only for what the first has not made"
    assert [one.task_id for one in samples] == sorted(task.id for task in tasks if task.id != never)
    assert all(one.verified and one.tools and one.messages[-1].role == "assistant" for one in samples)
    assert {one.harness for one in samples} == {"react_terminal", "swe_agent"}
    assert next(m for m in samples[0].messages if m.role == "assistant").reasoning == "Step 0."
    assert list(read_samples(tmp_path / "out" / "samples.jsonl")) == samples
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {key: summary[key] for key in ("attempted", "failed", "verified", "kept")} == {
        "attempted": 7, "failed": 0, "verified": 3, "kept": 3,
    }  # fmt: skip
    assert summary["by_harness"]["swe_agent"] == {"attempted": 1, "failed": 0, "verified": 1, "kept": 1}
    assert sum(counts["kept"] for counts in summary["by_family"].values()) == 3
    assert "verified but dropped: none" in capfd.readouterr().out


def test_a_killed_predict_goes_on_with_what_it_has_not_finished(tmp_path, tasks):
    last = tasks[3].id
    with SolverServer(tasks, stalls={last: 1}) as server:
        config = write_config(tmp_path, server, concurrency=1)
        command = [sys.executable, "-m", "north_lightning", "predict", "--config", config]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
        assert server.stalled.wait(180)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        server.go_on.set()
        assert len(lines(tmp_path / "out" / "attempts.jsonl")) == 3
        for name in ("attempts", "verified"):
            with (tmp_path / "out" / f"{name}.jsonl").open("a") as file:
                file.write('{"torn')
        assert cli.main(["predict", "--config", config]) == 0
    assert server.attempts == {task.id: 1 + (task.id == last) for task in tasks}
    assert [s.task_id for s in read_samples(tmp_path / "out" / "samples.jsonl")] == sorted(task.id for task in tasks)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["attempted"] == 4


def test_test_evaluates_a_server_from_the_command_line(tmp_path, tasks, capfd):
    with SolverServer(tasks, {tasks[2].id: 9}) as server:
        config = {
            "servers": {"other": {"url": server.url, "model": "scripted"}},
            "task_sets": [str(tmp_path / "tasks")],
            "output_dir": str(tmp_path / "eval"),
            "num_samples": 2,
            "rollouts": ROLLOUTS,
        }
        (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config))
        assert cli.main(["test", "--config", str(tmp_path / "eval.yaml")]) == 0
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    assert summary["checkpoints"]["other"]["pass@1"] == 0.75
    assert len(lines(tmp_path / "eval" / "attempts.jsonl")) == 8
    assert "75.0%" in capfd.readouterr().out


# ---- parts ---------------------------------------------------------------------------------------------------------


def sample(words: str, task: str = "t") -> Conversation:
    return Conversation((Message("user", "hi"), Message("assistant", words)), task_id=task, harness="react_terminal")


def test_enough_identical_and_faulty_samples_are_dropped_for_their_reasons_and_the_same_after_a_restart(tmp_path):
    def kept():
        return KeptSamples(tmp_path / "verified.jsonl", [NothingToTrain(), Identical()], 2)

    first = kept()
    for one in (sample("a"), sample("a"), sample(""), sample("b"), sample("c"), sample("a", "u")):
        first.add(one)
    for samples in (first, kept()):
        assert samples.samples() == [sample("a"), sample("b")]
        assert samples.fit.dropped == {"identical": 2, "nothing_to_train": 1, "enough_of_task": 1}


def test_an_attempt_with_an_invalid_turn_is_counted_and_not_kept():
    identity = ("model", "w", "t", "d", "terminal", "words", "react_terminal-0")
    solved = Attempt(*identity, seed=0, reward=1.0, solved=True, invalid_turns=1)
    failed = Attempt(*identity, seed=1, reward=None, error="SandboxError: no")
    summary = summarise([solved, failed], [], Counter())
    assert (summary["attempted"], summary["failed"], summary["verified"], summary["kept"]) == (2, 1, 1, 0)
    assert summary["dropped"] == {"invalid_turn": 1}


def test_settings_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="either a server, or a checkpoint with a sidecar"):
        SynthesisModule(tmp_path, None)
    with pytest.raises(ConfigError, match="max_per_task: expected 1 to num_samples, 8, got 0"):
        SynthesisModule(tmp_path, None, ChatServer("http://localhost", "m"), max_per_task=0)
    with pytest.raises(ConfigError, match="tasks_at_once"):
        TaskDataModule([], 0)
