"""``export`` of a large checkpoint beside ``cp``: speed to the disk and peak memory, in one run.

    python tests/benchmarks/bench_export.py [--gb 30] [--formats bf16 fp8] [--output runs/bench/export.json]

The checkpoint has the released model's layers, as many as make the size, and numbers at random. ``cp`` copies its
shards. Each begins with nothing of them in the page cache and is timed until everything is on the disk. Needs a little
more than twice the size in free disk below ``--folder``.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from north_lightning.chat import train_tokenizer
from north_lightning.model import NorthConfig
from north_lightning.model.checkpoint import MAX_SHARD_BYTES, hf_shapes, write_config
from north_lightning.model.shards import Entry, split_shards, write_shards

RELEASED = {
    "vocab_size": 262144,
    "hidden_size": 2048,
    "intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "prefix_dense_intermediate_size": 3072,
}
BYTES_PER_LAYER = 2 * 604_000_000


def make_checkpoint(folder: Path, num_bytes: float) -> int:
    """Write a checkpoint of about ``num_bytes``; its size."""
    tokenizer = train_tokenizer(["hello world"], [], 400, folder)
    num_layers = 1 + max(1, round((num_bytes - 2**30) / BYTES_PER_LAYER))
    config = NorthConfig(num_hidden_layers=num_layers, eos_token_id=tokenizer.eos_id, **RELEASED)
    entries = [Entry(name, torch.bfloat16, shape) for name, shape in hf_shapes(config).items()]
    numbers = (torch.randn(2**23, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def pieces() -> Iterator[tuple[Entry, torch.Tensor]]:
        for number, entry in enumerate(entries):
            left = entry.num_bytes // 2
            while left:
                start = 1009 * number % 2**22
                piece = numbers[start : start + min(left, 2**22)]
                yield entry, piece
                left -= len(piece)

    write_shards(split_shards(entries, MAX_SHARD_BYTES), pieces(), folder)
    write_config(folder, config, torch.bfloat16)
    return sum(entry.num_bytes for entry in entries)


def forget(folder: Path) -> None:
    """Write a folder's files to the disk and drop them from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_s(source: Path, target: Path) -> float:
    forget(source)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def export(source: Path, target: Path, form: str) -> tuple[float, float]:
    """Seconds, and the process's largest resident memory in GB."""
    forget(source)
    options = [f"--checkpoint={source}", f"--directory={target}", f"--format={form}", "--check=false"]
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "north_lightning", "export", *options])
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    assert status == 0, f"export ended with {status}"
    shutil.rmtree(target)
    return seconds, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=30.0)
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, default=Path("runs/bench/export.json"))
    options = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-export-") as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        source.mkdir()
        num_bytes = make_checkpoint(source, options.gb * 1e9)
        for _ in range(options.rounds):
            row = {"cp_s": round(copy_s(source, target), 2)}
            for form in options.formats:
                seconds, peak_gb = export(source, target, form)
                row |= {
                    f"{form}_s": round(seconds, 2),
                    f"{form}_peak_gb": round(peak_gb, 3),
                    f"{form}_of_cp": round(row["cp_s"] / seconds, 3),
                }
            rounds.append(row)
            print(row, flush=True)
    result = {
        "gb": round(num_bytes / 1e9, 2),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "own_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "rounds": rounds,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
