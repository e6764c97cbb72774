"""What the processes of one launch do, one after another, so that a launch is paid for once."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import training
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import quiet_trainer

from north_lightning.callbacks import JSONLHistory
from north_lightning.data import SFTDataModule, SFTSource
from north_lightning.model import NorthConfig, named_hf_tensors, save_checkpoint
from north_lightning.model.checkpoint import held_part
from north_lightning.modules import SFTModule, WarmupSchedule
from north_lightning.parallel import Layout, NorthStrategy, ParallelSizes, build_model

LAYOUTS = {
    2: {
        "fsdp": ParallelSizes(shard=2),
        "replicate": ParallelSizes(replicate=2),
        "expert": ParallelSizes(shard=2, expert=2),
        "context": ParallelSizes(context=2),
        "tensor": ParallelSizes(tensor=2),
    },
    4: {
        "fsdp": ParallelSizes(shard=4),
        "replicate x fsdp": ParallelSizes(replicate=2, shard=2),
        "fsdp x expert": ParallelSizes(shard=4, expert=2),
        "fsdp x context": ParallelSizes(shard=2, context=2),
        "fsdp x tensor": ParallelSizes(shard=2, tensor=2),
        "context x expert": ParallelSizes(context=4, expert=4),
        "context x tensor x expert": ParallelSizes(context=2, tensor=2, expert=2),
        "replicate x context x expert": ParallelSizes(replicate=2, context=2, expert=2),
    },
}

FILLED = {2: ParallelSizes(context=2, expert=2), 4: ParallelSizes(replicate=2, shard=2, expert=2)}
"""The layouts that checkpoints are read into and written from."""

SAVED = {"shard": 2, "expert": 2}
RESUMED = {1: [{}], 2: [SAVED, {"context": 2}], 4: [{"shard": 4, "expert": 2}, {"shard": 2, "tensor": 2}]}
"""Strategy arguments: of the run that saves (two processes), and of those that go on."""

ROWS_PER_STEP, SAVED_AT, LAST = 4, 2, 4


def train_all() -> dict[str, Any]:
    return {name: training.train(sizes) for name, sizes in LAYOUTS[dist.get_world_size()].items()}


def fill_and_export(checkpoint: Path, folder: Path) -> dict[str, int]:
    """Read a checkpoint into parts and write it again; how many numbers this process held at once."""
    layout = Layout.create(FILLED[dist.get_world_size()], "cpu")
    model = build_model(NorthConfig.load(checkpoint), checkpoint, layout, torch.device("cpu"))
    write(model, folder / "read")
    held = sum(held_part(parameter)[0].numel() for parameter in model.parameters())
    torch.manual_seed(7 if dist.get_rank() == 0 else 8)  # process 0's counts
    write(build_model(NorthConfig.load(checkpoint), None, layout, torch.device("cpu")), folder / "drawn")
    return {"held": held, "copies": layout.sizes.replicate}


def write(model: Any, folder: Path) -> None:
    if dist.get_rank() == 0:
        save_checkpoint(model, folder)
    else:
        deque(named_hf_tensors(model), maxlen=0)


# ---- through Lightning -----------------------------------------------------------------------------------------------


def as_torchrun_would() -> None:
    """The environment by which Lightning knows that processes are there already."""
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # nobody connects: the group exists
    }


def make_module(inputs: Path, **settings: Any) -> SFTModule:
    seed_everything(3, verbose=False)
    return SFTModule(
        checkpoint=inputs / "start",
        tokenizer=inputs / "tokenizer",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95), eps=1e-4),
        lr_scheduler=lambda optimizer: WarmupSchedule(optimizer, warmup_steps=3),
        max_grad_norm=0.5,
        log_experts_every_n_steps=2,
        **settings,
    )


def make_data(inputs: Path) -> SFTDataModule:
    sources = {name: SFTSource([inputs / f"{name}.jsonl"], 0.5) for name in ("names", "sums")}
    return SFTDataModule(inputs / "tokenizer", sources, 128, validation_files=[inputs / "sums.jsonl"])


def fit(inputs: Path, folder: Path, strategy: dict[str, Any] | None, steps: int, ckpt_path: Path | None = None, **settings: Any) -> None:
    """A run up to ``steps``; without ``strategy`` plain Lightning in one process."""
    data_parallel = 1 if strategy is None else strategy.get("shard", 1) * strategy.get("replicate", 1)
    trainer = quiet_trainer(
        folder,
        devices=1 if strategy is None else dist.get_world_size(),
        strategy="auto" if strategy is None else NorthStrategy(**strategy),
        max_steps=steps,
        accumulate_grad_batches=ROWS_PER_STEP // data_parallel,
        logger=JSONLHistory(folder),
        check_val_every_n_epoch=None,
        val_check_interval=SAVED_AT * ROWS_PER_STEP // data_parallel,
        **settings,
    )
    module = make_module(inputs)
    trainer.fit(module, datamodule=make_data(inputs), ckpt_path=ckpt_path, weights_only=True)
    module.save_hf(folder / "checkpoint")


def save_and_resume(inputs: Path, folder: Path) -> None:
    """The runs of ``RESUMED``; two processes save before, and go on without a break to compare with."""
    as_torchrun_would()
    count = dist.get_world_size()
    if count == 2:
        saver = ModelCheckpoint(folder, "saved", every_n_train_steps=SAVED_AT, save_top_k=-1)
        fit(inputs, folder / "whole", SAVED, LAST, callbacks=[saver], enable_checkpointing=True)
    for strategy in RESUMED[count]:
        name = "-".join([str(count), *(f"{key}{size}" for key, size in strategy.items())])
        fit(inputs, folder / name, strategy, LAST, ckpt_path=folder / "saved.ckpt")
