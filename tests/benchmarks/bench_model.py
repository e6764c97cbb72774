"""The model's parts and its training step against what a user would otherwise take, both sides in one run.

    python tests/benchmarks/bench_model.py [--parts step loss attention gpu] [--threads 1] [--rounds 3]

- ``step``: forward, next-token cross entropy, backward and AdamW of a model with 128 experts, top-8 and tiny widths,
  against transformers with each of its expert implementations, in float32. Both compute the same loss.
- ``loss``: per-token log-probability and entropy over a vocabulary of 262,144, forward and backward in float32, against
  all logits at once. Extra memory is the peak above inputs and gradients. We make four matrix products (the logits
  twice), the plain way three: the wider the model, the more that counts.
- ``attention``: a row of 16 windows along the band, forward and backward, against one dense mask.
- ``gpu``: full-width layers, 64K and 128K packed tokens, in bfloat16 against transformers' best setting; the share of
  the peak that useful work reaches; expert blocks against a dense matrix product; memory of the loss; longest row.
  Needs CUDA and about 140 GB; elsewhere it is reported as not measured.

The sides take turns within each round. A ratio is the median over rounds of theirs / ours. On a CPU the clock is the
process's CPU time, which a busy machine disturbs least, and wall time stands beside it; on CUDA it is wall time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from north_lightning.losses import token_logprobs
from north_lightning.model import ComputeConfig, NorthConfig, NorthModel, load_checkpoint
from north_lightning.model.block_attention import block_attention, plan_blocks
from north_lightning.model.expert_backends import mixture_of_experts

VOCABULARY = 262144
Side = Callable[[], Any]


# ---- measuring -------------------------------------------------------------------------------------------------------


def take_turns(sides: dict[str, Side], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of every side, and how many times as long as ``ours`` it takes; the first round is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            synchronise()
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            synchronise()
            if number:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    results = {}
    for name, pairs in times.items():
        results[name] = {"wall_s": median(w for w, _ in pairs), "cpu_s": median(c for _, c in pairs)}
        for column, clock in enumerate(("wall", "cpu")):
            both = zip(pairs, times["ours"], strict=True)
            results[name][f"{clock}_of_ours"] = median(theirs[column] / ours[column] for theirs, ours in both)
    return results


def median(values: Iterator[float]) -> float:
    return round(statistics.median(values), 5)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, int]]:
    """Bytes by which memory in use rose at most inside the block: the allocator's on CUDA, else resident pages."""
    gc.collect()
    result: dict[str, int] = {}
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield result
        torch.cuda.synchronize()
        result["bytes"] = torch.cuda.max_memory_allocated() - before
    else:
        ctypes.CDLL(None).malloc_trim(0)  # freed pages go back, so that using them again counts
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = resident("VmRSS")
        yield result
        result["bytes"] = resident("VmHWM") - before


def resident(name: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{name}:"))


# ---- the training step -----------------------------------------------------------------------------------------------


def tiny_config(hidden_size: int, window: int) -> NorthConfig:
    """North's proportions (q as wide as twice the model, an expert 3/8 of it, 8 q heads per key/value head)."""
    heads = 2 * hidden_size // 32
    return NorthConfig(
        vocab_size=2048,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3 // 8,
        num_hidden_layers=5,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8),
        head_dim=32,
        num_experts=128,
        num_experts_per_tok=8,
        prefix_dense_intermediate_size=hidden_size * 3 // 2,
        sliding_window=window,
        eos_token_id=7,
        sliding_window_includes_current=True,  # transformers' reading: both must do the same work
    )


def make_documents(lengths: list[int], vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(10, vocab_size, (length,), generator=generator) for length in lengths]


def packed(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    bounds = torch.tensor([0, *map(len, documents)]).cumsum(0)
    return torch.cat(documents), bounds.to(torch.int32)


def our_loss(model: NorthModel, documents: list[Tensor], device: str = "cpu") -> Callable[[], Tensor]:
    token_ids, bounds = (tensor.to(device) for tensor in packed(documents))
    predicts = torch.ones_like(token_ids, dtype=torch.bool)
    predicts[bounds[1:].long() - 1] = False
    rows = predicts.nonzero()[:, 0]
    targets = token_ids[rows + 1]

    def loss() -> Tensor:
        hidden = model(token_ids, bounds)[rows]
        return -token_logprobs(hidden, model.embedding_weight, targets, model.config.logit_scale)[0].mean()

    return loss


def their_loss(model: Any, documents: list[Tensor]) -> Callable[[], Tensor]:
    """Documents as a batch, padded where their lengths differ."""
    input_ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    is_token = torch.nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in documents], batch_first=True)
    labels = input_ids.masked_fill(is_token == 0, -100)
    mask = None if bool(is_token.all()) else is_token
    return lambda: model(input_ids=input_ids, attention_mask=mask, labels=labels, use_cache=False).loss


def training_step(model: torch.nn.Module, loss_of: Callable[[], Tensor]) -> Side:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


WORKLOADS = {
    "one document of 16 windows": ([4096], 256),  # 64K tokens at the released window of 4096
    "documents of 100 to 1000 tokens": ([1000, 100, 430, 720, 210, 850, 330, 456], 128),
    "eight documents of 512 tokens": ([512] * 8, 128),
}


def measure_step(hidden_size: int, workload: str, rounds: int) -> dict[str, Any]:
    lengths, window = WORKLOADS[workload]
    config = tiny_config(hidden_size, window)
    documents = make_documents(lengths, config.vocab_size)
    torch.manual_seed(0)
    theirs = transformers.Cohere2MoeForCausalLM(transformers.Cohere2MoeConfig(**config.to_hf()))
    sides: dict[str, Side] = {}
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = load_checkpoint(directory, sliding_window_includes_current=True)
        sides["ours"] = training_step(ours, our_loss(ours, documents))
        for experts in ("eager", "grouped_mm"):
            model = transformers.Cohere2MoeForCausalLM.from_pretrained(
                directory, experts_implementation=experts, attn_implementation="sdpa"
            )
            sides[f"transformers_{experts}"] = training_step(model, their_loss(model, documents))
    losses = {name: side() for name, side in sides.items()}
    if max(losses.values()) - min(losses.values()) > 1e-4:
        raise SystemExit(f"not the same training step: {losses}")
    results = take_turns(sides, rounds)
    best = min(result["cpu_of_ours"] for name, result in results.items() if name != "ours")
    return {
        "hidden_size": hidden_size,
        "workload": workload,
        "tokens_per_cpu_s": {name: round(sum(lengths) / result["cpu_s"]) for name, result in results.items()},
        "transformers_best_of_ours": best,
        "sides": results,
    }


# ---- the loss --------------------------------------------------------------------------------------------------------

LOSS_SIZES = {64: 1024, 256: 1024, 512: 512, 1024: 512}  # rows at each width


def plain_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (hidden.float() @ weight.float().T).log_softmax(-1)
    with torch.no_grad():
        entropy = torch.special.entr(log_p.exp()).sum(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], entropy


def measure_loss(width: int, rows: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device=device).requires_grad_()
    weight = (torch.randn(VOCABULARY, width, generator=generator, device=device) / width**0.5).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows,), generator=generator, device=device)
    upstream = torch.rand(rows, generator=generator, device=device)
    peaks: dict[str, int] = {}
    gradients = {}

    def run(name: str, compute: Callable[[], tuple[Tensor, Any]]) -> Side:
        def side() -> None:
            hidden.grad = weight.grad = None
            with peak_memory(device) as peak:
                (compute()[0] * upstream).sum().backward()
            assert hidden.grad is not None
            peaks[name] = peak["bytes"] - hidden.nbytes - weight.nbytes
            gradients[name] = hidden.grad

        return side

    sides = {
        "ours": run("ours", lambda: token_logprobs(hidden, weight, targets, with_entropy=True)),
        "plain": run("plain", lambda: plain_logprobs(hidden, weight, targets)),
    }
    results = take_turns(sides, rounds)
    torch.testing.assert_close(gradients["ours"], gradients["plain"], atol=1e-4, rtol=1e-4)
    return {
        "width": width,
        "rows": rows,
        "extra_memory_mib": {name: round(peak / 2**20) for name, peak in peaks.items()},
        "plain_memory_of_ours": round(peaks["plain"] / peaks["ours"], 1),
        "sides": results,
    }


# ---- sliding attention -----------------------------------------------------------------------------------------------


def measure_attention(
    window: int, rounds: int, heads: int = 8, kv_heads: int = 2, head_dim: int = 32
) -> dict[str, Any]:
    tokens = 16 * window
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator, requires_grad=True)
    d_out = torch.randn(tokens, heads, head_dim, generator=generator)
    plan = plan_blocks([tokens], window, heads, kv_heads, torch.device("cpu"))
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    mask = torch.zeros(tokens, tokens).masked_fill_((distance < 0) | (distance >= window), -torch.inf)

    def dense() -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in qkv.split([heads, kv_heads, kv_heads], 1))
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)

    ours, theirs = block_attention(qkv, plan), dense()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    def forward_backward(attend: Callable[[], Tensor]) -> Side:
        return lambda: torch.autograd.grad(attend(), qkv, d_out)

    sides = {"ours": forward_backward(lambda: block_attention(qkv, plan)), "dense_mask": forward_backward(dense)}
    return {"window": window, "tokens": tokens, "sides": take_turns(sides, rounds)}


# ---- full width, on a GPU --------------------------------------------------------------------------------------------


def full_width_config(num_layers: int) -> NorthConfig:
    """The released shape (configs of transformers and ours), cut to ``num_layers``."""
    return NorthConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        prefix_dense_intermediate_size=3072,
        sliding_window=4096,
        sliding_window_includes_current=True,
    )


PEAK_BF16_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "B200": 2250e12}  # dense, by the makers' sheets


def step_flops(config: NorthConfig, lengths: list[int]) -> float:
    """Useful work of forward and backward: 6 per active parameter and token, 12 per head width and visible pair."""
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    attention = config.hidden_size * (qkv + config.num_attention_heads * config.head_dim)
    expert = 3 * config.hidden_size * config.intermediate_size
    dense = 3 * config.hidden_size * (config.prefix_dense_intermediate_size or 0)
    parameters, pairs = config.vocab_size * config.hidden_size, 0  # the head
    for layer in range(config.num_hidden_layers):
        router = config.num_experts * config.hidden_size
        sparse = config.num_experts_per_tok * expert + router
        parameters += attention + (dense if config.is_dense(layer) else sparse)
        for length in lengths:
            window = min(length, config.num_window_keys) if config.is_sliding(layer) else length
            pairs += window * (window + 1) // 2 + (length - window) * window
    heads = config.num_attention_heads * config.head_dim
    return 6.0 * parameters * sum(lengths) + 12.0 * heads * pairs


def documents_of(num_tokens: int) -> list[int]:
    """A half, a quarter and two eighths."""
    return [num_tokens // 2, num_tokens // 4, num_tokens // 8, num_tokens // 8]


def our_full_step(config: NorthConfig, lengths: list[int], device: str, dtype: torch.dtype) -> Side:
    with torch.device("meta"):
        model = NorthModel(config, ComputeConfig(checkpointing="full"))
    model.to(dtype).to_empty(device=device).reset_parameters()
    return training_step(model, our_loss(model, make_documents(lengths, config.vocab_size), device))


def their_full_step(config: NorthConfig, lengths: list[int], device: str, dtype: torch.dtype, attention: str) -> Side:
    """Packed by position ids, full checkpointing, grouped experts; the loss is ours, since theirs holds all logits."""
    with torch.device(device):
        model = transformers.Cohere2MoeForCausalLM._from_config(
            transformers.Cohere2MoeConfig(**config.to_hf()),
            attn_implementation=attention,
            experts_implementation="grouped_mm",
            dtype=dtype,
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    documents = make_documents(lengths, config.vocab_size)
    token_ids = torch.cat(documents).to(device)[None]
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)[None]
    rows = positions[0].roll(-1).nonzero()[:, 0]  # every token that is not its document's last
    targets = token_ids[0, rows + 1]

    def loss() -> Tensor:
        hidden = model.model(input_ids=token_ids, position_ids=positions, use_cache=False).last_hidden_state[0, rows]
        return -token_logprobs(hidden, model.get_input_embeddings().weight, targets, config.logit_scale)[0].mean()

    return training_step(model, loss)


THEIR_ATTENTION = ("flash_attention_3", "flash_attention_2", "flex_attention", "sdpa")


def attempt(make: Callable[[], Side], rounds: int) -> dict[str, Any]:
    """Seconds of a step and peak memory, or why there are none: it needs a package or memory that is absent."""
    try:
        with peak_memory("cuda" if torch.cuda.is_available() else "cpu") as peak:
            seconds = take_turns({"ours": make()}, rounds)["ours"]["wall_s"]
    except (ImportError, ValueError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        return {"not_measured": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return {"step_s": seconds, "peak_gib": round(peak["bytes"] / 2**30, 1)}


def measure_full_step(
    config: NorthConfig, num_tokens: int, rounds: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    lengths = documents_of(num_tokens)
    sides = {"ours": attempt(lambda: our_full_step(config, lengths, device, dtype), rounds)}
    for attention in THEIR_ATTENTION:
        sides[f"transformers_{attention}"] = attempt(
            lambda name=attention: their_full_step(config, lengths, device, dtype, name), rounds
        )
    flops = step_flops(config, lengths)
    for side in sides.values():
        if "step_s" in side:
            side |= {"tokens_per_s": round(num_tokens / side["step_s"], 1), "flops_per_s": flops / side["step_s"]}
            if peak := peak_flops():
                side["model_flops_utilisation"] = round(side["flops_per_s"] / peak, 4)
    return {"layers": config.num_hidden_layers, "tokens": num_tokens, "sides": sides}


def peak_flops() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((flops for part, flops in PEAK_BF16_FLOPS.items() if part in name), None)


def measure_expert_block(
    config: NorthConfig, num_tokens: int, rounds: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Rates of useful arithmetic: forward and backward of the experts, balanced as random tokens are, and ``a @ b``."""
    hidden, width, experts = config.hidden_size, config.intermediate_size, config.num_experts

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).mul_(0.02).requires_grad_()

    x, gate_up, down = normal(num_tokens, hidden), normal(experts, 2 * width, hidden), normal(experts, hidden, width)
    scores = torch.rand(num_tokens, experts, device=device)
    weights, expert_ids = scores.topk(config.num_experts_per_tok)
    d_out = torch.randn_like(x)
    a, b = (torch.randn(4 * hidden, 4 * hidden, device=device, dtype=dtype) for _ in range(2))

    def block() -> None:
        torch.autograd.grad(
            mixture_of_experts(x, weights, expert_ids, gate_up, down, "grouped"), [x, gate_up, down], d_out
        )

    results = take_turns({"ours": block, "dense": lambda: a @ b}, rounds)
    experts_rate = 18.0 * num_tokens * config.num_experts_per_tok * hidden * width / results["ours"]["wall_s"]
    dense_rate = 2.0 * (4 * hidden) ** 3 / results["dense"]["wall_s"]
    return {"experts_flops_per_s": experts_rate, "dense_flops_per_s": dense_rate, "share": experts_rate / dense_rate}


def measure_loss_memory(
    config: NorthConfig, num_tokens: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """Peak above the inputs, gradients included."""
    hidden = torch.randn(num_tokens, config.hidden_size, device=device, dtype=dtype).requires_grad_()
    weight = torch.randn(config.vocab_size, config.hidden_size, device=device, dtype=dtype).mul_(0.02).requires_grad_()
    targets = torch.randint(config.vocab_size, (num_tokens,), device=device)
    with peak_memory(device) as peak:
        token_logprobs(hidden, weight, targets, with_entropy=True)[0].sum().backward()
    return {"tokens": num_tokens, "peak_gb": round(peak["bytes"] / 1e9, 2)}


def longest_row(make: Callable[[int], Side], first: int, last: int) -> dict[str, Any]:
    """The most tokens, doubling from ``first``, whose step runs; and what stopped the next."""
    fits, stopped_by = 0, "not tried beyond"
    tokens = first
    while tokens <= last:
        result = attempt(lambda count=tokens: make(count), 1)
        if "not_measured" in result:
            stopped_by = result["not_measured"]
            break
        fits, tokens = tokens, 2 * tokens
    return {"tokens": fits, "stopped_by": stopped_by}


def measure_on_gpu(rounds: int) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"not_measured": "no GPU at hand"}
    device, dtype = "cuda", torch.bfloat16
    context = {
        "ours": longest_row(lambda n: our_full_step(full_width_config(5), documents_of(n), device, dtype), 2**14, 2**21)
    }
    for name in THEIR_ATTENTION:
        context[f"transformers_{name}"] = longest_row(
            lambda n, attention=name: their_full_step(full_width_config(5), documents_of(n), device, dtype, attention),
            2**14,
            2**21,
        )
    return {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "step": [
            measure_full_step(full_width_config(layers), tokens, rounds)
            for layers in (5, 9)
            for tokens in (2**16, 2**17)
        ],
        "expert_block": measure_expert_block(full_width_config(5), 2**16, rounds),
        "loss_128k": measure_loss_memory(full_width_config(5), 2**17),
        "longest_row": context,
    }


# ---- the report ------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["step", "loss", "attention", "gpu"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/model.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rounds = arguments.rounds
    report: dict[str, Any] = {"machine": machine(), "threads": arguments.threads, "rounds": rounds}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for part, measurement in measurements(arguments.parts, rounds):
        report.setdefault(part, []).append(measurement)
        print(part, json.dumps(measurement), flush=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {arguments.output}")


def measurements(parts: list[str], rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if "attention" in parts:
        for window in (128, 256, 512):
            yield "attention", measure_attention(window, rounds)
    if "step" in parts:
        for hidden_size in (64, 128):
            for workload in WORKLOADS:
                yield "step", measure_step(hidden_size, workload, rounds)
    if "loss" in parts:
        for width, rows in LOSS_SIZES.items():
            yield "loss", measure_loss(width, rows, rounds=min(rounds, 2))
    if "gpu" in parts:
        yield "gpu", measure_on_gpu(rounds)


if __name__ == "__main__":
    main()
