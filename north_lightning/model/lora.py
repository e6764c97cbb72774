"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) for attention and experts, and PEFT's files for them.

In: a ``NorthModel``; or the folder of an adapter that this module or PEFT wrote. Out: the same model, in place, with
everything frozen but the adapters; or such a folder. Not here: which optimizer trains them.

A weight ``W`` becomes ``W + alpha / rank * B A``, computed where a layer asks for the weight. So every kernel works
with adapters unchanged, and whoever reads the model's weights (``named_hf_tensors``: export, weight pushes) reads the
merged ones, bit for bit those the trainer computes with. The price: while a layer runs, its sum is one more copy of its
weights, and another one for its gradient (1.2 GB each for a layer of the released shape in bfloat16); activation
checkpointing keeps that at one layer at a time.

On disk the layout is PEFT's for transformers' ``cohere2_moe``: ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` are
modules with an adapter each, ``mlp.experts.gate_up_proj`` and ``.down_proj`` three-dimensional parameters with an
adapter for every expert. Dropout is not supported: it cannot be written as a sum of weights.

Shapes: E experts, O and I output and input width of a weight, R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from north_lightning.errors import CheckpointError, ConfigError
from north_lightning.model.checkpoint import fingerprint
from north_lightning.model.decoder import DecoderLayer, NorthModel
from north_lightning.model.experts import MoE
from north_lightning.types import Count, Positive
from north_lightning.untrusted import read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

Target = Literal["attention", "experts"]
_MODULES: Mapping[str, list[str]] = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "experts": []}
_PARAMETERS: Mapping[str, list[str]] = {
    "attention": [],
    "experts": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}


@dataclass(frozen=True)
class LoRAConfig:
    """What is adapted, and by how much.

    Args:
        rank: Inner width of every adapter.
        alpha: Adapters are multiplied by ``alpha / rank``.
        targets: ``attention`` (queries, keys, values, output), ``experts`` (all three matrices of each), or both.
    """

    rank: Count = 16
    alpha: Positive = 32.0
    targets: tuple[Target, ...] = ("attention", "experts")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank: expected at least 1, got {self.rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"lora.alpha: expected a finite number above 0, got {self.alpha}")
        unknown = set(self.targets) - set(get_args(Target))
        if unknown or not self.targets:
            raise ConfigError(f"lora.targets: expected some of {list(get_args(Target))}, got {list(self.targets)}")


class LowRankUpdate(nn.Module):
    """``W + scale * B A`` for a weight [..., O, I] whose rows are several matrices, each with an adapter of its own.

    Fresh adapters change nothing: B is zero, and A uniform in +-1 / sqrt(I), as in PEFT.
    """

    def __init__(self, weight: Tensor, rows: list[int], rank: int, scale: float) -> None:
        super().__init__()
        *experts, _, width = weight.shape
        self.rows, self.scale = rows, scale
        with torch.device(weight.device):
            self.a = nn.ParameterList(torch.empty(*experts, rank, width, dtype=torch.float32) for _ in rows)
            self.b = nn.ParameterList(torch.zeros(*experts, size, rank, dtype=torch.float32) for size in rows)
        for a in self.a:
            nn.init.uniform_(a, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def forward(self, weight: Tensor) -> Tensor:
        """[..., O, I] in the weight's dtype, rounded once."""
        multiply_add = torch.addmm if weight.dim() == 2 else torch.baddbmm
        with torch.autocast(weight.device.type, enabled=False):
            parts = [
                multiply_add(part, b.to(weight.dtype), a.to(weight.dtype), alpha=self.scale)
                for part, a, b in zip(weight.split(self.rows, dim=-2), self.a, self.b, strict=True)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


# ---- adapters on a model ---------------------------------------------------------------------------------------------


def add_adapters(model: NorthModel, config: LoRAConfig) -> None:
    """Freeze ``model`` and give it fresh adapters, in place; its outputs do not change until they are trained.

    Raises:
        ConfigError: the model is cut over processes; adapters are for a model that is whole on each.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise ConfigError("model.lora: expected a model that is whole on every process; leave trainer.strategy out")
    model.requires_grad_(False)
    sizes = model.config
    heads, kv_heads = sizes.num_attention_heads * sizes.head_dim, sizes.num_key_value_heads * sizes.head_dim
    for layer in _layers(model):
        if "attention" in config.targets:
            _adapt(layer.attention.qkv_proj, "weight", [heads, kv_heads, kv_heads], config)
            _adapt(layer.attention.o_proj, "weight", [sizes.hidden_size], config)
        if "experts" in config.targets and isinstance(layer.mlp, MoE):
            _adapt(layer.mlp, "gate_up_proj", [2 * sizes.intermediate_size], config)
            _adapt(layer.mlp, "down_proj", [sizes.hidden_size], config)


def _adapt(module: nn.Module, name: str, rows: list[int], config: LoRAConfig) -> None:
    weight = getattr(module, name)
    update = LowRankUpdate(weight, rows, config.rank, config.alpha / config.rank)
    parametrize.register_parametrization(module, name, update, unsafe=True)  # "unsafe" saves computing it once to check
    module.parametrizations[name].original.requires_grad_(False)  # type: ignore[index, union-attr]


def has_adapters(model: NorthModel) -> bool:
    return any(isinstance(module, LowRankUpdate) for module in model.modules())


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The part of ``model.state_dict()`` that is trained; what a checkpoint of a LoRA run needs."""
    adapters = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, LowRankUpdate)
        for name, _ in module.named_parameters()
    }
    return {name: tensor for name, tensor in model.state_dict().items() if name in adapters}


def _layers(model: NorthModel) -> Iterator[DecoderLayer]:
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        yield layer


def update_of(module: nn.Module, name: str) -> LowRankUpdate | None:
    if not parametrize.is_parametrized(module, name):
        return None
    update = module.parametrizations[name][0]  # type: ignore[index]
    assert isinstance(update, LowRankUpdate)
    return update


# ---- PEFT's names ----------------------------------------------------------------------------------------------------


def named_peft_tensors(model: NorthModel) -> Iterator[tuple[str, Tensor, bool]]:
    """Every adapter matrix under PEFT's name, as a detached view into the model, and whether it is a B of experts.

    PEFT nests the wrappers of two parameters of one module: the inner one (``base_layer``) holds the first, gate and
    up. It stores all experts' matrices as one: see ``_to_disk``.
    """
    for index, layer in enumerate(_layers(model)):
        prefix = f"base_model.model.model.layers.{index}"
        attention, mlp = layer.attention, layer.mlp
        for module, names in ((attention.qkv_proj, ["q_proj", "k_proj", "v_proj"]), (attention.o_proj, ["o_proj"])):
            if (update := update_of(module, "weight")) is not None:
                for name, a, b in zip(names, update.a, update.b, strict=True):
                    yield f"{prefix}.self_attn.{name}.lora_A.weight", a.detach(), False
                    yield f"{prefix}.self_attn.{name}.lora_B.weight", b.detach(), False
        for parameter, name in (("gate_up_proj", "experts.base_layer"), ("down_proj", "experts")):
            if (update := update_of(mlp, parameter)) is not None:
                yield f"{prefix}.mlp.{name}.lora_A.weight", update.a[0].detach(), False
                yield f"{prefix}.mlp.{name}.lora_B.weight", update.b[0].detach(), True


def _to_disk(tensor: Tensor, is_experts_b: bool) -> Tensor:
    """A of experts [E, R, I] -> [E * R, I]; B of experts [E, O, R] -> [O, R * E]; others as they are."""
    if is_experts_b:
        return tensor.permute(1, 2, 0).flatten(1)
    return tensor.flatten(0, 1) if tensor.dim() == 3 else tensor


def _from_disk(stored: Tensor, like: Tensor, is_experts_b: bool) -> Tensor:
    """The reverse of ``_to_disk``, for a tensor of the model of ``like``'s shape."""
    if is_experts_b:
        num_experts, width, rank = like.shape
        return stored.view(width, rank, num_experts).permute(2, 0, 1)
    return stored.view_as(like)


# ---- out and in ------------------------------------------------------------------------------------------------------


def save_adapter(
    model: NorthModel,
    directory: str | Path,
    config: LoRAConfig,
    base: str | Path | None = None,
    base_fingerprint: str | None = None,
) -> None:
    """Write the adapters as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``, in float32.

    Args:
        model: with adapters.
        directory: to be made, if need be.
        config: the adapters were added with.
        base: folder or hub name of the weights below the adapters, for PEFT's ``base_model_name_or_path``.
        base_fingerprint: of these weights (``checkpoint.fingerprint``); kept in the adapter file's header.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: _to_disk(tensor, is_experts_b).to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor, is_experts_b in named_peft_tensors(model)
    }
    header = {"format": "pt"} | ({"base_fingerprint": base_fingerprint} if base_fingerprint else {})
    save_file(tensors, directory / WEIGHTS_NAME, metadata=header)
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "target_modules": [name for target in config.targets for name in _MODULES[target]],
        "target_parameters": [name for target in config.targets for name in _PARAMETERS[target]],
    }
    (directory / CONFIG_NAME).write_text(json.dumps(peft_config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(model: NorthModel, directory: str | Path, base: str | Path | None = None) -> LoRAConfig:
    """Add the adapters of ``directory`` to ``model``, in place, and return their config.

    Args:
        model: with the weights that the adapters were trained on.
        directory: of adapters, written by ``save_adapter`` or by PEFT.
        base: where the model's weights are from. Adapters that carry no fingerprint of their base (PEFT's) have to
            name a folder or repository that ends in the same name.

    Raises:
        CheckpointError: files that are missing, broken or of another shape, or adapters of another base.
        ConfigError: an adapter of a kind that this module does not do.
    """
    directory = Path(directory)
    config, named_base = _read_config(directory / CONFIG_NAME)
    try:
        stored = load_file(directory / WEIGHTS_NAME)
        with safe_open(directory / WEIGHTS_NAME, framework="pt") as file:
            trained_on = (file.metadata() or {}).get("base_fingerprint")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory / WEIGHTS_NAME}: expected adapter weights: {error}") from error
    by_name = trained_on is None and named_base and base and Path(named_base).name != Path(base).resolve().name
    if by_name or (trained_on is not None and trained_on != fingerprint(model)):
        raise CheckpointError(
            f"{directory}: these adapters belong to another base, '{named_base}', not to the weights in '{base}': "
            f"set model.checkpoint to their base, or base_model_name_or_path in {CONFIG_NAME} if only its name differs"
        )
    add_adapters(model, config)
    expected = {name: (tensor, is_experts_b) for name, tensor, is_experts_b in named_peft_tensors(model)}
    if stored.keys() != expected.keys():
        different = sorted(stored.keys() ^ expected.keys())
        raise CheckpointError(
            f"{directory / WEIGHTS_NAME}: expected {len(expected)} tensors named for this model, got {len(stored)}; "
            f"{len(different)} differ, first {different[0]}"
        )
    for name, (tensor, is_experts_b) in expected.items():
        if stored[name].shape != _to_disk(tensor, is_experts_b).shape:
            raise CheckpointError(
                f"{directory / WEIGHTS_NAME}: {name}: expected {list(_to_disk(tensor, is_experts_b).shape)}, "
                f"got {list(stored[name].shape)}"
            )
        tensor.copy_(_from_disk(stored[name], tensor, is_experts_b))
    return config


def _read_config(path: Path) -> tuple[LoRAConfig, str | None]:
    try:
        stored = read_json(path, CheckpointError)
        rank, alpha = int(stored["r"]), float(stored["lora_alpha"])
        modules, parameters = set(stored["target_modules"] or ()), set(stored.get("target_parameters") or ())
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: expected PEFT's configuration of a LoRA adapter: {error!r}") from error
    for key, only in (("peft_type", "LORA"), ("bias", "none"), ("use_dora", False), ("use_rslora", False)):
        if stored.get(key, only) != only:
            raise ConfigError(f"{path}: {key}: only {only!r} is supported, got {stored[key]!r}")
    targets = tuple(
        target for target in get_args(Target) if {*_MODULES[target], *_PARAMETERS[target]} <= modules | parameters
    )
    covered = {name for target in targets for name in (*_MODULES[target], *_PARAMETERS[target])}
    if not targets or covered != modules | parameters:
        raise ConfigError(f"{path}: expected attention or experts as a whole, got {sorted(modules | parameters)}")
    named = stored.get("base_model_name_or_path")
    return LoRAConfig(rank, alpha, targets), named if isinstance(named, str) else None
