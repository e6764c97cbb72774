"""Contradictions between the parts of a run, found before a server is started or a file is written.

In: trainer, module and data as the config makes them. Out: nothing, or a ``ConfigError`` with the key and the remedy.
A constructor refuses its own values; here are the checks that need several parts. A part that knows such a check of its
own, a plug-in's included, has a method ``check_run(trainer, module, data)``, which is called from here.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch.nn import Parameter

from north_lightning.callbacks import (
    OnlineEvaluation,
    RolloutProducerCallback,
    SidecarCallback,
    TimeAccounts,
    WeightSyncCallback,
)
from north_lightning.callbacks.sampler_metrics import SamplerMetrics
from north_lightning.data import RolloutDataModule, SFTDataModule
from north_lightning.errors import ConfigError
from north_lightning.modules import CISPOModule, NorthModule, SFTModule
from north_lightning.modules.schedule import check_rates
from north_lightning.run_folders import check_writable, results_in, step_of
from north_lightning.synthesis import SynthesisModule, TaskDataModule

PAIRS: dict[type[LightningModule], type[LightningDataModule]] = {
    SFTModule: SFTDataModule,
    CISPOModule: RolloutDataModule,
    SynthesisModule: TaskDataModule,
}
"""Modules, and the data that each is made for."""

KEYWORDS = ("auto", "best", "last", "hpc")
"""What is taken for ``ckpt_path`` in place of a path."""

SAID_OF = {"learning rate": "lr", "beta": "betas", "epsilon": "eps", "weight_decay": "weight_decay"}
"""Words of torch's about an optimizer's key."""

RL_CALLBACKS = (SidecarCallback, WeightSyncCallback, RolloutProducerCallback)
"""What RL needs exactly one of each of."""

ONLY_IN_RL = (*RL_CALLBACKS, OnlineEvaluation, SamplerMetrics, TimeAccounts)


def check_run(
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule | None,
    command: str,
    ckpt_path: str | None = None,
    weights_only: bool = True,
    key: str = "ckpt_path",
) -> None:
    """Refuse what cannot work, before ``command`` (fit, validate or predict) begins.

    Raises:
        NorthError: one that names the key and the remedy.
    """
    check_pair(module, data)
    for folder in (trainer.default_root_dir, getattr(module, "output_dir", None)):
        if folder is not None:
            check_writable(Path(folder), "trainer.default_root_dir" if command == "fit" else "model.output_dir")
    if ckpt_path is not None and str(ckpt_path) not in KEYWORDS:
        if not Path(ckpt_path).exists():
            choices = "auto, last or " if key == "resume" else ""
            raise ConfigError(f"{key}: expected {choices}a checkpoint, '{ckpt_path}' does not exist")
        if (Path(ckpt_path) / "config.json").is_file():
            raise ConfigError(
                f"{key}: expected a training checkpoint, got '{ckpt_path}', a Hugging Face checkpoint: set "
                "model.checkpoint to it"
            )
        step_of(Path(ckpt_path), weights_only)
    if command == "validate" and not getattr(data, "validation_files", True):
        raise ConfigError("data.validation_files: expected the files to validate on, got none")
    check_launch(trainer)
    if command == "fit":
        if isinstance(module, NorthModule):
            check_outputs(trainer, module)
            check_optimizer(trainer, module)
        if isinstance(module, CISPOModule):
            check_rl_callbacks(trainer)
        else:
            refuse_rl_callbacks(trainer, module)
    for part in (module, data, trainer.strategy, *trainer.callbacks):  # type: ignore[attr-defined]
        if (check := getattr(part, "check_run", None)) is not None:
            check(trainer, module, data)


def check_launch(trainer: Trainer) -> None:
    """As many processes as were started: too few would each train alone, too many would be waited for."""
    count = "WORLD_SIZE" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_STEP_NUM_TASKS"
    if (started := int(os.environ.get(count, 0))) not in (0, trainer.num_devices * trainer.num_nodes):
        raise ConfigError(
            f"trainer.devices: expected devices x num_nodes = {started}, the processes that torchrun or srun has "
            f"started ({count}), got {trainer.num_devices} x {trainer.num_nodes}"
        )
    is_alone = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
    if trainer.num_nodes > 1 and is_alone and not os.environ.keys() & {"NODE_RANK", "GROUP_RANK"}:
        raise ConfigError(
            f"trainer.num_nodes: got {trainer.num_nodes}, but nothing has started processes on other nodes: run this "
            "with torchrun --nnodes or srun, or set it to 1"
        )


def check_outputs(trainer: Trainer, module: NorthModule) -> None:
    """Nothing that the run reads lies where it writes: there it would be replaced, or moved aside."""
    root = Path(trainer.default_root_dir)
    places = [("trainer.default_root_dir", place) for place in results_in(root)]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for key in ("directory", "dirpath"):  # of HFCheckpoint and ModelCheckpoint
            places += [(f"trainer.callbacks.{key}", Path(place))] if (place := getattr(callback, key, None)) else []
    read = {"checkpoint": module.checkpoint, "adapter": module.adapter, "tokenizer": module.tokenizer_dir}
    for name, path in ((name, path.resolve()) for name, path in read.items() if path is not None):
        if place := next(((key, place) for key, place in places if path.is_relative_to(place.resolve())), None):
            raise ConfigError(f"{place[0]}: expected another folder than '{place[1]}', where model.{name} is read")


def check_optimizer(trainer: Trainer, module: NorthModule) -> None:
    """Optimizer and schedule can be made, and the rate is positive; the warm-up ends before the training, the schedule
    does not."""
    try:
        optimizer = module.optimizer_factory([Parameter(torch.zeros(2, 2))])
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        key = next((f".{key}" for words, key in SAID_OF.items() if words in str(error)), "")
        raise ConfigError(f"model.optimizer{key}: {error}") from error
    if not 0 < (rate := float(optimizer.param_groups[0]["lr"])) < float("inf"):
        raise ConfigError(f"model.optimizer.lr: expected more than 0, got {rate}")
    if module.lr_scheduler_factory is None:
        return
    try:
        schedule = module.lr_scheduler_factory(optimizer)
    except ConfigError as error:
        raise ConfigError(f"model.lr_scheduler.{error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.lr_scheduler: {error}") from error
    warmup = getattr(schedule, "warmup_steps", 0)
    if 0 < trainer.max_steps <= warmup:
        raise ConfigError(
            f"model.lr_scheduler.warmup_steps: expected fewer than trainer.max_steps, {trainer.max_steps}, got {warmup}"
        )
    if (trainer.max_epochs or -1) < 0:  # else known when there is data, and checked then
        check_rates(schedule, trainer.max_steps)


def check_pair(module: LightningModule, data: LightningDataModule | None) -> None:
    """Data of the kind that the module trains on; classes that are not of this package may be combined freely."""
    wanted = next((of for kind, of in PAIRS.items() if isinstance(module, kind)), None)
    is_known = data is None or isinstance(data, tuple(PAIRS.values()))
    if wanted is not None and is_known and not isinstance(data, wanted):
        raise ConfigError(
            f"data.class_path: expected {wanted.__name__}, because model.class_path is {type(module).__name__}, got "
            f"{'none' if data is None else type(data).__name__}"
        )


def check_rl_callbacks(trainer: Trainer) -> None:
    """One server (or set of servers), pushes to it, and one producer, in the order that a resume needs."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for kind in RL_CALLBACKS:
        count = sum(isinstance(callback, kind) for callback in callbacks)
        if count != 1:
            several = "; several servers are entries of its environments" if kind is SidecarCallback else ""
            raise ConfigError(
                f"trainer.callbacks: expected one {kind.__name__}, because model.class_path is a CISPOModule, got "
                f"{count or 'none'}{several if count else ''}"
            )


def refuse_rl_callbacks(trainer: Trainer, module: LightningModule) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ONLY_IN_RL) and isinstance(module, SFTModule):
            raise ConfigError(
                f"trainer.callbacks: {type(callback).__name__} works with model.class_path CISPOModule (RL), got "
                f"{type(module).__name__}: remove the callback"
            )
