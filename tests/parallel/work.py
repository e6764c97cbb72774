"""What the processes of one launch do, one after another, so that a launch is paid for once."""

from __future__ import annotations

from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import training
import yaml
from full_disk import no_room
from launch import as_torchrun_would
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import quiet_trainer, sft_config

from north_lightning import cli
from north_lightning.callbacks import JSONLHistory
from north_lightning.data import SFTDataModule, SFTSource
from north_lightning.data.rollouts import make_step
from north_lightning.errors import CheckpointError
from north_lightning.losses import CISPOLoss
from north_lightning.model import NorthConfig, NorthModel, named_hf_tensors, save_checkpoint
from north_lightning.model.checkpoint import held_part
from north_lightning.modules import CISPOModule, SFTModule, WarmupSchedule
from north_lightning.parallel import Layout, NorthStrategy, ParallelSizes, build_model, parallelize
from north_lightning.parallel.checkpoints import ShardedCheckpoints
from north_lightning.run_folders import SHARDED_REST as REST
from north_lightning.types import Reward, Rollout, RolloutGroup

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
RESUMED = {1: [{}], 2: [SAVED, {"context": 2}], 4: [{"shard": 4, "expert": 2}, {"shard": 2, "context": 2}]}
"""Strategy arguments: of the run that saves (two processes), and of those that go on."""

ROWS_PER_STEP, SAVED_AT, LAST = 4, 3, 5


RELEASED = NorthConfig(
    vocab_size=262_144,
    hidden_size=2048,
    intermediate_size=768,
    prefix_dense_intermediate_size=3072,
    num_hidden_layers=49,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
)


def everything(inputs: Path, folder: Path) -> dict[str, Any]:
    """All of the below; what processes return lies in memory, what they write in ``folder``."""
    count = dist.get_world_size()
    results: dict[str, Any] = {}
    if count > 1:
        results["trained"] = {name: training.train(sizes) for name, sizes in LAYOUTS[count].items()}
        results["filled"] = fill_and_export(inputs / "start", folder / f"{count}-processes")
    as_torchrun_would()
    if count == 4:
        results["released"] = hold_released_shape()
    if count == 2:
        results["bfloat16"] = training.train(ParallelSizes(context=2, expert=2), torch.bfloat16)
        results["misuse"] = misuse_checkpoints(folder / "misused.ckpt")
        reinforce(inputs, folder / "rl-context", {"context": 2})
        results["cli"] = run_cli(inputs, folder / "cli")
    save_and_resume(inputs, folder)
    return results


def fill_and_export(checkpoint: Path, folder: Path) -> dict[str, int]:
    """Read a checkpoint into parts and write it again; how many numbers this process held at once."""
    layout = Layout.create(FILLED[dist.get_world_size()], "cpu")
    model = build_model(NorthConfig.load(checkpoint), checkpoint, layout, torch.device("cpu"))
    write(model, folder / "read")
    held = sum(held_part(parameter)[0].numel() for parameter in model.parameters())
    torch.manual_seed(7 if dist.get_rank() == 0 else 8)  # process 0's counts
    write(build_model(NorthConfig.load(checkpoint), None, layout, torch.device("cpu")), folder / "drawn")
    return {"held": held, "copies": layout.sizes.replicate}


def hold_released_shape() -> int:
    """How many of the released model's numbers this process would hold; without memory for any."""
    with torch.device("meta"):
        model = NorthModel(RELEASED)
    parallelize(model, Layout.create(ParallelSizes(context=2, tensor=2, expert=4), "cpu"))
    return sum(held_part(parameter)[0].numel() for parameter in model.parameters())


def write(model: Any, folder: Path) -> None:
    if dist.get_rank() == 0:
        save_checkpoint(model, folder)
    else:
        deque(named_hf_tensors(model), maxlen=0)


# ---- through Lightning -----------------------------------------------------------------------------------------------


def misuse_checkpoints(folder: Path) -> dict[str, Any]:
    """What is saved is what was there when ``save`` was called; what is not complete is not loaded."""
    checkpoints, messages = ShardedCheckpoints(), {}
    value = torch.full((1000, 100), 1.0)
    checkpoints.save({"value": value}, {"step": 1}, folder)
    value.fill_(2.0)
    checkpoints.wait()
    dist.barrier()
    checkpoints.load(state := {"value": torch.zeros(1000, 100)}, folder)
    rest = folder / REST
    loaded = (state["value"].unique().tolist(), torch.load(rest, weights_only=True))
    for name, wanted, place in (
        ("other name", {"another": torch.zeros(3)}, folder),
        ("nothing there", {"value": value}, folder.with_name("nowhere")),
    ):
        try:
            checkpoints.load(wanted, place)
        except CheckpointError as error:
            messages[name] = str(error)
    loaded_after = []
    for limited in (0, 1):  # the process without room
        with no_room(100_000) if dist.get_rank() == limited else nullcontext():
            checkpoints.save({"value": value, "more": value.clone()}, {"step": 2}, folder)  # each process writes one
            try:
                checkpoints.save({"value": value}, {"step": 3}, folder)
            except CheckpointError as error:
                messages[f"no room on {limited}"] = str(error)
        assert not list(folder.parent.glob(".*.writing"))
        checkpoints.load(state, folder)
        loaded_after.append(state["value"].unique().tolist())
    checkpoints.save({"value": value}, {"step": 2}, folder.with_name("next.ckpt"))
    checkpoints.remove(folder)
    checkpoints.close()
    dist.barrier()
    left = sorted(path.name for path in folder.parent.glob("*.ckpt"))
    return {"loaded": loaded, "loaded_after": loaded_after, "messages": messages, "left": left}


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
    files, cache_dir = [inputs / "sums.jsonl"], inputs / "tokens"
    return SFTDataModule(inputs / "tokenizer", sources, 128, validation_files=files, cache_dir=cache_dir)


def fit(
    inputs: Path,
    folder: Path,
    strategy: dict[str, Any] | None,
    steps: int,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> None:
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
        fit(inputs, folder / run_name(count, strategy), strategy, LAST, ckpt_path=folder / "saved.ckpt")


def run_name(count: int, strategy: dict[str, Any]) -> str:
    return "-".join([str(count), *(f"{key}{size}" for key, size in strategy.items())])


def reinforce(inputs: Path, folder: Path, strategy: dict[str, Any] | None) -> None:
    """Two CISPO steps of two rows each; without ``strategy`` in one process."""
    generator = torch.Generator().manual_seed(1)
    steps = [make_step([random_group(generator, index) for index in range(2)], max_row_tokens=90) for _ in range(2)]
    assert all(len(step.micro_batches) > 1 for step in steps)
    seed_everything(3, verbose=False)
    module = CISPOModule(
        loss=CISPOLoss(1.5),
        checkpoint=inputs / "start",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, eps=1e-4),
        tokenizer=inputs / "tokenizer",
    )
    trainer = quiet_trainer(
        folder,
        devices=1 if strategy is None else dist.get_world_size(),
        strategy="auto" if strategy is None else NorthStrategy(**strategy),
        max_epochs=1,
        logger=JSONLHistory(folder),
    )
    trainer.fit(module, train_dataloaders=torch.utils.data.DataLoader(steps, batch_size=None))
    module.save_hf(folder / "checkpoint")


def random_group(generator: torch.Generator, group_id: int) -> RolloutGroup:
    rollouts = []
    for index in range(3):
        length = int(torch.randint(20, 45, (1,), generator=generator))
        rollout = Rollout(f"task{group_id}", "terminal", "family", group_id, index, 0, advantage=index - 1.2)
        rollout.token_ids = torch.randint(10, 390, (length,), generator=generator).tolist()
        rollout.loss_mask = [place > 8 for place in range(length)]
        rollout.rollout_logprobs = (torch.randn(length, generator=generator) - 6.0).tolist()
        rollout.policy_versions = [0] * length
        rollout.reward = Reward(float(index))
        rollouts.append(rollout)
    return RolloutGroup(group_id, f"task{group_id}", "terminal", rollouts)


def run_cli(inputs: Path, folder: Path) -> int:
    """``python -m north_lightning fit`` with the strategy in its config, as in each process that torchrun starts."""
    strategy = {"class_path": "NorthStrategy", "init_args": {"context": 2, "expert": 2}}
    config = sft_config(inputs, folder, strategy=strategy, devices=2, accumulate_grad_batches=2, max_steps=2)
    config["model"]["init_args"] = {"checkpoint": str(inputs / "start"), "tokenizer": str(inputs / "tokenizer")}
    file = folder.with_name(f"cli{dist.get_rank()}.yaml")
    file.write_text(yaml.safe_dump(config))
    return cli.main(["fit", "--config", str(file)])
