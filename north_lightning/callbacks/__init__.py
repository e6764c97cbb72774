"""Lightning callbacks: what happens around the training steps."""

from north_lightning.callbacks.history import JSONLHistory, RunSummary, Throughput
from north_lightning.callbacks.hf_checkpoint import HFCheckpoint
from north_lightning.callbacks.progress import ProgressLine
from north_lightning.callbacks.run_directory import RunLock, SaveOnInterrupt
from north_lightning.callbacks.stopping import StopAtLoss

__all__ = [
    "HFCheckpoint",
    "JSONLHistory",
    "ProgressLine",
    "RunLock",
    "RunSummary",
    "SaveOnInterrupt",
    "StopAtLoss",
    "Throughput",
]
