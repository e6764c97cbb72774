"""North-shaped mixture-of-experts decoders: config, model, Hugging Face checkpoints in and out.

In: token ids of packed rows, or a checkpoint directory. Out: hidden states, or a checkpoint directory. Losses, data and
training live elsewhere.
"""

from north_lightning.model.checkpoint import load_checkpoint, named_hf_tensors, save_checkpoint
from north_lightning.model.compute import ComputeConfig
from north_lightning.model.config import NorthConfig
from north_lightning.model.decoder import NorthModel
from north_lightning.model.experts import Routing

__all__ = [
    "ComputeConfig",
    "NorthConfig",
    "NorthModel",
    "Routing",
    "load_checkpoint",
    "named_hf_tensors",
    "save_checkpoint",
]
