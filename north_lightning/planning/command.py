"""The ``estimate`` command: will it fit, how fast can it be, and if it does not fit, what would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

from north_lightning.planning.flops import flops_per_token, tokens_per_second
from north_lightning.planning.memory import MemoryEstimate, estimate_memory, kv_bytes_per_sequence
from north_lightning.planning.setup import TrainingSetup, read_setup
from north_lightning.planning.sizes import active_parameters, count_parameters
from north_lightning.types import Count, Fraction, Positive

GB = 1e9
NOTES = {
    "weights": "as stored by this process",
    "gathered": "copies to compute with: layers in flight, embedding, adapters' sums",
    "gradients": "stored, and of the layer in flight",
    "optimizer": "moments",
    "activations": "kept for the backward pass, and of the layer in flight",
    "logits": "one chunk, and the head's gradient",
    "runtime": "assumed: CUDA, NCCL, fragmentation",
}


def estimate(
    config: Path,
    gpus: Count | None = None,
    gpu_memory: Positive = 141.0,
    tflops: Positive = 989.0,
    mfu: Fraction = 0.35,
    shape: Path | None = None,
) -> None:
    """Print memory per GPU by part, arithmetic and speed of a training run; nothing is built and no GPU is needed.

    Args:
        config: The YAML of ``fit``.
        gpus: Number of GPUs that train; default: what the config says.
        gpu_memory: Memory of one GPU in GB (H200: 141, H100: 80).
        tflops: Dense bfloat16 peak of one GPU in TFLOP/s (H100 and H200: 989).
        mfu: Model FLOPs utilisation that the speed is computed for (0.35 is the best published at 64K tokens).
        shape: The model's ``config.json``; default: the config's, or ``model.json`` beside it.
    """
    setup, shape_file = read_setup(config, gpus, shape)
    print("\n".join(report(setup, shape_file, gpu_memory, tflops, mfu)))


def report(setup: TrainingSetup, shape_file: Path, gpu_memory: float, tflops: float, mfu: float) -> Iterator[str]:
    """The lines that ``estimate`` prints."""
    counts = count_parameters(setup.config)
    active = active_parameters(setup.config)
    yield f"model        {counts.total:,} parameters, {active / 1e9:.2f}B active ({shape_file})"
    yield f"processes    {_mesh(setup)}"
    yield (
        f"training     rows of {setup.row_tokens:,} tokens, checkpointing {setup.checkpointing}, {setup.optimizer}"
        + (f", adapters of rank {setup.lora_rank} on {' and '.join(setup.lora_targets)}" if setup.lora_rank else "")
    )
    yield f"precision    {setup.precision}"
    yield ""
    memory = estimate_memory(setup)
    yield f"memory of one process, GB (of {gpu_memory:g})"
    for field in fields(MemoryEstimate):
        yield f"  {field.name:<12}{getattr(memory, field.name) / GB:8.1f}   {NOTES[field.name]}"
    yield f"  {'total':<12}{memory.total / GB:8.1f}"
    yield ""
    flops = flops_per_token(setup.config, setup.row_tokens)
    speed = tokens_per_second(flops, setup.num_processes, tflops, mfu)
    yield (
        f"arithmetic   {flops.total / 1e9:.1f} GFLOP per token, {flops.attention / flops.total:.0%} of it attention "
        f"(documents as long as a row)"
    )
    yield f"speed        {speed:,.0f} tokens/s at {mfu:.0%} MFU of {setup.num_processes} x {tflops:g} TFLOP/s"
    kv = kv_bytes_per_sequence(setup.config, setup.row_tokens)
    yield f"sampler      {kv / GB:.2f} GB of key-value cache for a sequence of {setup.row_tokens:,} tokens (bfloat16)"
    yield ""
    if memory.total <= gpu_memory * GB:
        yield f"fits: {gpu_memory - memory.total / GB:.1f} GB to spare on every GPU"
        return
    yield f"does not fit: {memory.total / GB - gpu_memory:.1f} GB too much on every GPU. What would fit:"
    advice = list(changes_that_fit(setup, gpu_memory * GB))
    yield from (f"  {line}" for line in advice or ["nothing known: a smaller model, or another machine"])


def _mesh(setup: TrainingSetup) -> str:
    if not setup.sharded:
        return f"{setup.replicate}, each with the whole model"
    sizes = {name: getattr(setup, name) for name in ("replicate", "shard", "context", "expert", "tensor")}
    return f"{setup.num_processes}: " + ", ".join(f"{name} {size}" for name, size in sizes.items())


Change = tuple[str, Callable[[TrainingSetup], TrainingSetup | None]]


def changes_that_fit(setup: TrainingSetup, memory_bytes: float) -> Iterator[str]:
    """Single changes that make ``setup`` fit, mildest first; if none does, several together; adapters last."""

    def fits(candidate: TrainingSetup) -> bool:
        return estimate_memory(candidate).total <= memory_bytes

    def line(words: str, candidate: TrainingSetup) -> str:
        where = f" on {candidate.num_processes} GPUs" if candidate.num_processes != setup.num_processes else ""
        return f"{words}{where}: {estimate_memory(candidate).total / GB:.1f} GB"

    changes = [*CHANGES, ("more GPUs", lambda further: _more_gpus(further, memory_bytes))]
    single = [(name, alone) for name, change in changes if (alone := change(setup)) is not None and fits(alone)]
    yield from (line(*each) for each in single)
    taken, words = setup, list[str]()
    for name, change in changes if not single else []:
        further = change(taken)
        if further is None or estimate_memory(further).total >= estimate_memory(taken).total:
            continue
        taken, words = further, [*words, name]
        if fits(taken):
            yield line("; and ".join(words), taken)
            break
    if (adapted := _adapters(setup)) is not None and fits(adapted):
        yield line("model.lora: adapters of rank 16, on bfloat16 weights", adapted)


def _full_checkpointing(setup: TrainingSetup) -> TrainingSetup | None:
    return replace(setup, checkpointing="full") if setup.checkpointing in ("none", "selective") else None


def _offload(setup: TrainingSetup) -> TrainingSetup | None:
    return replace(setup, checkpointing="offload") if setup.checkpointing != "offload" else None


def _double_context(setup: TrainingSetup) -> TrainingSetup | None:
    """Two GPUs share a row, on as many GPUs as before."""
    if not setup.sharded or setup.shard % 2:
        return None
    return replace(setup, context=2 * setup.context, shard=setup.shard // 2)


def _eight_bit_moments(setup: TrainingSetup) -> TrainingSetup | None:
    if setup.moment_bytes <= 2.06:
        return None
    return replace(setup, moment_bytes=2.06, optimizer="AdamW8bit")


def _bfloat16(setup: TrainingSetup) -> TrainingSetup | None:
    """Weights, gradients and moments; needs stochastic rounding."""
    if setup.parameter_bytes == 2:
        return None
    return replace(setup, parameter_bytes=2, compute_bytes=2, moment_bytes=min(setup.moment_bytes, 4.0))


def _more_gpus(setup: TrainingSetup, memory_bytes: float) -> TrainingSetup | None:
    """The model cut over twice, four times, ... as many, until it fits; None where that never helps."""
    candidates = [replace(setup, shard=setup.shard * 2**doublings) for doublings in range(1, 11)]
    fitting = (candidate for candidate in candidates if estimate_memory(candidate).total <= memory_bytes)
    return next(fitting, None) if setup.sharded else None


def _adapters(setup: TrainingSetup) -> TrainingSetup | None:
    if setup.lora_rank:
        return None
    targets = ("attention", "experts")
    return replace(setup, lora_rank=16, lora_targets=targets, moment_bytes=8.0, parameter_bytes=2, compute_bytes=2)


CHANGES: list[Change] = [
    ("model.compute.checkpointing: full", _full_checkpointing),
    ("model.compute.checkpointing: offload", _offload),
    ("strategy.context doubled and strategy.shard halved", _double_context),
    ("optimizer: torchao.optim.AdamW8bit", _eight_bit_moments),
    (
        "bfloat16 weights (trainer.precision: bf16-true, or strategy.parameter_dtype: bfloat16), with the optimizer's "
        "bf16_stochastic_round: true",
        _bfloat16,
    ),
]
