"""Conversations and rollouts to packed batches: sources, filters, mixing, packing and the two data modules."""

from typing import TYPE_CHECKING, Any

from north_lightning.data.filters import SampleFilter
from north_lightning.data.mixing import MixedRows, SampleWindow
from north_lightning.data.packing import BestFitPacker
from north_lightning.data.records import Shard
from north_lightning.data.sources import SampleReader, read_samples, write_samples
from north_lightning.data.stream import StepStream
from north_lightning.types import Conversation

if TYPE_CHECKING:
    from north_lightning.data.rollouts import RolloutDataModule, RolloutStep
    from north_lightning.data.sft import SFTDataModule, SFTSource

__all__ = [
    "BestFitPacker",
    "Conversation",
    "MixedRows",
    "RolloutDataModule",
    "RolloutStep",
    "SFTDataModule",
    "SFTSource",
    "SampleFilter",
    "SampleReader",
    "SampleWindow",
    "Shard",
    "StepStream",
    "read_samples",
    "write_samples",
]

_LAZY = {
    "SFTDataModule": "sft",
    "SFTSource": "sft",
    "RolloutDataModule": "rollouts",
    "RolloutStep": "rollouts",
}


def __getattr__(name: str) -> Any:
    """The data modules on first use: they import torch and Lightning, which writing samples does not need."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"north_lightning.data.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
