"""Runs of a few steps with one of Lightning's flags or callbacks, and what an observer sees of them.

The kinds: supervised fine-tuning; the same with adapters; reinforcement learning on recorded rollouts; fine-tuning in
two processes. A run begins as the command line begins it: trainer, preflight of the flags, ``fit``.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from launch import as_torchrun_would
from lightning.pytorch import Callback, Trainer, seed_everything
from small_runs import write_run_inputs

from north_lightning.callbacks import JSONLHistory, RandomState, RunLock, SidecarCallback, WeightSyncCallback
from north_lightning.data import RolloutDataModule, SFTDataModule, SFTSource
from north_lightning.errors import NorthError
from north_lightning.losses import CISPOLoss
from north_lightning.model import LoRAConfig, NorthConfig, NorthModel, save_checkpoint
from north_lightning.modules import CISPOModule, SFTModule
from north_lightning.trainer_flags import MonitorCheck, check_flags, complaint

sys.path.append(str(Path(__file__).parents[1] / "parallel"))

EPOCH = 6
"""Batches of an epoch, of every kind."""
LR = 1e-3


@dataclass
class Flag:
    """What is set for one run, beside what every run has."""

    trainer: Mapping[str, Any] = field(default_factory=dict)
    """Settings; ``logger`` may be a function of the run's folder."""
    module: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Any = ()
    """Callbacks; or a function of the run's folder that makes them."""
    validation: bool = True


@dataclass
class Seen:
    """What came of it."""

    error: str = ""
    steps: int = 0
    rows: list[Any] = field(default_factory=list)
    validated: list[int] = field(default_factory=list)
    validation_batches: int = 0
    lr: list[float] = field(default_factory=list)
    epochs: int = 0
    files: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    printed: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def logged(self) -> list[int]:
        return [line["step"] for line in self.history if "train/loss" in line]

    def checkpoints(self) -> list[str]:
        return [Path(name).name for name in self.files if name.endswith(".ckpt")]


class Observer(Callback):
    """Writes down what Lightning does."""

    def __init__(self) -> None:
        self.seen = Seen()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        def note(*_: Any) -> None:
            self.seen.facts["autocast"] = torch.is_autocast_enabled("cpu")

        pl_module.model.register_forward_pre_hook(note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        groups = getattr(batch, "groups", None)
        self.seen.rows.append(tuple(batch.token_ids.tolist()) if groups is None else tuple(g.group_id for g in groups))
        self.seen.lr.append(float(trainer.optimizers[0].param_groups[0]["lr"]))
        self.seen.facts |= {
            "anomaly": torch.is_anomaly_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "deterministic_warns": torch.is_deterministic_algorithms_warn_only_enabled(),
            "benchmark": torch.backends.cudnn.benchmark,
            "dtype": {parameter.dtype for parameter in pl_module.parameters()},
        }

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.steps = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen.validated.append(trainer.global_step)

    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        self.seen.validation_batches += 1
        self.seen.facts["inference_mode"] = torch.is_inference_mode_enabled()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seen.epochs += 1


def write_inputs(folder: Path) -> Path:
    write_run_inputs(folder)
    torch.manual_seed(0)
    model = NorthModel(NorthConfig.load(folder / "model.json"))
    save_checkpoint(model, folder / "base", tokenizer_dir=folder / "tokenizer")
    return folder


def run(kind: str, inputs: Path, folder: Path, flag: Flag, ckpt_path: Path | None = None) -> Seen:
    """One run. ``kind``: sft, lora, rl; or two, called in each of two processes."""
    observer, printed, started = Observer(), io.StringIO(), time.monotonic()
    seen = observer.seen
    handler = logging.StreamHandler(printed)
    logging.getLogger("lightning.pytorch").addHandler(handler)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen.weights = _fit(kind, inputs, folder, flag, observer, ckpt_path)
    except Exception as error:
        line = str(error) if isinstance(error, NorthError) else complaint(error)
        if line is None:
            raise
        seen.error = line
    finally:
        logging.getLogger("lightning.pytorch").removeHandler(handler)
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = False
    seen.printed, seen.seconds = printed.getvalue(), time.monotonic() - started
    _read_folder(seen, folder)
    return seen


def _read_folder(seen: Seen, folder: Path) -> None:
    seen.files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    history = folder / "history.jsonl"
    seen.history = [json.loads(line) for line in history.read_text().splitlines()] if history.exists() else []


def _fit(
    kind: str, inputs: Path, folder: Path, flag: Flag, observer: Observer, ckpt_path: Path | None
) -> dict[str, torch.Tensor]:
    seed_everything(3, verbose=False)
    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 2 if kind == "two" else 1,
        "max_steps": 4,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "logger": JSONLHistory(folder),
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "enable_checkpointing": None,
        **({"strategy": "ddp"} if kind == "two" else {}),
        **flag.trainer,
    }
    if callable(settings["logger"]):
        settings["logger"] = settings["logger"](folder)
    module, data, callbacks = _parts(kind, inputs, flag)
    own = list(flag.callbacks(folder)) if callable(flag.callbacks) else list(flag.callbacks)
    defaults = {"enable_checkpointing": False} if settings["enable_checkpointing"] is None else {}
    if any(type(callback).__name__ in ("ModelCheckpoint", "OnExceptionCheckpoint") for callback in own):
        defaults = {}
    trainer = Trainer(callbacks=[*callbacks, *own, RunLock(), RandomState(), observer], **{**settings, **defaults})
    trainer.callbacks.insert(0, MonitorCheck())
    check_flags(settings, trainer, module, data)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _parts(kind: str, inputs: Path, flag: Flag) -> tuple[Any, Any, Iterable[Callback]]:
    settings = {
        "checkpoint": inputs / "base",
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=LR),
        **flag.module,
    }
    if kind == "rl":
        from reinforcing import FakeSidecar, FakeTransport, Recorded

        transport = FakeTransport()
        return (
            CISPOModule(loss=CISPOLoss(), router_replay=False, **settings),
            RolloutDataModule(Recorded(), 2, 120, num_batches=EPOCH, max_wait_s=20),
            [
                SidecarCallback(lambda *_: FakeSidecar(), look_every_s=0.01),
                WeightSyncCallback(2, lambda urls: transport, max_policy_lag=1000),
            ],
        )
    if kind == "lora":
        settings["lora"] = LoRAConfig(rank=2, alpha=4.0)
    num_rows = 2 * EPOCH if kind == "two" else EPOCH  # of one conversation each
    data = SFTDataModule(
        inputs / "tokenizer",
        {"sums": SFTSource([inputs / "sums.jsonl"], max_samples=num_rows)},
        128,
        validation_files=[inputs / "names.jsonl"] if flag.validation else None,
    )
    return SFTModule(**settings), data, []


def run_all(inputs: Path, folder: Path, flags: Mapping[str, Flag]) -> dict[str, Seen]:
    """Every flag, in a process that is one of two."""
    import torch.distributed as dist

    as_torchrun_would()
    seen = {}
    for name, flag in flags.items():
        seen[name] = run("two", inputs, folder / name, flag)
        dist.barrier()
        _read_folder(seen[name], folder / name)  # now that process 0 has written all
        dist.barrier()
    return seen
