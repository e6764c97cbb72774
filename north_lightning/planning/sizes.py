"""Numbers of parameters and of keys, from a ``NorthConfig``.

Letters as in the model: D model, E experts, K experts per token, F expert width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from north_lightning.model.config import NorthConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by kind; ``largest_layer`` is what is gathered at a time."""

    embedding: int
    attention: int  # of all layers, as everything below
    dense_mlp: int
    router: int
    experts: int
    norms: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.dense_mlp + self.router + self.experts + self.norms


def count_parameters(config: NorthConfig) -> ParameterCounts:
    """The whole model's; 30,484,303,872 in all for the released shape."""
    width, layers, dense = config.hidden_size, config.num_hidden_layers, config.num_dense_layers
    assert config.prefix_dense_intermediate_size is not None
    return ParameterCounts(
        embedding=config.vocab_size * width,
        attention=layers * attention_parameters(config),
        dense_mlp=dense * 3 * width * config.prefix_dense_intermediate_size,
        router=(layers - dense) * config.num_experts * width,
        experts=(layers - dense) * config.num_experts * expert_parameters(config),
        norms=(layers + 1) * width,
    )


def attention_parameters(config: NorthConfig) -> int:
    """Of one layer: queries, keys, values and output."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * heads * config.head_dim


def expert_parameters(config: NorthConfig) -> int:
    """Of one expert: gate, up and down."""
    return 3 * config.hidden_size * config.intermediate_size


def active_parameters(config: NorthConfig) -> int:
    """Matrix entries that one token is multiplied with, the head included."""
    counts = count_parameters(config)
    visited = counts.experts // config.num_experts * config.num_experts_per_tok
    return counts.embedding + counts.attention + counts.dense_mlp + counts.router + visited


def lora_parameters(config: NorthConfig, rank: int, targets: tuple[str, ...]) -> int:
    """Of adapters: ``rank * (input + output width)`` for every adapted matrix."""
    width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    per_layer = per_expert = 0
    if "attention" in targets:
        outputs = [heads, kv_heads, kv_heads]
        per_layer = sum(width + n * config.head_dim for n in outputs) + heads * config.head_dim + width
    if "experts" in targets:  # gate and up share one
        per_expert = (width + 2 * config.intermediate_size) + (config.intermediate_size + width)
    sparse = config.num_hidden_layers - config.num_dense_layers
    return rank * (config.num_hidden_layers * per_layer + sparse * config.num_experts * per_expert)


def mean_keys(num_tokens: int, window: int | None) -> float:
    """Keys that a token of one document sees, on average over its ``num_tokens``; ``window`` None: all before it."""
    if window is None or window >= num_tokens:
        return (num_tokens + 1) / 2
    return (window * (window + 1) / 2 + (num_tokens - window) * window) / num_tokens


def layer_keys(config: NorthConfig, layer: int, num_tokens: int) -> float:
    return mean_keys(num_tokens, config.num_window_keys if config.is_sliding(layer) else None)
