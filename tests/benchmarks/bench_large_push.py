"""A weight push of a 1 GB bf16 checkpoint against this machine's memcpy, both in one run, interleaved.

    python tests/benchmarks/bench_large_push.py [--pushes 7] [--gib 1.0] [--output runs/bench/large_push.json]

``memcpy`` copies as many bytes from one tensor to another that exists already, with torch's threads as in training.
The engine writes what it gets in its kernels' layout: a push is a copy to be shared, and one more there.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench_weight_push import QUICKSTART, write

from north_lightning.model import NorthConfig, NorthModel, named_hf_tensors, save_checkpoint
from north_lightning.sampling import SharedMemoryTransport, Sidecar

LARGE = QUICKSTART | {
    "hidden_size": 1024,
    "intermediate_size": 512,
    "prefix_dense_intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
}
BYTES_PER_LAYER = 64 * 3 * 1024 * 512 * 2


def memcpy_s(source: torch.Tensor, target: torch.Tensor) -> float:
    started = time.perf_counter()
    target.copy_(source)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pushes", type=int, default=7)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/large_push.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    num_layers = 1 + max(1, round(options.gib * 2**30 / BYTES_PER_LAYER))
    model = NorthModel(NorthConfig(**LARGE | {"num_hidden_layers": num_layers})).bfloat16()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, Path(folder) / "checkpoint")
        with Sidecar(Path(folder) / "checkpoint", Path(folder) / "server.log", dtype="bfloat16") as sidecar:
            transport = SharedMemoryTransport(sidecar.url)
            num_bytes = sum(tensor.nbytes for _, tensor in named_hf_tensors(model))
            source, target = (torch.ones(num_bytes // 4, dtype=torch.int32) for _ in range(2))
            reports, copies = [], []
            for version in range(options.pushes + 1):
                copies.append(memcpy_s(source, target))
                transport.push(named_hf_tensors(model), version + 1)
                reports.append(transport.last_push)
            transport.close()
    copy_s = statistics.median(copies[1:])  # the first of each warms up
    push_s = statistics.median(report.seconds for report in reports[1:])
    paused_s = statistics.median(report.paused_seconds for report in reports[1:])
    result = {
        "bytes": num_bytes,
        "memcpy_gb_per_s": round(num_bytes / copy_s / 1e9, 2),
        "push_s": round(push_s, 3),
        "paused_s": round(paused_s, 3),
        "push_of_memcpy": round(copy_s / push_s, 3),
        "paused_of_memcpy": round(copy_s / paused_s, 3),
        "torch_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
    }
    write(options.output, result)


if __name__ == "__main__":
    main()
