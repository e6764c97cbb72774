"""The life of the vLLM server process: refusals, failures, listeners, and no orphans however anybody dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
import pytest

from north_lightning.errors import ConfigError, SamplerError, SidecarError, TokenizerError
from north_lightning.sampling import Sidecar, VLLMSampler
from north_lightning.types import SamplingParams

SRC = Path(__file__).parents[2]


def processes_of_group(group: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def wait_until_gone(group: int, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while processes_of_group(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of_group(group) == []


def generate(url: str, max_tokens: int = 4) -> list[int]:
    async def run() -> list[int]:
        sampler = VLLMSampler(url, timeout_s=60)
        try:
            return (await sampler.generate([11, 12, 13], SamplingParams(max_tokens=max_tokens))).policy_versions
        finally:
            await sampler.close()

    return asyncio.run(run())


def test_a_directory_without_checkpoint_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json, got .*nowhere"):
        Sidecar(tmp_path / "nowhere", tmp_path / "log").start()


@pytest.mark.parametrize(
    "arguments", [["--host", "0.0.0.0"], ["--host=::"], ["--api-key", "secret", "--host", "10.0.0.1"], ["--host", "me"]]
)
def test_a_host_that_other_machines_reach_is_refused_because_the_weight_routes_ask_for_no_key(arguments, tmp_path):
    with pytest.raises(ConfigError, match="extra_args: expected no --host beyond loopback"):
        Sidecar(tmp_path, tmp_path / "log", extra_args=arguments)
    Sidecar(tmp_path, tmp_path / "log", extra_args=["--host", "127.0.0.1", "--host=::1", "--host", "localhost"])


@pytest.mark.parametrize("setting", [{"vocab_size": 601}, {"eos_token_id": 9}])
def test_a_checkpoint_of_another_tokenizer_is_refused_at_the_handshake(setting, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 600, "eos_token_id": 7}))
    key, expected = next(iter(setting.items()))
    with pytest.raises(TokenizerError, match=f"{key} is .*, but the tokenizer in use has {expected}"):
        Sidecar(tmp_path, tmp_path / "log", **setting).start()


def test_a_length_the_model_was_not_made_for_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    with pytest.raises(ConfigError, match="max_model_len: expected at most 512 .* got 1024"):
        Sidecar(tmp_path, tmp_path / "log", max_model_len=1024).start()


def test_the_url_of_a_sidecar_that_never_started_is_an_error(tmp_path):
    sidecar = Sidecar(tmp_path, tmp_path / "log")
    sidecar.stop()
    for question in (lambda: sidecar.url, lambda: sidecar.pid, sidecar.check_alive):
        with pytest.raises(SidecarError, match="not running|not started"):
            question()


@pytest.mark.vllm
def test_a_server_that_dies_at_the_start_is_an_error_with_the_end_of_its_log(vllm_checkpoint, tmp_path):
    sidecar = Sidecar(vllm_checkpoint, tmp_path / "server.log", max_model_len=256, extra_args=["--no-such-flag"])
    with pytest.raises(SidecarError, match="ended with exit code 2") as caught:
        sidecar.start()
    message = str(caught.value)
    assert str(tmp_path / "server.log") in message
    assert "unrecognized arguments: --no-such-flag" in message
    with pytest.raises(SidecarError, match="not running"):
        sidecar.check_alive()


def test_only_the_loopback_interface_is_listened_on(vllm_server):
    listening = [
        connection.laddr.ip
        for process in processes_of_group(vllm_server.pid)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN or connection.type.name == "SOCK_DGRAM"
    ]
    assert set(listening) == {"127.0.0.1"}


def test_the_engine_takes_no_more_than_the_thread_it_was_given(vllm_server):
    async def run() -> None:
        sampler = VLLMSampler(vllm_server.url, timeout_s=60)
        params = SamplingParams(max_tokens=80)
        await asyncio.gather(*(sampler.generate([10 + row] * 300, params) for row in range(48)))
        await sampler.close()

    engine = next(p for p in processes_of_group(vllm_server.pid) if p.name().startswith("VLLM"))
    started, used = time.monotonic(), sum(engine.cpu_times()[:2])
    asyncio.run(run())
    assert sum(engine.cpu_times()[:2]) - used < 1.1 * (time.monotonic() - started) + 0.1


def test_a_sidecar_cannot_be_started_twice(vllm_server):
    with pytest.raises(SidecarError, match="already running at http://127"):
        vllm_server.start()


def test_an_engine_that_hangs_is_found_and_a_busy_one_is_not_suspected(vllm_server):
    engine = next(p for p in processes_of_group(vllm_server.pid) if p.name().startswith("VLLM"))
    vllm_server.check_alive(timeout_s=10)
    engine.suspend()
    try:
        with pytest.raises(SidecarError, match="did not answer within 1 s"):
            vllm_server.check_alive(timeout_s=1)
    finally:
        engine.resume()
    vllm_server.check_alive(timeout_s=10)


def test_a_pause_is_seen_and_is_no_death(vllm_server):
    httpx.post(f"{vllm_server.url}/pause", params={"mode": "keep"}).raise_for_status()
    try:
        assert "is paused, and not by a weight push of this run; nothing" in vllm_server.check_alive()
    finally:
        httpx.post(f"{vllm_server.url}/resume").raise_for_status()
    assert vllm_server.check_alive() == ""


@pytest.mark.vllm
@pytest.mark.slow
def test_a_killed_server_is_reported_leaves_no_engine_and_restarts_at_the_same_url(
    vllm_checkpoint, tmp_path, monkeypatch
):
    temporary = Path(tempfile.mkdtemp())  # not under tmp_path: paths of sockets must be short
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (torchrun | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)  # the server does not take itself for one of the trainer's processes
    sidecar = Sidecar(vllm_checkpoint, tmp_path / "server.log", max_model_len=256, start_timeout_s=120)
    sidecar.start()
    try:
        group, url = sidecar.pid, sidecar.url
        sidecar.check_alive()
        os.kill(group, signal.SIGKILL)
        os.waitid(os.P_PID, group, os.WEXITED | os.WNOWAIT)
        with pytest.raises(SidecarError, match=r"was killed by SIGKILL; the log is .*server\.log") as caught:
            sidecar.check_alive()
        assert "its last lines:\n  " in str(caught.value)
        wait_until_gone(group)
        with pytest.raises(SamplerError, match="no connection after 4 attempts .* is the vLLM sidecar still running"):
            generate(url)
        sidecar.stop()
        sidecar.start()
        assert sidecar.url == url
        assert generate(url) == [0] * 4
        group = sidecar.pid
    finally:
        sidecar.stop()
    assert processes_of_group(group) == []
    temporary.rmdir()  # empty: the server's sockets are gone


@pytest.mark.vllm
@pytest.mark.slow
def test_the_server_ends_when_its_trainer_is_killed(vllm_checkpoint, tmp_path):
    program = (
        "import sys, time; from north_lightning.sampling import Sidecar\n"
        "sidecar = Sidecar(sys.argv[1], sys.argv[2], max_model_len=256); sidecar.start()\n"
        "print(sidecar.pid, flush=True); time.sleep(600)"
    )
    arguments = [sys.executable, "-c", program, str(vllm_checkpoint), str(tmp_path / "server.log")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=SRC) as trainer:
        assert trainer.stdout is not None
        group = int(trainer.stdout.readline())
        assert len(processes_of_group(group)) >= 2
        trainer.kill()
    wait_until_gone(group)
