"""Builds a model that is parallel from the start: no process ever holds all of it.

In: a config, a ``Layout``, and a checkpoint or nothing. Out: a ``NorthModel`` of which each process holds, and reads
from disk, only its part.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from north_lightning.model import ComputeConfig, NorthConfig, NorthModel, load_weights
from north_lightning.model.checkpoint import held_part
from north_lightning.parallel.mesh import Layout
from north_lightning.parallel.sharding import parallelize


def build_model(
    config: NorthConfig,
    checkpoint: Path | None,
    layout: Layout,
    device: torch.device,
    parameter_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    compute: ComputeConfig | None = None,
) -> NorthModel:
    """A parallel model on ``device``, with a checkpoint's weights, or random ones where there is none.

    Args:
        config: the shape.
        checkpoint: a Hugging Face checkpoint folder.
        layout: who does what.
        device: of this process.
        parameter_dtype: of what the optimizer works on.
        compute_dtype: see ``parallelize``.
        compute: back ends and activation checkpointing.

    Raises:
        CheckpointError: as ``load_checkpoint``.
        ConfigError: as ``parallelize``.
    """
    with torch.device("meta"):
        model = NorthModel(config, compute).to(parameter_dtype)
    parallelize(model, layout, compute_dtype)
    model.to_empty(device=device)
    if checkpoint is None:
        draw_weights(model)
    else:
        load_weights(model, checkpoint)
    return model


@torch.no_grad()
def draw_weights(model: NorthModel) -> None:
    """Random weights that do not depend on the layout, only on the seed of process 0's global generator.

    Every process draws every parameter, one at a time, and keeps its part: memory for the largest parameter, in
    exchange for equal starts on any number of processes.
    """
    seed = torch.tensor(torch.initial_seed() % 2**63)
    dist.broadcast(seed, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        for parameter in model.parameters():
            whole = torch.empty(parameter.shape)
            model.draw(whole)
            local, offsets = held_part(parameter)
            box = tuple(slice(start, start + size) for start, size in zip(offsets, local.shape, strict=True))
            local.copy_(whole[box])
