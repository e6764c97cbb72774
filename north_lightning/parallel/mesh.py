"""Which process does what: five sizes, and the groups and meshes made of them.

In: the sizes and torch's process group. Out: a ``Layout``. Knows no model.

Processes are numbered with replicate outermost, then shard, context, tensor:

    rank = ((replicate_index * shard + shard_index) * context + context_index) * tensor + tensor_index

- replicate x shard processes get different rows (data parallelism); the context x tensor processes of one of them share
  a row, each holding its own piece of the tokens.
- All parameters but the experts are cut over shard x context x tensor and repeated over replicate.
- The experts are dealt out over ``expert`` neighbouring processes, and each of those parts is cut over the remaining
  shard x context x tensor / expert. Expert parallelism takes no processes of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from north_lightning.errors import ConfigError


@dataclass(frozen=True)
class ParallelSizes:
    """How many processes for what; their product without ``expert`` is the number of processes."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"strategy.{field.name}: expected a whole number of at least 1, got {value!r}")
        if self.sharded % self.expert:
            raise ConfigError(
                f"strategy.expert: expected a divisor of shard x context x tensor ({self.sharded}), got {self.expert}"
            )

    @property
    def data(self) -> int:
        """Processes, or groups of processes, that get different rows."""
        return self.replicate * self.shard

    @property
    def row(self) -> int:
        """Processes that share a row."""
        return self.context * self.tensor

    @property
    def sharded(self) -> int:
        """Processes that a copy of the model is cut over."""
        return self.shard * self.row

    @property
    def world(self) -> int:
        return self.replicate * self.sharded


@dataclass(frozen=True)
class Layout:
    """This process's place, and the groups it talks to. Made on all processes together."""

    sizes: ParallelSizes
    rows: DeviceMesh  # (data, context, tensor)
    dense: DeviceMesh  # (replicate, shard): all parameters but the experts
    experts: DeviceMesh  # (replicate, shard, expert)

    @classmethod
    def create(cls, sizes: ParallelSizes, device_type: str) -> Layout:
        """The layout of the processes of torch's default group.

        Raises:
            ConfigError: the sizes do not make up the number of processes.
        """
        world_size = dist.get_world_size()
        if sizes.world != world_size:
            raise ConfigError(
                f"strategy: expected replicate x shard x context x tensor = {world_size} (number of processes), got "
                f"{sizes.replicate} x {sizes.shard} x {sizes.context} x {sizes.tensor} = {sizes.world}"
            )
        per_expert = sizes.sharded // sizes.expert
        return cls(
            sizes,
            init_device_mesh(
                device_type, (sizes.data, sizes.context, sizes.tensor), mesh_dim_names=("data", "context", "tensor")
            ),
            init_device_mesh(device_type, (sizes.replicate, sizes.sharded), mesh_dim_names=("replicate", "shard")),
            init_device_mesh(
                device_type,
                (sizes.replicate, per_expert, sizes.expert),
                mesh_dim_names=("replicate", "shard", "expert"),
            ),
        )

    @property
    def data_rank(self) -> int:
        """Which of the ``sizes.data`` rows this process works on."""
        return self.rows.get_local_rank("data")

    @property
    def context_rank(self) -> int:
        return self.rows.get_local_rank("context")

    @property
    def tensor_rank(self) -> int:
        return self.rows.get_local_rank("tensor")

    @property
    def context_group(self) -> ProcessGroup:
        return self.rows.get_group("context")

    @property
    def tensor_group(self) -> ProcessGroup:
        return self.rows.get_group("tensor")

    @property
    def expert_group(self) -> ProcessGroup:
        return self.experts.get_group("expert")

    def fsdp_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """The dimensions of ``dense`` or ``experts`` that FSDP works on; without copies there is nothing to repeat."""
        return mesh["shard"] if self.sizes.replicate == 1 else mesh["replicate", "shard"]


def num_copies(tensor: torch.Tensor) -> int:
    """On how many processes of the world the same part of a (distributed) tensor lies."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return dist.get_world_size()
    replicated = [mesh.size(dim) for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]  # type: ignore[attr-defined]
    return math.prod(replicated) * dist.get_world_size() // mesh.size()
