"""Runs a function in several processes that are joined by gloo, each with one thread, and returns what they return."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

TIMEOUT_S = 120


def run_processes(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` in every process; the results by rank.

    Raises:
        RuntimeError: with the traceback of the first process that failed.
    """
    context = multiprocessing.get_context("forkserver")  # torch is imported once, and forked before it has threads
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "north_lightning.modules"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(count, mp_context=context) as pool:
        calls = [pool.submit(_run, rank, count, Path(folder), function, arguments) for rank in range(count)]
        results = [call.result() for call in calls]
    failed = [(rank, result[1]) for rank, result in enumerate(results) if not result[0]]
    if failed:
        # The others fail because the first one is gone: show the one that did not wait for another.
        rank, text = min(failed, key=lambda pair: "Connection closed by peer" in pair[1])
        raise RuntimeError(f"process {rank} of {count}:\n{text}")
    return [result[1] for result in results]


def as_torchrun_would() -> None:
    """The environment by which Lightning knows that processes are there already."""
    import torch.distributed as dist

    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # nobody connects: the group exists
    }


def _run(
    rank: int, count: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[bool, Any]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        return True, function(*arguments)
    except Exception:
        return False, traceback.format_exc()
    finally:
        dist.destroy_process_group()
