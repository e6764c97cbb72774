"""How the model is computed: which implementation of each part, and what is kept for the backward pass.

In: names, from YAML or keyword arguments. Out: a validated, frozen ``ComputeConfig``. Never *what* is computed: every
choice gives the same numbers up to rounding, and a checkpoint does not know of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from north_lightning.errors import ConfigError

AttentionBackend = Literal["auto", "plain", "blocks", "varlen"]
ExpertBackend = Literal["auto", "plain", "batched", "grouped"]
Checkpointing = Literal["none", "selective", "full", "offload"]

_CHOICES = {"attention": AttentionBackend, "experts": ExpertBackend, "checkpointing": Checkpointing}


@dataclass(frozen=True)
class ComputeConfig:
    """Back ends by name, and activation checkpointing.

    Args:
        attention: ``varlen``, torch's FlashAttention for packed rows (half precision on CUDA); ``blocks``, along the
            window's band, in float32 on any device; ``plain``, one mask over the whole row, the reference; ``auto``:
            ``varlen`` where it runs, else ``blocks``.
        experts: ``grouped``, one grouped matrix product per projection (for CUDA); ``batched``, experts of like load
            in one batched product (for a CPU); ``plain``, a loop over experts, the reference; ``auto``: ``grouped`` on
            CUDA, else ``batched``.
        checkpointing: what a layer keeps for its backward pass. ``none``: everything. ``selective``: all but the inside
            of its MLP, which holds most of the memory and, in a long row, little of the work. ``full``: its input.
            ``offload``: its input, in pinned memory of the host.

    Raises:
        ConfigError: an unknown name, naming the key.
    """

    attention: AttentionBackend = "auto"
    experts: ExpertBackend = "auto"
    checkpointing: Checkpointing = "none"

    def __post_init__(self) -> None:
        for field in fields(self):
            allowed, value = get_args(_CHOICES[field.name]), getattr(self, field.name)
            if value not in allowed:
                raise ConfigError(f"compute.{field.name}: expected one of {', '.join(allowed)}, got {value!r}")
