"""Twenty optimizer steps at a learning rate that shipped configs use, and how far every weight has moved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from launch import as_torchrun_would
from lightning.pytorch import seed_everything
from small_runs import quiet_trainer
from torch.distributed.tensor import DTensor

from north_lightning.data import SFTDataModule, SFTSource
from north_lightning.modules import SFTModule
from north_lightning.parallel import NorthStrategy

STEPS, LR = 20, 1e-5


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95), weight_decay=0.0)


def moved(
    inputs: Path,
    base: str,
    optimizer: Callable[[Any], torch.optim.Optimizer] = adamw,
    lora: Any = None,
    strategy: dict[str, Any] | None = None,
    num_processes: int = 1,
    **trainer: Any,
) -> dict[str, torch.Tensor]:
    """By name, what training has added to each weight that is trained; in float64."""
    settings = trainer if strategy is None else {"strategy": NorthStrategy(**strategy), "devices": num_processes}
    trainer_ = quiet_trainer(inputs / "run", max_steps=STEPS, **settings)
    module = SFTModule(checkpoint=inputs / base, optimizer=optimizer, lora=lora, log_experts_every_n_steps=0)
    seed_everything(3, verbose=False)
    module.trainer = trainer_
    before: dict[str, torch.Tensor] = {}

    def remember(*_: Any) -> None:
        before.update(whole_weights(module))

    module.on_train_start = remember  # type: ignore[method-assign]
    data = SFTDataModule(inputs / "tokenizer", {"names": SFTSource([inputs / "names.jsonl"])}, 256)
    trainer_.fit(module, datamodule=data)
    return {name: tensor - before[name] for name, tensor in whole_weights(module).items()}


def whole_weights(module: SFTModule) -> dict[str, torch.Tensor]:
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).double().clone() for n, p in trained.items()}


def moved_by_strategy(inputs: Path, num_processes: int) -> dict[str, dict[str, Any]]:
    """The same in each of ``num_processes`` processes, from either base."""
    as_torchrun_would()
    strategy = {"compute_dtype": "bfloat16"}
    moves = {base: moved(inputs, base, strategy=strategy, num_processes=num_processes) for base in ("bf16", "fp32")}
    return {base: {name: move.numpy() for name, move in of_base.items()} for base, of_base in moves.items()}
