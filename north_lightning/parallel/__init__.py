"""Training on many processes: FSDP2, expert, context and tensor parallelism, through torch.distributed only."""

from north_lightning.parallel.clipping import clip_grad_norm
from north_lightning.parallel.mesh import Layout, ParallelSizes
from north_lightning.parallel.sharding import parallelize

__all__ = ["Layout", "ParallelSizes", "clip_grad_norm", "parallelize"]
