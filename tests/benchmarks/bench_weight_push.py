"""What a weight push costs while vLLM samples: seconds in all and seconds paused, for a quickstart-size model.

    python tests/benchmarks/bench_weight_push.py [--pushes 20] [--in-flight 16] [--output runs/bench/weight_push.json]

The machine should be idle: server, trainer and client share its cores.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from pathlib import Path

import torch

from north_lightning.model import NorthConfig, NorthModel, named_hf_tensors, save_checkpoint
from north_lightning.sampling import SharedMemoryTransport, Sidecar, VLLMSampler
from north_lightning.types import SamplingParams

QUICKSTART = {
    "vocab_size": 1536,
    "hidden_size": 128,
    "intermediate_size": 64,
    "prefix_dense_intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "sliding_window": 127,
    "max_position_embeddings": 4096,
    "bos_token_id": 5,
    "pad_token_id": 0,
    "eos_token_id": 7,
}


async def push_while_sampling(url, model, num_pushes, num_in_flight):
    """Reports of ``num_pushes`` pushes, always with ``num_in_flight`` requests running, and how many tokens came."""
    sampler, transport = VLLMSampler(url, timeout_s=300), SharedMemoryTransport(url)
    stopped = asyncio.Event()
    num_tokens = 0

    async def keep_sampling(row):
        nonlocal num_tokens
        while not stopped.is_set():
            answer = await sampler.generate([10 + row] * 300, SamplingParams(max_tokens=400))
            num_tokens += len(answer.token_ids)

    sampling = [asyncio.create_task(keep_sampling(row)) for row in range(num_in_flight)]
    await asyncio.sleep(2)
    reports = []
    for version in range(1, num_pushes + 1):
        await asyncio.to_thread(transport.push, list(named_hf_tensors(model)), version)
        reports.append(transport.last_push)
        await asyncio.sleep(0.5)
    stopped.set()
    await asyncio.gather(*sampling)
    await sampler.close()
    transport.close()
    return reports, num_tokens


def write(output, result):
    """Keep the figures in a file, and show them."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def summary(seconds):
    return {"median": round(statistics.median(seconds), 4), "max": round(max(seconds), 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pushes", type=int, default=20)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/weight_push.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model = NorthModel(NorthConfig(**QUICKSTART))
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, Path(folder) / "checkpoint")
        with Sidecar(Path(folder) / "checkpoint", Path(folder) / "server.log") as sidecar:
            reports, num_tokens = asyncio.run(
                push_while_sampling(sidecar.url, model, options.pushes, options.in_flight)
            )
            start_seconds = sidecar.start_seconds
    assert num_tokens > 0
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": reports[0].num_bytes,
        "requests_in_flight": options.in_flight,
        "pushes": len(reports),
        "push_s": summary([report.seconds for report in reports]),
        "paused_s": summary([report.paused_seconds for report in reports]),
        "server_start_s": round(start_seconds, 1),
        "cpu_count": os.cpu_count(),
    }
    write(options.output, result)


if __name__ == "__main__":
    main()
