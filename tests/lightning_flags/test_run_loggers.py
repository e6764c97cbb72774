"""A resumed run goes on in the logs of its first life, in another process; W&B out of reach ends it at once."""

import csv
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from argparse import Namespace
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from small_runs import sft_config, write_run_inputs
from tensorboardX.proto import event_pb2

from north_lightning.errors import ConfigError
from north_lightning.run_loggers import check_wandb

LOGGERS = ("CSVLogger", "TensorBoardLogger", "WandbLogger")
WANDB = {"class_path": "lightning.pytorch.loggers.WandbLogger"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


def fit(inputs: Path, run: Path, *loggers: Any, environment: Any = None, **trainer: Any) -> tuple[int, str]:
    config = sft_config(inputs, run, logger=list(loggers), callbacks=[], **trainer)
    (path := inputs / f"{run.name}.yaml").write_text(json.dumps(config))  # YAML too
    command = [sys.executable, "-m", "north_lightning", "fit", "--config", path, "--resume", "auto"]
    keep = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(command, capture_output=True, text=True, env=keep | (environment or {}), timeout=600)
    return done.returncode, done.stderr


def logger(name: str, run: Path, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": str(run), **arguments}}


def test_a_resumed_run_goes_on_in_its_logs(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    loggers = [logger(name, run, **({"offline": True} if name == "WandbLogger" else {})) for name in LOGGERS]
    code, text = fit(inputs, run, *loggers, max_steps=2, enable_checkpointing=True)
    assert code == 0, text
    first = ids_and_folders(run)
    code, text = fit(inputs, run, *loggers, max_steps=4, enable_checkpointing=True)
    assert code == 0, text
    assert ids_and_folders(run) == first
    assert all(len(found) == 1 for found in first.values()), first
    (file,) = run.rglob("metrics.csv")
    with file.open(newline="") as opened:
        steps = [int(row["step"]) for row in csv.DictReader(opened) if row["train/loss"]]
    assert steps == [0, 1, 2, 3]
    events = sorted(run.rglob("events.out.tfevents*"), key=lambda path: path.stat().st_mtime_ns)
    assert [steps_in(path) for path in events] == [{0, 1}, {2, 3}]  # each life's, in one folder
    assert len(list(run.rglob("run-*.wandb"))) == 2


def steps_in(events: Path) -> set[int]:
    """With a value of ``train/loss``, in TensorBoard's records: length, checksum, ``Event``, checksum."""
    data, steps = events.read_bytes(), set()
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + size])
        steps |= {event.step for value in event.summary.value if value.tag == "train/loss"}
        data = data[16 + size :]
    return steps


def ids_and_folders(run: Path) -> dict[str, set[str]]:
    return {
        "csv": {str(path) for path in run.rglob("metrics.csv")},
        "tensorboard": {str(path.parent) for path in run.rglob("events.out.tfevents*")},
        "wandb": {path.stem.split("-")[1] for path in run.rglob("run-*.wandb")},
    }


def test_wandb_out_of_reach_is_one_line_and_nothing_is_written(inputs: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        code, text = fit(
            inputs, tmp_path / "away", logger("WandbLogger", tmp_path / "logs"), environment={"WANDB_BASE_URL": url}
        )
    assert code == 1
    (line,) = [line for line in text.splitlines() if "WandbLogger" in line]
    assert f"cannot reach {url}" in line
    assert "offline: true" in line
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("answers", "is_refused"), [(500, True), (503, True), (404, True), (200, False), (401, False)])
def test_a_server_that_is_not_well_is_refused_at_once(
    answers: int, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answers(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(answers)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("WANDB_MODE", raising=False)
        try:
            with pytest.raises(ConfigError, match=f"it answers {answers}") if is_refused else nullcontext():
                check_wandb(Namespace(class_path=WANDB["class_path"], init_args=Namespace(offline=False)))
        finally:
            server.shutdown()


@pytest.mark.long
def test_a_server_that_never_answers_is_refused_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.delenv("WANDB_MODE", raising=False)
        started = time.monotonic()
        with pytest.raises(ConfigError, match="timed out"):
            check_wandb(Namespace(class_path=WANDB["class_path"], init_args=Namespace(offline=False)))
        assert time.monotonic() - started < 15


@pytest.mark.long
def test_a_logger_whose_package_is_missing_is_one_line(inputs: Path, tmp_path: Path) -> None:
    loggers = [logger("CSVLogger", tmp_path / "run"), logger("MLFlowLogger", tmp_path / "run")]
    code, text = fit(inputs, tmp_path / "run", *loggers)
    assert code == 1
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert "MLFlowLogger: " in line
    assert "pip install -U 'mlflow" in line
    assert "Traceback" not in text


@pytest.mark.long
def test_wandb_kept_offline_by_the_environment_is_reported(inputs: Path, tmp_path: Path) -> None:
    code, text = fit(
        inputs,
        tmp_path / "mode",
        logger("WandbLogger", tmp_path / "logs"),
        environment={"WANDB_MODE": "offline"},
        max_steps=1,
    )
    assert code == 0, text
    assert text.count("WANDB_MODE=offline in the environment: nothing is sent") == 1
