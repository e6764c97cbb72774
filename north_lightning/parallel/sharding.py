"""Makes a model parallel: replaces what has to work across processes, and cuts the parameters.

In: a ``NorthModel``, best on the meta device, and a ``Layout``. Out: the same model, in place. Its parameters are now
``DTensor``s of which each process holds a part; on the meta device they are still without memory (``filling`` gives
them values). Gradients come out *summed* over all processes: every token's loss counts once, wherever it was computed.

Names and shapes of parameters stay those of the plain model, so that a checkpoint fits any layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from north_lightning.errors import ConfigError
from north_lightning.model import NorthModel
from north_lightning.model.decoder import DecoderLayer
from north_lightning.model.experts import MoE
from north_lightning.parallel.attention import SharedAttention, SharedRows
from north_lightning.parallel.experts import DispatchedExperts
from north_lightning.parallel.mesh import Layout


def parallelize(model: NorthModel, layout: Layout, compute_dtype: torch.dtype | None = None) -> None:
    """Make ``model`` work in ``layout``.

    Args:
        model: on the meta device, or whole and equal on every process.
        layout: who does what.
        compute_dtype: of gathered weights and of activations; gradients are reduced in float32. None: the parameters'.

    Raises:
        ConfigError: a size that the model cannot be divided by.
    """
    share_rows(model, layout)
    if layout.sizes.expert > 1:
        deal_out_experts(model, layout)
    shard_parameters(model, layout, compute_dtype)


def share_rows(model: NorthModel, layout: Layout) -> None:
    """Context and tensor parallelism: every process computes its piece of a row."""
    if layout.sizes.row == 1:
        return
    rows = SharedRows(layout)
    model.tokens_held = lambda num_tokens: rows.pieces(num_tokens).held  # type: ignore[method-assign]
    for layer in _layers(model):
        layer.attention.forward = SharedAttention(layer.attention, rows)  # type: ignore[method-assign]


def deal_out_experts(model: NorthModel, layout: Layout) -> None:
    """Expert parallelism: every process of an expert group keeps its part of the experts."""
    num_processes, num_experts = layout.sizes.expert, model.config.num_experts
    if num_experts % num_processes:
        raise ConfigError(f"strategy.expert: expected a divisor of num_experts ({num_experts}), got {num_processes}")
    for moe in _mixtures(model):
        for name in ("gate_up_proj", "down_proj"):
            whole = getattr(moe, name)
            part = whole.detach().chunk(num_processes)[layout.experts.get_local_rank("expert")].clone()
            dealt = DTensor.from_local(part, layout.experts["expert"], [Shard(0)], run_check=False)
            setattr(moe, name, nn.Parameter(dealt, requires_grad=whole.requires_grad))
        moe.mix = DispatchedExperts(moe, num_experts, layout.expert_group)  # type: ignore[method-assign]


def shard_parameters(model: NorthModel, layout: Layout, compute_dtype: torch.dtype | None) -> None:
    """FSDP2: one group per layer, its experts a group of their own where they are dealt out; embedding and norm last.

    The embedding stays gathered between forward and backward pass: it is also the head.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    dense, experts = layout.fsdp_mesh(layout.dense), layout.fsdp_mesh(layout.experts)
    for layer in _layers(model):
        if isinstance(layer.mlp, MoE) and layout.sizes.expert > 1:
            fully_shard(layer.mlp.router, mesh=dense, mp_policy=policy)
            _check_width(layer.mlp, layout)
            # Dimension 0 is dealt out; cutting dimension 1 keeps every part a plain block of the whole tensor.
            fully_shard(layer.mlp, mesh=experts, mp_policy=policy, shard_placement_fn=lambda _: Shard(1))
        fully_shard(layer, mesh=dense, mp_policy=policy)
    fully_shard(model, mesh=dense, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A sum. (Other factors are applied twice where the mesh's shard dimension has size 1, in torch 2.13.)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other reductions


def parameter_groups(module: nn.Module) -> list[nn.Parameter] | list[dict[str, Any]]:
    """The parameters to train, as an optimizer takes them.

    Those of a parallel model come in two groups, without and with experts: they may lie on different meshes, and
    optimizers update a group's tensors in one operation, which all have to be on the same. Two for every layout, so
    that schedules, which count groups, resume on any.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not any(isinstance(parameter, DTensor) for parameter in trained):
        return trained
    experts = {id(p) for part in module.modules() if isinstance(part, MoE) for p in part.parameters(recurse=False)}
    return [
        {"params": [parameter for parameter in trained if id(parameter) not in experts]},
        {"params": [parameter for parameter in trained if id(parameter) in experts]},
    ]


def _check_width(moe: MoE, layout: Layout) -> None:
    num_processes = layout.experts.size(1)
    for name in ("gate_up_proj", "down_proj"):
        if (size := getattr(moe, name).shape[1]) % num_processes:
            raise ConfigError(
                f"strategy.expert: shard x context x tensor / expert = {num_processes} processes cannot divide the "
                f"{size} rows of each expert's {name}"
            )


def _layers(model: NorthModel) -> list[DecoderLayer]:
    return [layer for layer in model.layers if isinstance(layer, DecoderLayer)]


def _mixtures(model: NorthModel) -> list[MoE]:
    return [layer.mlp for layer in _layers(model) if isinstance(layer.mlp, MoE)]
