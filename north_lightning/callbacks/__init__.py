"""Lightning callbacks: what happens around the training steps."""

from north_lightning.callbacks.hf_checkpoint import HFCheckpoint
from north_lightning.callbacks.history import JSONLHistory, RunSummary, Throughput
from north_lightning.callbacks.online_evaluation import OnlineEvaluation
from north_lightning.callbacks.producer import RolloutProducerCallback
from north_lightning.callbacks.progress import ProgressLine
from north_lightning.callbacks.run_directory import OwedValidation, RandomState, RunLock, SaveOnTermination
from north_lightning.callbacks.sampler_metrics import SamplerMetrics
from north_lightning.callbacks.sidecar import SidecarCallback
from north_lightning.callbacks.stopping import StopAtLoss
from north_lightning.callbacks.time_accounts import TimeAccounts
from north_lightning.callbacks.weight_sync import WeightSyncCallback

__all__ = [
    "HFCheckpoint",
    "JSONLHistory",
    "OnlineEvaluation",
    "OwedValidation",
    "ProgressLine",
    "RandomState",
    "RolloutProducerCallback",
    "RunLock",
    "RunSummary",
    "SamplerMetrics",
    "SaveOnTermination",
    "SidecarCallback",
    "StopAtLoss",
    "Throughput",
    "TimeAccounts",
    "WeightSyncCallback",
]
