"""One evaluation with planted faults, by the command itself: none of them is scored, as wrong or as right.

Beside honest attempts: a server that answers 429, a disk that is full when an attempt is graded, a machine that
kills a process of an attempt and one of a grader for want of memory, and tests that never end. Each is retried,
recorded as an error, and graded or attempted again by the same command once the fault is gone.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from north_lightning.evaluation.attempts import Attempt, read_attempts

REWARD = "if [ -e /work/done ]; then echo 1; else echo 0; fi >/logs/verifier/reward.txt\n"
ALLOCATE = "python3 -c \"x = b'x' * (1200 << 20)\""
TASKS = {  # commands of the attempt, tests/test.sh
    "solved": ("touch done", REWARD),
    "unsolved": ("true", REWARD),
    "hangs its own tests": ("ln -s /dev/zero answer", "[ ! -L answer ] || cat answer >/dev/null\n" + REWARD),
    "limited": ("touch done", REWARD),
    "attempt killed": (f"{ALLOCATE} && touch done", REWARD),
    "tests killed": ("touch done", f"{ALLOCATE} || rm -f /work/done\n{REWARD}"),
    "grader hangs": ("touch done", "sleep 1000\n"),
}
SCORED = {"solved": 1.0, "unsolved": 0.0, "hangs its own tests": 0.0}
ERRORS = {
    "limited": "SamplerError: .*status 429",
    "attempt killed": "SandboxError: the machine ran out of memory",
    "tests killed": "SandboxError: the machine ran out of memory",
    "grader hangs": "VerifierError: .*its tests do not end on what its solution/solve.sh makes either",
}


class Server(ThreadingHTTPServer):
    """A chat server that runs each task's commands, hands in, and is busy at times."""

    is_busy = True
    fills: Path | None = None
    """A folder whose disk is full once an attempt has ended."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self) -> "Server":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        name = next(name for name in TASKS if any(f"<{name}>" in str(one["content"]) for one in asked))
        turn = sum(one["role"] == "assistant" for one in asked)
        call = {"name": "terminal", "arguments": json.dumps({"keystrokes": f"{TASKS[name][0]}\n"})}
        message: dict[str, Any] = {"role": "assistant", "content": "Done."}
        if turn == 0:
            message = {"role": "assistant", "tool_calls": [{"id": "0", "type": "function", "function": call}]}
        body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"total_tokens": 9}}
        if turn and self.server.fills is not None:
            with suppress(OSError), (self.server.fills / "filler").open("ab", buffering=0) as filler:
                while filler.write(b"x" * 65536):
                    pass
        is_refused = self.server.is_busy and name == "limited"
        self.send_response(429 if is_refused else 200)
        answer = json.dumps(body).encode()
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *words: object) -> None: ...


def write_task(root: Path, name: str, test: str) -> None:
    files = {
        "instruction.md": f"Task <{name}>.\n",
        "task.toml": '[metadata]\nenvironment = "terminal"\nfamily = "faults"\nmax_turns = 4\n'
        "[verifier]\ntimeout_sec = 3\n",
        "environment/files/given": "",
        "tests/test.sh": test,
        "solution/solve.sh": "cd /work; touch done answer\n",
    }
    for path, text in files.items():
        place = root / name.replace(" ", "_").replace(",", "") / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)


@contextmanager
def small_machine() -> Iterator[dict[str, Any]]:
    """Arguments for a process whose temporary directory has 48 MB, and which has 1 GiB of memory with its children."""
    folder = tempfile.mkdtemp(prefix="north-small-")
    (own,) = (line.split(":")[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
    group = Path(f"/sys/fs/cgroup/memory{own}/faults-{os.getpid()}")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m,mode=1777", "none", folder], check=True)
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(1 << 30))
        yield {
            "preexec_fn": lambda: (group / "cgroup.procs").write_text("0"),
            "env": os.environ | {"TMPDIR": folder},
        }
    finally:
        subprocess.run(["umount", folder], check=True)
        os.rmdir(folder)
        group.rmdir()


def can_be_small() -> bool:
    is_v1 = ":memory:" in Path("/proc/self/cgroup").read_text()
    return os.geteuid() == 0 and is_v1 and os.access("/sys/fs/cgroup/memory", os.W_OK)


needs_a_small_machine = pytest.mark.skipif(
    not can_be_small(), reason="limits of memory and disk need root and a memory control group (v1)"
)


def evaluate(folder: Path, server: Server, **machine: Any) -> subprocess.CompletedProcess[str]:
    """The command over ``folder``'s tasks, in another process."""
    config = {
        "task_sets": [str(folder / "tasks")],
        "output_dir": str(folder / "out"),
        "num_samples": 1,
        "concurrency": 2,
        "servers": {"model": {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": "m", "num_retries": 0}},
        "rollouts": {
            "harnesses": {"terminal": {"class_path": "north_lightning.harnesses.ReActTerminalHarness"}},
            "verifier": {
                "class_path": "north_lightning.verifiers.UnitTestVerifier",
                "init_args": {"grading": "official"},
            },
            "sandboxes": {"class_path": "north_lightning.sandbox.BubblewrapProvider"},
            "max_turn_tokens": 64,
            "max_context_tokens": 1024,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "north_lightning", "test", "--config", str(folder / "config.yaml")]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=200, **machine)


def recorded(folder: Path) -> dict[str, Attempt]:
    """Task -> its last attempt."""
    return {one.task_id: one for one in read_attempts(folder / "out" / "attempts.jsonl")}


@needs_a_small_machine
def test_no_planted_fault_is_scored(tmp_path: Path) -> None:
    for name, (_, test) in TASKS.items():
        write_task(tmp_path / "tasks", name, test)
    with Server() as server:
        with small_machine() as machine:
            done = evaluate(tmp_path, server, **machine)
        assert done.returncode == 0, done.stderr[-2000:]
        found = {name: recorded(tmp_path)[name.replace(" ", "_").replace(",", "")] for name in TASKS}
        assert {name: one.reward for name, one in found.items() if one.error is None} == SCORED
        for name, error in ERRORS.items():
            assert found[name].reward is None
            assert re.match(error, str(found[name].error), re.S), (name, found[name].error)
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())["checkpoints"]["model"]
        assert (summary["num_tasks"], summary["num_attempts"], summary["num_errors"]) == (3, 3, 4)
        assert "57.1% of the attempts failed outside the model, above 2%" in done.stdout

        server.is_busy = False
        write_task(tmp_path / "tasks", "grader hangs", REWARD)
        printed = evaluate(tmp_path, server).stdout
        assert "REUSE 3 attempts at 3 tasks" in printed
        rewards = {one.task_id: one.reward for one in recorded(tmp_path).values()}
        assert None not in rewards.values()
        assert sum(rewards.values()) == 5  # all but those of SCORED that fail
        assert "of the attempts failed outside the model" not in printed


@needs_a_small_machine
def test_a_full_disk_makes_no_attempt_a_failed_one_and_it_is_graded_once_there_is_room(tmp_path: Path) -> None:
    names = ("solved", "unsolved")
    for name in names:
        write_task(tmp_path / "tasks", name, TASKS[name][1])
    with Server() as server, small_machine() as machine:
        server.fills = Path(machine["env"]["TMPDIR"])
        done = evaluate(tmp_path, server, **machine)
        assert "Traceback" not in done.stderr
        found = recorded(tmp_path)
        assert found["solved"].reward in (None, 1.0)  # what solved it is no doubt
        assert found["unsolved"].reward is None
        assert re.search("No space left on device|the disk is full", done.stderr + str(found))
        (server.fills / "filler").unlink()
        server.fills = None
        assert evaluate(tmp_path, server, **machine).returncode == 0
    assert {name: recorded(tmp_path)[name].reward for name in names} == {name: SCORED[name] for name in names}


@needs_a_small_machine
@pytest.mark.long
def test_an_output_folder_that_runs_full_ends_the_evaluation_which_then_goes_on(tmp_path: Path) -> None:
    names = ("solved", "unsolved")
    for name in names:
        write_task(tmp_path / "tasks", name, TASKS[name][1])
    (tmp_path / "out").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path / "out"], check=True)
    try:
        (tmp_path / "out" / "filler").write_bytes(b"x" * ((1 << 20) - 4096))
        with Server() as server:
            done = evaluate(tmp_path, server)
            assert done.returncode == 1
            assert "Traceback" not in done.stderr
            assert "No space left on device" in done.stderr
            assert all(one.reward == SCORED[name] for name, one in recorded(tmp_path).items() if one.error is None)
            (tmp_path / "out" / "filler").unlink()
            assert evaluate(tmp_path, server).returncode == 0
        assert {name: recorded(tmp_path)[name].reward for name in names} == {name: SCORED[name] for name in names}
    finally:
        subprocess.run(["umount", tmp_path / "out"], check=True)
