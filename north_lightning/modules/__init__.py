"""LightningModules: the model base, supervised fine-tuning and reinforcement learning."""

from north_lightning.modules.base import NorthModule
from north_lightning.modules.cispo import CISPOModule
from north_lightning.modules.schedule import WarmupSchedule
from north_lightning.modules.sft import SFTModule

__all__ = ["CISPOModule", "NorthModule", "SFTModule", "WarmupSchedule"]
