"""Memory of one process while it trains, by part; the largest that it holds at a time.

Every term says what it counts. Measured against real peaks by ``tests/benchmarks/bench_estimate.py``; what is not
computed but assumed is named in capitals below.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from north_lightning.model.config import NorthConfig
from north_lightning.planning.setup import TrainingSetup
from north_lightning.planning.sizes import (
    attention_parameters,
    count_parameters,
    expert_parameters,
    lora_parameters,
)

RUNTIME_BYTES = 4e9
"""ASSUMED on a GPU: CUDA context, NCCL buffers, kernels' workspace, fragmentation."""

BACKWARD_FACTOR = 1.5
"""ASSUMED: what a layer needs while its backward pass runs, relative to what it keeps for it: gradients of its largest
activations come and go while these are still there."""

TILE_BYTES = {"cpu": 2**21, "cuda": 2**27}
"""Logits held at once, in float32 (``losses.logprobs``)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process, by part; the parts add up to ``total``."""

    weights: float  # as stored by this process
    gathered: float  # copies for computing: the layers in flight, the embedding, adapters' sums
    gradients: float
    optimizer: float
    activations: float
    logits: float
    runtime: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_memory(setup: TrainingSetup) -> MemoryEstimate:
    """The peak of one process in a training step."""
    counts = count_parameters(setup.config)
    parts = setup.num_parts
    trained = lora_parameters(setup.config, setup.lora_rank, setup.lora_targets) if setup.lora_rank else counts.total
    trained_bytes = 4 if setup.lora_rank else setup.parameter_bytes
    adapters = 4 * trained if setup.lora_rank else 0
    gathered, gathered_gradients = _gathered(setup)
    return MemoryEstimate(
        weights=counts.total * setup.parameter_bytes / parts + adapters,
        gathered=gathered,
        gradients=trained * trained_bytes / parts + gathered_gradients,
        optimizer=trained * setup.moment_bytes / parts,
        activations=_activations(setup),
        logits=_logits(setup),
        runtime=RUNTIME_BYTES if setup.on_gpu else 0,
    )


def _gathered(setup: TrainingSetup) -> tuple[float, float]:
    """Weights beyond the stored ones, and their gradients before they are stored.

    FSDP holds two layers at a time (one computes, the next is fetched) and the embedding, which is the head, all the
    time; a layer's gradient is whole, in float32, until it is reduced. Adapters make one layer's sums and the gradients
    of these. Autocast copies matrices to the dtype it computes in (on a CPU the experts' are not).
    """
    config = setup.config
    experts = config.num_experts * expert_parameters(config) / (setup.expert if setup.sharded else 1)
    layer = attention_parameters(config) + experts
    if setup.sharded and setup.num_parts > 1:
        embedding = config.vocab_size * config.hidden_size
        return setup.compute_bytes * (2 * layer + embedding), (setup.compute_bytes + 4) * layer + 4 * embedding
    if setup.lora_rank:
        return setup.parameter_bytes * layer, setup.parameter_bytes * layer
    if setup.compute_bytes < setup.parameter_bytes:  # autocast keeps a copy of every matrix for the backward pass
        counts, is_recomputed = count_parameters(config), setup.checkpointing != "none"
        kept = config.num_experts * expert_parameters(config) if is_recomputed else counts.experts
        cast = counts.attention + counts.dense_mlp + counts.router + (kept if setup.on_gpu else 0)
        return float(setup.compute_bytes * cast), 0.0
    return 0.0, 0.0


# ---- activations -----------------------------------------------------------------------------------------------------


def _activations(setup: TrainingSetup) -> float:
    """What all layers keep until the backward pass, and what the one layer needs whose backward pass is running."""
    config, tokens = setup.config, setup.tokens_here
    layers = range(config.num_hidden_layers)
    inside = [kept_by_attention(setup, layer) + kept_by_mlp(setup, layer) for layer in layers]
    own_input = float(setup.compute_bytes * config.hidden_size * tokens)
    running = BACKWARD_FACTOR * max(inside)
    match setup.checkpointing:
        case "none":
            return sum(inside) + running - max(inside)
        case "selective":  # the MLP starts again from the normed input, which the attention keeps anyway
            return sum(kept_by_attention(setup, layer) for layer in layers) + running
        case "full":
            return own_input * len(layers) + running
        case _:  # offload: inputs lie in the host's memory; two are on their way
            return 2 * own_input + running


def kept_by_attention(setup: TrainingSetup, layer: int) -> float:
    """Bytes that norm and attention of one layer keep: normed and unnormed input, queries, keys, values and output."""
    config, size, tokens = setup.config, setup.compute_bytes, setup.tokens_here
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    normed = size * config.hidden_size
    unnormed = 4 * config.hidden_size + 4  # norms are computed in float32
    qkv = (heads + 2 * kv_heads) * width
    out = size * heads * width
    if setup.on_gpu:
        rotated = (heads + kv_heads) * width if config.uses_rope(layer) else 0
        return tokens * (normed + unnormed + size * (qkv + rotated) + out + 4 * heads)
    return tokens * (normed + unnormed + out + 4 * qkv)  # queries, keys and values by blocks, in float32


def kept_by_mlp(setup: TrainingSetup, layer: int) -> float:
    """Bytes that one layer's MLP keeps beyond the normed input."""
    config, size, tokens = setup.config, setup.compute_bytes, setup.tokens_here
    if config.is_dense(layer):
        assert config.prefix_dense_intermediate_size is not None
        return tokens * size * 3 * config.prefix_dense_intermediate_size
    top_k, width = config.num_experts_per_tok, config.intermediate_size
    router = 4 * config.num_experts + 8 * top_k
    gate_up = size * 2 * width
    if not setup.on_gpu:
        return tokens * (router + top_k * (gate_up + 4 + 2 * 8))
    copies = size * (config.hidden_size + width)  # the tokens sorted by expert, and the weighted hidden activation
    return tokens * (router + top_k * (copies + gate_up + 4 * 4 * width + 8))  # SwiGLU is computed in float32


def _logits(setup: TrainingSetup) -> float:
    """Two tiles of logits, the float32 gradient of the hidden states, and the gradient of the head."""
    config = setup.config
    tile = TILE_BYTES["cuda" if setup.on_gpu else "cpu"]
    stored = setup.compute_bytes if setup.sharded else setup.parameter_bytes
    head = 0 if setup.lora_rank else stored * config.vocab_size * config.hidden_size
    return 2 * tile + 4 * setup.tokens_here * config.hidden_size + head


def kv_bytes_per_sequence(config: NorthConfig, context_tokens: int, element_bytes: int = 2) -> float:
    """Key-value cache of one sequence in the sampler; sliding layers keep their window only."""
    tokens = sum(
        min(context_tokens, config.num_window_keys) if config.is_sliding(layer) else context_tokens
        for layer in range(config.num_hidden_layers)
    )
    return 2.0 * config.num_key_value_heads * config.head_dim * element_bytes * tokens
