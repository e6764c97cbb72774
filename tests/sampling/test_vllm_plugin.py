"""The entry point that vLLM calls in each of its processes, and the watch that ends them with their parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import entry_points

import psutil
import pytest

from north_lightning.sampling import vllm_plugin


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_the_plugin_is_declared_where_vllm_looks_for_it():
    (entry,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "north_lightning")
    assert entry.load() is vllm_plugin.register


def test_importing_the_plugin_imports_nothing_heavy():
    loaded = run("import sys, north_lightning.sampling.vllm_plugin; print(*sys.modules)").split()
    assert not {"torch", "vllm", "httpx", "aiohttp", "psutil", "safetensors"} & set(loaded)


def test_a_vllm_without_weight_transfer_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer.factory", None)
    vllm_plugin.register()


def test_registering_twice_is_harmless():
    factory = pytest.importorskip("vllm.distributed.weight_transfer.factory").WeightTransferEngineFactory
    vllm_plugin.register()
    vllm_plugin.register()
    engine = factory._registry[vllm_plugin.BACKEND]()
    assert engine.__name__ == "SharedMemoryEngine"


def test_a_process_group_ends_within_two_intervals_of_its_parents_death():
    watched = (
        "import os, sys, time; from north_lightning.sampling.launch import die_with_parent\n"
        "die_with_parent(os.getppid()); child = os.fork()\n"
        "print(os.getpid(), flush=True) if child else None; time.sleep(60)"
    )
    parent_program = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {watched!r}], start_new_session=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", parent_program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        alive = [p for p in psutil.process_iter() if os.getpgid(p.pid) == group]
        assert len(alive) == 2
        parent.kill()
    deadline = time.monotonic() + 10
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in alive) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in alive)
