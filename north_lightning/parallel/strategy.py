"""The Lightning strategy: parallelism chosen by five numbers in a config.

    trainer:
      strategy:
        class_path: NorthStrategy
        init_args: {shard: auto, context: 2, expert: 8, compute_dtype: bfloat16}

In: a ``LightningModule`` that asks for its model (``build_model``) in ``configure_model``. Out: Lightning's loop on
that model, its checkpoints, and the numbers that data loading needs (``trainer.distributed_sampler_kwargs``). Processes
are started by torchrun, by SLURM or by Lightning, as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from north_lightning.errors import ConfigError
from north_lightning.model import ComputeConfig, NorthConfig, NorthModel
from north_lightning.model.precision import Precision
from north_lightning.parallel.checkpoints import ShardedCheckpoints
from north_lightning.parallel.filling import build_model
from north_lightning.parallel.mesh import Layout, ParallelSizes
from north_lightning.parallel.single_file import read_checkpoint
from north_lightning.types import Count, Positive

DType = Literal["float32", "bfloat16"]

# Under each parameter's own name, whatever group of the optimizer it is in.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


class NorthStrategy(ModelParallelStrategy):
    """FSDP2 with expert, context and tensor parallelism; ``replicate x shard x context x tensor`` processes.

    Gradients are averaged over rows (``replicate x shard``) and summed over the processes that share a row.

    Args:
        replicate: Copies of the sharded model; for many nodes, so that weights are gathered within each.
        shard: Processes that the model is cut over and that get different rows; ``auto`` takes all that are left.
        context: Processes that share a row, each with a piece of its tokens. For rows too long for one GPU.
        expert: Processes that the experts are dealt out over; a divisor of ``shard x context x tensor``. Pays below
            about 50,000 tokens per GPU, and across nodes.
        tensor: Processes that share a piece of a row and divide the attention's heads.
        parameter_dtype: Of the weights that the optimizer works on, and of its state.
        compute_dtype: Of activations and gathered weights; ``parameter_dtype`` if left out.
        timeout_s: Seconds until a collective that not all processes join is an error.
    """

    def __init__(
        self,
        replicate: Count = 1,
        shard: int | Literal["auto"] = "auto",
        context: Count = 1,
        expert: Count = 1,
        tensor: Count = 1,
        parameter_dtype: DType = "float32",
        compute_dtype: DType | None = None,
        timeout_s: Positive = 1800.0,
    ) -> None:
        super().__init__(timeout=timedelta(seconds=timeout_s))
        self._replicate, self._context, self._expert, self._tensor = replicate, context, expert, tensor
        self._shard: int | Literal["auto"] = shard
        self._parameter_dtype: torch.dtype = getattr(torch, parameter_dtype)
        self._compute_dtype: torch.dtype | None = getattr(torch, compute_dtype) if compute_dtype else None
        self._layout: Layout | None = None
        self._checkpoints: ShardedCheckpoints | None = None

    # ---- processes ---------------------------------------------------------------------------------------------------

    def check_run(self, trainer: Trainer, module: Any, data: object) -> None:
        """``ConfigError`` for sizes that do not make up the processes, or that the model cannot be divided by."""
        if getattr(module, "lora", None) is not None or getattr(module, "adapter", None) is not None:
            raise ConfigError("model.lora: expected a model that is whole on every process: leave trainer.strategy out")
        world = trainer.num_devices * trainer.num_nodes
        others = self._replicate * self._context * self._tensor
        shard = max(1, world // others) if self._shard == "auto" else self._shard
        sizes = ParallelSizes(self._replicate, shard, self._context, self._expert, self._tensor)
        if sizes.world != world:
            raise ConfigError(
                f"trainer.strategy: expected replicate x shard x context x tensor = {world} (trainer.devices x "
                f"num_nodes), got {sizes.replicate} x {sizes.shard} x {sizes.context} x {sizes.tensor} = {sizes.world}"
            )
        source = getattr(module, "checkpoint", None) or getattr(module, "config_path", None)
        config = NorthConfig.load(source) if source is not None else None
        for size, key in ((sizes.tensor, "num_key_value_heads"), (sizes.expert, "num_experts")):
            if config is not None and getattr(config, key) % size:
                name = "expert" if key == "num_experts" else "tensor"
                raise ConfigError(
                    f"trainer.strategy.{name}: expected a divisor of {key} ({getattr(config, key)}), got {size}"
                )
        if sizes.row > 1 and getattr(getattr(module, "loss", None), "needs_whole_sequences", False):
            raise ConfigError(
                "model.loss: expected one that is computed token by token, because several processes share a row "
                f"(trainer.strategy.context x tensor = {sizes.row}), got {type(module.loss).__name__}"
            )

    def setup_environment(self) -> None:
        """Join the other processes and take a place among them."""
        super().setup_environment()
        others = max(1, self._replicate * self._context * self._tensor)
        shard = max(1, self.world_size // others) if self._shard == "auto" else self._shard
        sizes = ParallelSizes(self._replicate, shard, self._context, self._expert, self._tensor)
        self._layout = Layout.create(sizes, self.root_device.type)

    @property
    def precision(self) -> Precision:
        """Dtypes of the weights that are trained and of activations."""
        compute = self._compute_dtype or self._parameter_dtype
        return Precision(*(str(dtype).removeprefix("torch.") for dtype in (self._parameter_dtype, compute)))

    @property
    def layout(self) -> Layout:
        assert self._layout is not None, "processes have not joined yet"
        return self._layout

    @property
    def checkpoints(self) -> ShardedCheckpoints:
        """Made when first asked for, by all processes together."""
        if self._checkpoints is None:
            self._checkpoints = ShardedCheckpoints()
        return self._checkpoints

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How many different rows there are, and which is this process's; the same for all that share one."""
        return {"num_replicas": self.layout.sizes.data, "rank": self.layout.data_rank}

    def teardown(self) -> None:
        """Wait until the last checkpoint is on disk."""
        if self._checkpoints is not None:
            self._checkpoints.close()
            self._checkpoints = None
        super().teardown()

    # ---- the model ---------------------------------------------------------------------------------------------------

    def build_model(
        self, config: NorthConfig, checkpoint: Path | None, compute: ComputeConfig | None = None
    ) -> NorthModel:
        """This process's part of the model; see ``filling.build_model``."""
        return build_model(
            config, checkpoint, self.layout, self.root_device, self._parameter_dtype, self._compute_dtype, compute
        )

    def setup(self, trainer: Trainer) -> None:
        """Refuse parameters that were not made here, whose gradients would stay apart; then as every strategy."""
        assert self.lightning_module is not None
        named = self.lightning_module.named_parameters()
        plain = [name for name, parameter in named if not isinstance(parameter, DTensor)]
        if plain:
            raise ConfigError(
                "trainer.strategy: NorthStrategy trains what its build_model makes; not made there are "
                f"{len(plain)} parameters ({', '.join(plain[:3])}{', ...' if len(plain) > 3 else ''})"
            )
        super().setup(trainer)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Gradients are summed over all processes; dividing the loss makes that a mean over rows."""
        return super().backward(closure_loss / self.layout.sizes.data, optimizer, *args, **kwargs)

    def on_validation_end(self) -> None:
        """Give the embedding's gathered weights back, which no backward pass has done."""
        assert self.model is not None
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return get_model_state_dict(self.model)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.model is not None
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return get_optimizer_state_dict(self.model, optimizer, options=_BY_NAME)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """A folder, written in the background; see ``checkpoints``."""
        if storage_options is not None:
            raise ConfigError(f"storage_options: expected none, got {storage_options!r}")
        state = {"model": checkpoint.pop("state_dict")}
        for index, optimizer_state in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"optimizer_{index}"] = optimizer_state
        self.checkpoints.save(state, checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Restore model and optimizers, saved in any layout; return the rest.

        Raises:
            CheckpointError: see ``ShardedCheckpoints.load``.
        """
        assert self.model is not None
        path = Path(self.broadcast(checkpoint_path))
        rest = read_checkpoint(path, weights_only, is_sharded=True)
        state = {"model": self.lightning_module_state_dict()}
        for index, optimizer in enumerate(self.optimizers):
            state[f"optimizer_{index}"] = self.optimizer_state(optimizer)
        self.checkpoints.load(state, path)
        set_model_state_dict(self.model, state["model"])
        for index, optimizer in enumerate(self.optimizers):
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{index}"], options=_BY_NAME)
        return rest

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: ``load_checkpoint`` has done it."""

    def remove_checkpoint(self, filepath: str | Path) -> None:
        self.checkpoints.remove(Path(filepath))
