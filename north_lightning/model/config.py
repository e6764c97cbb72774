"""The shape of a North model.

In: Hugging Face's ``cohere2_moe`` ``config.json``, or keyword arguments. Out: a validated, frozen ``NorthConfig`` whose
field names are Hugging Face's, and ``to_hf()`` for a ``config.json`` that transformers and vLLM load. Knows no tensors.

Anything in a Hugging Face config that would change the numbers and that this implementation does not do (shared
experts, softmax routing, RoPE scaling, biases, an untied head, quantized weights) is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

from north_lightning.errors import CheckpointError, ConfigError
from north_lightning.untrusted import read_json

LayerType = Literal["full_attention", "sliding_attention"]
MLPType = Literal["dense", "sparse"]

MODEL_TYPE: Final = "cohere2_moe"
ARCHITECTURE: Final = "Cohere2MoeForCausalLM"

# What Hugging Face's class assumes for a key that the file leaves out; the family's defaults, which are not North's.
_HF_DEFAULTS: Final[Mapping[str, Any]] = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "head_dim": 128,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "num_experts_per_tok": 2,
    "num_experts": 8,
    "prefix_dense_sliding_window_pattern": 1,
    "sliding_window_pattern": 4,
    "norm_topk_prob": True,
    "rms_norm_eps": None,
}

# Keys with one supported value: (value that the file must have, value assumed when it leaves the key out).
_FIXED: Final[Mapping[str, tuple[Any, Any]]] = {
    "model_type": (MODEL_TYPE, None),
    "hidden_act": ("silu", "silu"),
    "expert_selection_fn": ("sigmoid", "softmax"),
    "num_shared_experts": (0, 0),
    "attention_bias": (False, False),
    "attention_dropout": (0.0, 0.0),
    "rope_scaling": (None, None),
    "tie_word_embeddings": (True, True),
    "quantization_config": (None, None),
}

_POSITIVE_INTEGERS: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "prefix_dense_intermediate_size",
    "sliding_window",
    "max_position_embeddings",
)


_MOST: Final = {"num_hidden_layers": 1024, "num_experts": 4096}
"""Every layer and expert costs memory here before a weight has been read."""


@dataclass(frozen=True)
class NorthConfig:
    """A North-shaped model: every field is named as in Hugging Face's config, except the last.

    Args:
        vocab_size: rows of the embedding, which is also the output head.
        hidden_size: width of the residual stream.
        intermediate_size: width of one expert.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides ``num_attention_heads``.
        head_dim: width of one head, even; ``num_attention_heads * head_dim`` need not be ``hidden_size``.
        num_experts: experts of each sparse layer.
        num_experts_per_tok: experts that each token visits.
        prefix_dense_intermediate_size: width of the dense layers' MLP; default: ``intermediate_size``.
        first_k_dense_replace: number of leading layers with a dense MLP; only used where ``mlp_layer_types`` or
            ``layer_types`` is left out.
        sliding_window_pattern: every n-th layer after the dense ones attends globally (``layer_types`` left out).
        prefix_dense_sliding_window_pattern: the same for the dense layers; 1 makes them global *with* RoPE.
        layer_types: ``full_attention`` or ``sliding_attention`` for each layer; default: from the patterns.
        mlp_layer_types: ``dense`` or ``sparse`` for each layer, dense ones first; default: ``first_k_dense_replace``.
        sliding_window: the window of the sliding layers, see ``sliding_window_includes_current``.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: epsilon of RMSNorm; None switches every norm to LayerNorm without bias.
        layer_norm_eps: epsilon of LayerNorm.
        norm_topk_prob: divide the chosen experts' sigmoid weights by their sum.
        logit_scale: factor on the logits, applied by whoever computes them.
        max_position_embeddings: longest document.
        initializer_range: standard deviation of random weights; 1 / sqrt(hidden_size) suits a fresh model.
        bos_token_id: first token of a conversation.
        pad_token_id: never part of a packed row.
        eos_token_id: end of a turn; a list where there are several.
        sliding_window_includes_current: how ``sliding_window`` counts. False (the sampler's convention, the one the
            released model was trained with): a token sees ``sliding_window`` tokens before it *and* itself, so
            ``sliding_window + 1`` keys. True (transformers' reading): ``sliding_window`` keys in all.

    Raises:
        ConfigError: a value that cannot work, naming the key.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    prefix_dense_intermediate_size: int | None = None
    first_k_dense_replace: int | None = None
    sliding_window_pattern: int = 4
    prefix_dense_sliding_window_pattern: int = 1
    layer_types: tuple[LayerType, ...] | None = None
    mlp_layer_types: tuple[MLPType, ...] | None = None
    sliding_window: int = 4096
    rope_theta: float = 50000.0
    rms_norm_eps: float | None = 1e-6
    layer_norm_eps: float = 1e-5
    norm_topk_prob: bool = False
    logit_scale: float = 1.0
    max_position_embeddings: int = 500000
    initializer_range: float = 0.02
    bos_token_id: int | None = 5
    pad_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 255001
    sliding_window_includes_current: bool = False

    def __post_init__(self) -> None:
        """Fill in what was left out, then validate."""
        set_field = object.__setattr__  # the dataclass is frozen for everyone else
        if self.prefix_dense_intermediate_size is None:
            set_field(self, "prefix_dense_intermediate_size", self.intermediate_size)
        if isinstance(self.eos_token_id, list):
            set_field(self, "eos_token_id", tuple(self.eos_token_id))
        self._validate_numbers()
        set_field(self, "mlp_layer_types", self._checked_mlp_layer_types())
        set_field(self, "first_k_dense_replace", self.num_dense_layers)
        set_field(self, "layer_types", self._checked_layer_types())

    # ---- what the layers ask ---------------------------------------------------------------------------------------

    @property
    def num_dense_layers(self) -> int:
        assert self.mlp_layer_types is not None
        return self.mlp_layer_types.count("dense")

    @property
    def num_window_keys(self) -> int:
        """Keys that a token of a sliding layer sees, itself included."""
        return self.sliding_window if self.sliding_window_includes_current else self.sliding_window + 1

    def is_dense(self, layer: int) -> bool:
        assert self.mlp_layer_types is not None
        return self.mlp_layer_types[layer] == "dense"

    def is_sliding(self, layer: int) -> bool:
        assert self.layer_types is not None
        return self.layer_types[layer] == "sliding_attention"

    def uses_rope(self, layer: int) -> bool:
        """Sliding layers rotate; full layers have no positions, except the dense prefix (pattern 1)."""
        return self.is_sliding(layer) or (self.is_dense(layer) and self.prefix_dense_sliding_window_pattern == 1)

    # ---- in and out ------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, directory: str | Path, *, sliding_window_includes_current: bool = False) -> NorthConfig:
        """Read ``directory/config.json`` (or the file itself).

        Raises:
            CheckpointError: no such file, or not JSON.
            ConfigError: a config that this implementation does not do.
        """
        path = Path(directory)
        if path.is_dir():
            path = path / "config.json"
        if not path.is_file():
            raise CheckpointError(f"no config.json: expected a Hugging Face checkpoint directory, got {directory}")
        hf_config = read_json(path, CheckpointError)
        try:
            return cls.from_hf(hf_config, sliding_window_includes_current=sliding_window_includes_current)
        except ConfigError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError) as error:  # a value of another type
            raise ConfigError(f"{path}: expected a cohere2_moe config, got: {error}") from error

    @classmethod
    def from_hf(cls, hf_config: Mapping[str, Any], *, sliding_window_includes_current: bool = False) -> NorthConfig:
        """Read a ``cohere2_moe`` config; missing keys mean what they mean to Hugging Face's class."""
        for key, (supported, default) in _FIXED.items():
            if hf_config.get(key, default) != supported:
                raise ConfigError(f"{key}: only {supported!r} is supported, got {hf_config.get(key, default)!r}")
        values = {key: hf_config.get(key, default) for key, default in _HF_DEFAULTS.items()}
        values["rope_theta"] = _rope_theta(hf_config)
        values["num_key_value_heads"] = hf_config.get("num_key_value_heads") or values["num_attention_heads"]
        values["prefix_dense_intermediate_size"] = hf_config.get("prefix_dense_intermediate_size")
        values["first_k_dense_replace"] = hf_config.get("first_k_dense_replace", 0)
        for key in ("layer_types", "mlp_layer_types"):
            values[key] = None if hf_config.get(key) is None else tuple(hf_config[key])
        if values["layer_types"] is None and values["mlp_layer_types"] is not None:
            num_dense = values["mlp_layer_types"].count("dense")
            if num_dense != values["first_k_dense_replace"]:
                raise ConfigError(
                    f"layer_types: needed beside mlp_layer_types, unless first_k_dense_replace says {num_dense} too"
                )
        return cls(**values, sliding_window_includes_current=sliding_window_includes_current)

    def to_hf(self) -> dict[str, Any]:
        """Every key spelled out, so that no reader falls back to the family's defaults."""
        own_keys = {"sliding_window_includes_current"}
        hf_config: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name not in own_keys
        }
        for key in ("layer_types", "mlp_layer_types"):
            hf_config[key] = list(hf_config[key])
        if isinstance(self.eos_token_id, tuple):
            hf_config["eos_token_id"] = list(self.eos_token_id)
        hf_config |= {key: supported for key, (supported, _) in _FIXED.items() if supported is not None}
        hf_config |= {
            "architectures": [ARCHITECTURE],
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "use_cache": True,
        }
        return dict(sorted(hf_config.items()))

    def with_transformers_window(self) -> NorthConfig:
        """The same model with transformers' reading of ``sliding_window``."""
        return replace(self, sliding_window_includes_current=True)

    # ---- validation ------------------------------------------------------------------------------------------------

    def _validate_numbers(self) -> None:
        for key in _POSITIVE_INTEGERS:
            value = getattr(self, key)
            most = _MOST.get(key, 2**31)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ConfigError(f"{key}: expected a positive integer up to {most}, got {value!r}"[:200])
        for key in ("sliding_window_pattern", "prefix_dense_sliding_window_pattern"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{key}: expected a positive integer, got {value!r}")
        for key in ("rope_theta", "layer_norm_eps", "initializer_range", "logit_scale", "rms_norm_eps"):
            value = getattr(self, key)
            if key == "rms_norm_eps" and value is None:
                continue
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise ConfigError(f"{key}: expected a positive number, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads: expected a divisor of num_attention_heads ({self.num_attention_heads}), "
                f"got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: expected an even number (RoPE rotates pairs), got {self.head_dim}")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok: expected at most num_experts ({self.num_experts}), "
                f"got {self.num_experts_per_tok}"
            )

    def _checked_mlp_layer_types(self) -> tuple[MLPType, ...]:
        num_dense = 1 if self.first_k_dense_replace is None else self.first_k_dense_replace
        if self.mlp_layer_types is None:
            if not 0 <= num_dense <= self.num_hidden_layers:
                raise ConfigError(
                    f"first_k_dense_replace: expected 0 to num_hidden_layers ({self.num_hidden_layers}), "
                    f"got {num_dense}"
                )
            return tuple("dense" if i < num_dense else "sparse" for i in range(self.num_hidden_layers))
        types: tuple[MLPType, ...] = tuple(self.mlp_layer_types)
        self._check_per_layer("mlp_layer_types", types, get_args(MLPType))
        if "dense" in types[types.count("dense") :]:
            raise ConfigError(f"mlp_layer_types: expected dense layers first, then sparse ones, got {list(types)}")
        return types

    def _checked_layer_types(self) -> tuple[LayerType, ...]:
        if self.layer_types is not None:
            types = tuple(self.layer_types)
            self._check_per_layer("layer_types", types, get_args(LayerType))
            return types

        def pattern(num_layers: int, every: int) -> tuple[LayerType, ...]:
            return tuple("sliding_attention" if (i + 1) % every else "full_attention" for i in range(num_layers))

        num_dense = self.num_dense_layers
        return pattern(num_dense, self.prefix_dense_sliding_window_pattern) + pattern(
            self.num_hidden_layers - num_dense, self.sliding_window_pattern
        )

    def _check_per_layer(self, key: str, types: tuple[str, ...], allowed: tuple[str, ...]) -> None:
        unknown = set(types) - set(allowed)
        if unknown:
            raise ConfigError(f"{key}: expected entries of {allowed}, got {sorted(unknown)}")
        if len(types) != self.num_hidden_layers:
            raise ConfigError(f"{key}: expected one entry per layer ({self.num_hidden_layers}), got {len(types)}")


def _rope_theta(hf_config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies, from either of the two places where versions of transformers keep it."""
    parameters = hf_config.get("rope_parameters") or {}
    if parameters.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_parameters.rope_type: only 'default' is supported, got {parameters['rope_type']!r}")
    candidates = {float(d["rope_theta"]) for d in (parameters, hf_config) if d.get("rope_theta") is not None}
    if len(candidates) > 1:
        raise ConfigError(f"rope_theta: rope_parameters and the top level disagree: {sorted(candidates)}")
    return candidates.pop() if candidates else float(_HF_DEFAULTS["rope_theta"])
