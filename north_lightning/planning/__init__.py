"""What a run will need, before it is started: memory per GPU by part, arithmetic, speed; from a config alone.

In: the YAML of ``fit``. Out: numbers and advice. No torch, no Lightning, no weights: it answers in well under a second.
"""

from north_lightning.planning.flops import flops_per_token
from north_lightning.planning.memory import MemoryEstimate, estimate_memory
from north_lightning.planning.setup import TrainingSetup, read_setup

__all__ = ["MemoryEstimate", "TrainingSetup", "estimate_memory", "flops_per_token", "read_setup"]
