"""North-shaped mixture-of-experts decoders: config, model, adapters, Hugging Face checkpoints in and out.

In: token ids of packed rows, or a checkpoint directory. Out: hidden states, or a checkpoint directory. Losses, data and
training live elsewhere.

Names are imported when they are first asked for: whoever needs a ``NorthConfig`` only, as the planner does, does not
wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from north_lightning.model.checkpoint import (
        fingerprint,
        load_checkpoint,
        load_weights,
        named_hf_tensors,
        save_checkpoint,
    )
    from north_lightning.model.compute import ComputeConfig
    from north_lightning.model.config import NorthConfig
    from north_lightning.model.decoder import NorthModel
    from north_lightning.model.experts import Routing, RoutingRecord
    from north_lightning.model.lora import LoRAConfig, adapter_state_dict, add_adapters, load_adapter, save_adapter

_HOMES = {
    "ComputeConfig": "compute",
    "LoRAConfig": "lora",
    "NorthConfig": "config",
    "NorthModel": "decoder",
    "Routing": "experts",
    "RoutingRecord": "experts",
    "adapter_state_dict": "lora",
    "add_adapters": "lora",
    "fingerprint": "checkpoint",
    "load_adapter": "lora",
    "load_checkpoint": "checkpoint",
    "load_weights": "checkpoint",
    "named_hf_tensors": "checkpoint",
    "save_adapter": "lora",
    "save_checkpoint": "checkpoint",
}

__all__ = [
    "ComputeConfig",
    "LoRAConfig",
    "NorthConfig",
    "NorthModel",
    "Routing",
    "RoutingRecord",
    "adapter_state_dict",
    "add_adapters",
    "fingerprint",
    "load_adapter",
    "load_checkpoint",
    "load_weights",
    "named_hf_tensors",
    "save_adapter",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
