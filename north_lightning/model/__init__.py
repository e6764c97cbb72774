"""North-shaped mixture-of-experts decoders: config, model, Hugging Face checkpoints in and out.

In: token ids of packed rows, or a checkpoint directory. Out: hidden states, or a checkpoint directory. Losses, data and
training live elsewhere.
"""

from north_lightning.model.checkpoint import load_checkpoint, named_hf_tensors, save_checkpoint
from north_lightning.model.config import NorthConfig
from north_lightning.model.decoder import NorthModel
from north_lightning.model.experts import Routing
from north_lightning.model.lora import LoRAConfig, adapter_state_dict, add_adapters, load_adapter, save_adapter

__all__ = [
    "LoRAConfig",
    "NorthConfig",
    "NorthModel",
    "Routing",
    "adapter_state_dict",
    "add_adapters",
    "load_adapter",
    "load_checkpoint",
    "named_hf_tensors",
    "save_adapter",
    "save_checkpoint",
]
