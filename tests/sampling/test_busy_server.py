"""A server is judged by its progress: one that is slow, or has no CPU, is reported; one that hangs is an error."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import httpx
import pytest

from north_lightning.errors import SidecarError
from north_lightning.sampling.sidecar import Sidecar
from north_lightning.sampling.watch import SidecarWatch
from north_lightning.sandbox.cpu_waits import slowdown

SERVER = """
import json, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

folder, how, started, state = sys.argv[1], sys.argv[3], time.monotonic(), {"paused": False}

def work():
    while True:
        sum(range(1000))

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/weight_info" and how != "answers":
            time.sleep(600)
        tokens = time.monotonic() - started if how == "counts" else 7
        self.answer({
            "/weight_info": json.dumps({"weight_version": "0"}),
            "/is_paused": json.dumps({"is_paused": state["paused"]}),
            "/v1/models": json.dumps({"data": [{"root": folder}]}),
            "/metrics": f"# TYPE vllm:generation_tokens counter\\\\nvllm:generation_tokens_total {tokens}\\\\n",
        }[self.path])

    def do_POST(self):
        state["paused"] = self.path == "/pause"
        self.answer("{}")

    def answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_): ...

if how == "works":
    threading.Thread(target=work, daemon=True).start()
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
""".replace("\\\\n", "\\n")


class ScriptedSidecar(Sidecar):
    how = "answers"

    def _command(self) -> list[str]:
        return [sys.executable, "-c", SERVER, str(self.model_dir), str(self._port), self.how]


@contextmanager
def serving(directory: Path, how: str) -> Iterator[ScriptedSidecar]:
    (directory / "config.json").write_text(json.dumps({}))
    sidecar = ScriptedSidecar(directory, directory / "log")
    sidecar.how = how
    with sidecar:
        yield sidecar


@contextmanager
def neighbors(number: int, cpus: set[int]) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        for process in busy:
            os.sched_setaffinity(process.pid, cpus)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize("how", ["works", "counts"])
def test_a_server_that_answers_late_but_works_is_not_taken_for_dead(how, tmp_path):
    with serving(tmp_path, how) as sidecar:
        for _ in range(2):
            assert "did not answer within 1 s; in the last" in sidecar.check_alive(timeout_s=1)


def test_a_server_without_a_cpu_is_not_taken_for_dead(tmp_path):
    one = {min(os.sched_getaffinity(0))}
    with serving(tmp_path, "works") as sidecar, neighbors(3, one):
        for thread in Path(f"/proc/{sidecar.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), one)
            os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)
        text = sidecar.check_alive(timeout_s=1.5)
        ran, waited = (float(text.split(before)[1].split(" s")[0]) for before in ("it ran for ", "for a CPU for "))
        assert waited > 0.3
        assert ran + waited > 0.8  # of 1.05


@pytest.mark.parametrize("how", ["sleeps", "stopped", "spins for ever"])
def test_a_server_that_hangs_is_found_at_once(how, tmp_path, monkeypatch):
    with serving(tmp_path, "works" if how != "sleeps" else how) as sidecar:
        if how == "stopped":
            os.killpg(sidecar.pid, signal.SIGSTOP)
        if how == "spins for ever":
            monkeypatch.setattr("north_lightning.sampling.sidecar.MAX_SILENT_WORK_S", 0.01)
        with pytest.raises(SidecarError, match=r"did not answer within 1 s; .*it makes no progress; the log is"):
            sidecar.check_alive(timeout_s=1)
        sidecar.stop(timeout_s=0.0)


def test_a_pause_that_is_not_ours_is_reported_with_its_remedy(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("north_lightning.sampling.watch.ODD_FOR_S", 0.1)
    with serving(tmp_path, "answers") as sidecar, caplog.at_level(logging.WARNING):
        watch = SidecarWatch([sidecar], max_restarts=0, interval_s=0.02)
        watch.start()
        time.sleep(0.3)
        assert (watch.odd_s, caplog.text) == (0.0, "")
        httpx.post(f"{sidecar.url}/pause")
        deadline = time.monotonic() + 30
        while not caplog.text and time.monotonic() < deadline:
            time.sleep(0.02)
        httpx.post(f"{sidecar.url}/resume")
        while watch._odd and time.monotonic() < deadline:
            time.sleep(0.02)
        watch.stop()
    assert "is paused, and not by a weight push of this run; nothing is sampled until somebody calls: " in caplog.text
    assert f"curl -X POST {sidecar.url}/resume" in caplog.text
    assert len(caplog.records) == 1
    assert watch.odd_s >= 0.1
    assert watch.num_deaths == 0


@pytest.mark.parametrize("factor", [1e-6, 1000.0])  # the first is over before any server can answer
def test_a_busy_machine_has_longer_to_start(tmp_path, monkeypatch, factor):
    monkeypatch.setattr("north_lightning.sampling.sidecar.slowdown", lambda: factor)
    (tmp_path / "config.json").write_text(json.dumps({}))
    sidecar = ScriptedSidecar(tmp_path, tmp_path / "log", start_timeout_s=0.06)
    with pytest.raises(SidecarError, match="generated nothing in") if factor < 1 else nullcontext(), sidecar:
        assert sidecar.start_seconds is not None


def test_a_limit_grows_with_the_load_of_each_cpu(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    for load, factor in ((0.0, 1.0), (cores / 2, 1.0), (12.5 * cores, 12.5)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert slowdown() == factor
