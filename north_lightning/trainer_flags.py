"""Lightning's flags and callbacks that would silently do nothing here, or break what is promised: refused by name.

In: the trainer's settings and the parts of a run. Out: nothing, or a ``ConfigError`` of one line with the key and the
remedy. What is not refused works as Lightning documents it. Contradictions of our own parts are ``preflight``'s.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks.finetuning import BaseFinetuning
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from north_lightning.data import RolloutDataModule, SFTDataModule
from north_lightning.errors import ConfigError, NorthError
from north_lightning.model.precision import PRECISIONS, canonical
from north_lightning.modules import CISPOModule, NorthModule
from north_lightning.parallel import NorthStrategy

Rule = tuple[Callable[[Any], bool], str]
"""Which values of a setting are refused, and what is said."""

_given: Callable[[Any], bool] = lambda value: value is not None and value is not False  # noqa: E731
_not_in_fit = (_given, "which fit does not use: leave it out")
_no_validation = "is for validation, which {model} with {data} does not have here: {remedy}"

SETTINGS: dict[str, Rule] = {
    "accumulate_grad_batches": (lambda value: value < 1, "expected at least 1"),
    "gradient_clip_val": (_given, "expected nothing: set model.max_grad_norm instead"),
    "gradient_clip_algorithm": (_given, "expected nothing: gradients are clipped by norm, to model.max_grad_norm"),
    "max_steps": (lambda value: value == 0, "which trains nothing: expected at least 1, or -1 for no limit"),
    "max_epochs": (lambda value: value == 0, "which trains nothing: expected at least 1, or -1 for no limit"),
    "limit_train_batches": (lambda value: value == 0, "which trains nothing: expected more than 0"),
    "inference_mode": (lambda value: not value, "which fit does not use: it validates under no_grad anyway"),
    "limit_test_batches": _not_in_fit,
    "limit_predict_batches": _not_in_fit,
    "model_registry": (_given, "expected nothing: checkpoints stay in the run's folder"),
    "reload_dataloaders_every_n_epochs": (
        lambda value: value > 0,
        "expected 0: the data goes on by itself, and a new loader would begin it again",
    ),
    "sync_batchnorm": (_given, "expected false: the model has no batch normalization"),
    "use_distributed_sampler": (_given, "expected false: data deals its rows out to the processes itself"),
    "strategy": (
        lambda value: isinstance(value, str) and any(word in value for word in ("spawn", "fork", "notebook")),
        "expected processes of their own: use ddp or NorthStrategy",
    ),
    "precision": (  # the value that was given: on a CPU Lightning takes 16-mixed for bf16-mixed
        lambda value: canonical(value) not in PRECISIONS,
        f"expected one of {', '.join(PRECISIONS)}: North's activations exceed float16, and float64 gains nothing",
    ),
}

IN_RL: dict[str, Rule] = {
    "accumulate_grad_batches": (lambda value: value != 1, "expected 1: a batch is a whole optimizer step"),
    "overfit_batches": (lambda value: value > 0, "expected 0: a rollout is trained once; RL on few tasks is task_sets"),
}

FOR_VALIDATION: dict[str, Any] = {
    "val_check_interval": None,
    "check_val_every_n_epoch": 1,
    "limit_val_batches": None,
    "num_sanity_val_steps": 0,
}
"""Settings that do nothing without validation, and what they are where nobody has set them."""

CALLBACKS: dict[type[Callback], str] = {
    lightning_callbacks.BatchSizeFinder: "a batch is a row of data.row_tokens tokens; `estimate` tells what fits",
    lightning_callbacks.GradientAccumulationScheduler: (
        "the data counts trainer.accumulate_grad_batches rows to a step; set that, for the whole run"
    ),
    lightning_callbacks.LearningRateFinder: "the model has no attribute lr; set the optimizer's lr in model.optimizer",
    lightning_callbacks.ModelPruning: "a pruned model cannot be released; remove it",
    lightning_callbacks.StochasticWeightAveraging: (
        "it copies the model before there is one; use WeightAveraging or EMAWeightAveraging"
    ),
    BaseFinetuning: "the model has no backbone to thaw; use model.lora or model.freeze_router",
    SpikeDetection: (
        "a micro-batch's loss is its part of the step's, so rows differ; a loss that is not finite ends a run anyway"
    ),
}


def check_flags(
    settings: Mapping[str, Any], trainer: Trainer, module: LightningModule, data: LightningDataModule | None
) -> None:
    """Refuse settings and callbacks of Lightning's that do not do here what Lightning documents.

    Args:
        settings: The ``trainer`` section of the config; what is left out counts as not given.
    """
    in_rl = isinstance(module, CISPOModule)
    for key, (is_refused, reason) in [*SETTINGS.items(), *(IN_RL.items() if in_rl else ())]:
        if (value := settings.get(key)) is not None and is_refused(value):
            raise ConfigError(f"trainer.{key}: got {value}, {reason}")
    if (settings.get("min_steps") or 0) > (settings.get("max_steps") or -1) > 0:
        raise ConfigError(f"trainer.min_steps: expected at most max_steps, got {settings['min_steps']}")
    _check_strategy(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        _check_callback(callback, trainer, in_rl)
    if isinstance(module, NorthModule) and not validates(trainer, data):
        _check_without_validation(settings, trainer, module, data)
    if isinstance(data, RolloutDataModule):
        epoch, limit = data.num_batches or max(trainer.max_steps, 1), trainer.limit_train_batches
        _check_early_stopping(trainer, min(epoch, limit if isinstance(limit, int) else int(epoch * limit)), False)


def validates(trainer: Trainer, data: LightningDataModule | None) -> bool:
    """Whether there is anything to validate on."""
    if isinstance(data, SFTDataModule):
        return bool(data.validation_files) and trainer.limit_val_batches != 0
    return not isinstance(data, RolloutDataModule)


def _check_strategy(trainer: Trainer) -> None:
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy, NorthStrategy):
        raise ConfigError(
            f"trainer.strategy: expected ddp or NorthStrategy, which cuts the model by itself, got "
            f"{type(trainer.strategy).__name__}"
        )


def _check_callback(callback: Callback, trainer: Trainer, in_rl: bool) -> None:
    for kind, reason in CALLBACKS.items():
        if isinstance(callback, kind):
            raise ConfigError(f"trainer.callbacks: {type(callback).__name__} is not supported: {reason}")
    if isinstance(callback, lightning_callbacks.WeightAveraging) and isinstance(trainer.strategy, NorthStrategy):
        raise ConfigError(
            f"trainer.callbacks: {type(callback).__name__} keeps a second, whole model, which a model in parts "
            "(trainer.strategy NorthStrategy) is not; remove one of them"
        )
    timed = isinstance(callback, lightning_callbacks.ModelCheckpoint) and (
        "'train_time_interval': None" not in callback.state_key
    )
    if timed and in_rl:
        raise ConfigError(
            "trainer.callbacks: ModelCheckpoint.train_time_interval is ignored by Lightning in RL; use "
            "every_n_train_steps"
        )


def _check_without_validation(
    settings: Mapping[str, Any], trainer: Trainer, module: LightningModule, data: LightningDataModule | None
) -> None:
    in_rl = isinstance(data, RolloutDataModule)
    remedy = "leave it out" if in_rl else "set data.validation_files"
    reason = _no_validation.format(model=type(module).__name__, data=type(data).__name__, remedy=remedy)
    for key, default in FOR_VALIDATION.items():
        value = settings.get(key, default)
        if value not in (default, None) and not (key == "limit_val_batches" and value == 0):
            raise ConfigError(f"trainer.{key}: {value} {reason}")
    for owner, monitor in monitors(trainer):
        if monitor.startswith("val"):
            raise ConfigError(f"{owner}.monitor: '{monitor}' {reason}")


# ---- what is monitored -----------------------------------------------------------------------------------------------


def monitors(trainer: Trainer) -> list[tuple[str, str]]:
    """(who, name of a metric) of all callbacks and schedules that look at one."""
    callbacks = [
        (f"trainer.callbacks: {type(callback).__name__}", callback.monitor)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(getattr(callback, "monitor", None), str) and getattr(callback, "strict", True)
    ]
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    return callbacks + [("model.lr_scheduler", one.monitor) for one in schedules if hasattr(one, "monitor")]


class MonitorCheck(Callback):
    """Ends a run whose callbacks or schedules look at a metric that nobody logs, as soon as that is known: after the
    first optimizer step, or for names that begin with ``val`` after the first validation. Belongs before all others."""

    def __init__(self) -> None:
        self._is_checked = {"train": False, "val": False}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not validates(trainer, trainer.datamodule):  # type: ignore[attr-defined]
            _check_without_validation({}, trainer, pl_module, trainer.datamodule)  # type: ignore[attr-defined]
        elif not isinstance(trainer.num_training_batches, float):
            _check_early_stopping(trainer, trainer.num_training_batches, validates=True)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step > 0:  # the step before has been logged by everyone
            self._check("train", trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check("train", trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._check("val", trainer)

    def _check(self, when: str, trainer: Trainer) -> None:
        if self._is_checked[when] or trainer.state.fn != "fit":
            return
        self._is_checked[when] = True
        for owner, monitor in monitors(trainer):
            if monitor.startswith("val") == (when == "val") and monitor not in trainer.callback_metrics:
                known = _known(monitor, trainer.callback_metrics)
                raise ConfigError(f"{owner}.monitor: '{monitor}' is not logged; {known}")


def _known(name: str, logged: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(logged), n=1)
    return f"did you mean '{close[0]}'?" if close else f"logged are {', '.join(sorted(logged)) or 'none'}"


def _check_early_stopping(trainer: Trainer, num_batches: int, validates: bool) -> None:
    """It looks at the end of an epoch or of a validation: one of them has to come before the run ends."""
    steps, epochs = trainer.max_steps or -1, trainer.max_epochs or -1
    limits = [steps * trainer.accumulate_grad_batches if steps > 0 else 0, epochs * num_batches if epochs > 0 else 0]
    end = min((limit for limit in limits if limit), default=num_batches + 1)
    interval = getattr(trainer, "val_check_interval", 1.0)
    look = min(num_batches, interval if isinstance(interval, int) else int(num_batches * interval))
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, lightning_callbacks.EarlyStopping) and (look if validates else num_batches) >= end:
            validation = " or trainer.val_check_interval" if validates else ""
            raise ConfigError(
                f"trainer.callbacks: EarlyStopping looks at the end of an epoch ({num_batches} batches), and the run "
                f"ends before or with the first: set trainer.limit_train_batches{validation} to how often it shall "
                "look, or use StopAtLoss"
            )


EXPECTED = {
    "strategy": "auto, ddp or NorthStrategy, which cuts the model by itself",
    "devices": "auto, or a number of at least 1 of those that there are",
    "accelerator": "auto, cpu, or gpu where there is one",
}


def refused_setting(settings: Mapping[str, Any], error: Exception) -> str:
    """What Lightning says on making the trainer, with the key that it speaks of and what is expected there."""
    said = " ".join(str(error).split())
    given = {key: value for key, value in settings.items() if value not in (None, False, "auto")}
    ours = [key for key in EXPECTED if key in given]
    named = [key for key in ours if key in said] or [key for key in ours if f"{given[key]}" in said]
    named = named or [key for key in given if f"`{key}`" in said or f"'{given[key]}'" in said]
    if not named:
        return f"trainer: {said}"
    expected = f"expected {EXPECTED[named[0]]}, " if named[0] in EXPECTED else ""
    return f"trainer.{named[0]}: {expected}got {given[named[0]]!r}: {said[:200]}"


# ---- what Lightning itself complains about ---------------------------------------------------------------------------


_IN_A_LIST = re.compile(r"Problem with given class_path '([\w.]+)':\s*(.*?)\n\s*- Expected", re.DOTALL)
"""What jsonargparse leaves of the error of a class in a list of loggers."""


def complaint(error: BaseException) -> str | None:
    """One line, if ``error`` or what it was raised from is raised by Lightning's own code about settings."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, NorthError):
            return None
        frames = list(traceback.walk_tb(cause.__traceback__))
        module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
        settings = isinstance(cause, ValueError | TypeError | RuntimeError | ImportError | NotImplementedError)
        in_lightning = module.startswith(("lightning.", "lightning_utilities."))
        of_wandb = type(cause).__module__.startswith("wandb.")
        if isinstance(cause, MisconfigurationException) or (settings and in_lightning) or of_wandb:
            return " ".join(str(cause).split())
        cause = cause.__cause__ or cause.__context__
    found = _IN_A_LIST.search(str(error))
    return f"{found[1]}: {' '.join(found[2].split())}" if found else None
