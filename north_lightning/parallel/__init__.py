"""Training on many processes: FSDP2, expert, context and tensor parallelism, through torch.distributed only.

``NorthStrategy`` is what a config names; it and ``single_file`` are plug-ins of Lightning, which the other files do not
know.
"""

from north_lightning.parallel.clipping import clip_grad_norm
from north_lightning.parallel.exchange import gather_objects
from north_lightning.parallel.filling import build_model
from north_lightning.parallel.mesh import Layout, ParallelSizes
from north_lightning.parallel.process_zero import on_process_zero, scatter_from_process_zero
from north_lightning.parallel.sharding import parallelize, parameter_groups
from north_lightning.parallel.strategy import NorthStrategy

__all__ = [
    "Layout",
    "NorthStrategy",
    "ParallelSizes",
    "build_model",
    "clip_grad_norm",
    "gather_objects",
    "on_process_zero",
    "parallelize",
    "parameter_groups",
    "scatter_from_process_zero",
]
