"""An export that is killed at any moment, or whose disk is full: the release is whole, or it is not there."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from releases import IN_BLOCKS, make_checkpoint

from north_lightning.export import agreement, command

LARGE = IN_BLOCKS | {"num_experts": 16, "num_hidden_layers": 5}


def export(source: Path, out: Path, form: str, answer: Connection) -> None:
    """Export once, in small shards; say when it begins and when it is over."""
    command.MAX_SHARD_BYTES = 2_000_000
    agreement.why_not_served = lambda *_: "this test does without"
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        answer.send("begins")
        command.export_checkpoint(source, out, format=form, max_kl=10.0)  # type: ignore[arg-type]
        answer.send("over")


@pytest.mark.parametrize("num_kills", [5, pytest.param(50, marks=pytest.mark.long)])
def test_a_killed_export_is_whole_or_absent(num_kills: int, inputs: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "compressed_tensors.compressors", "north_lightning.export.command"])
    source = make_checkpoint(inputs, tmp_path / "source", LARGE)
    noise, seconds, num_whole = random.Random(0), 0.0, 0
    files: dict[str, set[str]] = {}
    for life in range(-2, num_kills):  # two are let live: how long it takes, and what there is then
        form = ("bf16", "fp8")[life % 2]
        out = tmp_path / f"out{life}"
        answers, theirs = context.Pipe(duplex=False)
        process = context.Process(target=export, args=(source, out, form, theirs), daemon=True)
        process.start()
        theirs.close()
        assert answers.poll(120)
        assert answers.recv() == "begins"
        began = time.monotonic()
        if life >= 0:
            time.sleep(noise.uniform(0.0, 1.1 * seconds))
            process.kill()
        with contextlib.suppress(EOFError):
            answers.recv()
        process.join()
        seconds = max(seconds, time.monotonic() - began) if life < 0 else seconds
        if life < 0:
            assert out.exists()
            files[form] = {path.name for path in out.iterdir()}
        if out.exists():
            num_whole += 1
            assert {path.name for path in out.iterdir()} == files[form]
            subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)
        else:  # the same command goes through, and what was left is gone
            answers, theirs = context.Pipe(duplex=False)
            again = context.Process(target=export, args=(source, out, form, theirs), daemon=True)
            again.start()
            again.join(120)
            assert {path.name for path in out.iterdir()} == files[form]
        assert not (tmp_path / f".out{life}.writing").exists()
    assert num_whole < num_kills + 2  # some were killed in time


def test_a_full_file_system_leaves_nothing(inputs: Path, tmp_path: Path) -> None:
    """On a tmpfs that holds the weights and not the rest."""
    source = make_checkpoint(inputs, tmp_path / "source", LARGE)
    size = (source / "model.safetensors").stat().st_size // 4096 * 4096 + 4096
    (tmp_path / "disk").mkdir()
    export_there = (
        f"mount -t tmpfs -o size={size} tmpfs {tmp_path}/disk && {sys.executable} -m north_lightning export "
        f"--checkpoint={source} --directory={tmp_path}/disk/out; echo code $?; ls -A {tmp_path}/disk"
    )
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", export_there], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["code 1"], done.stdout + done.stderr
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) <= 8
