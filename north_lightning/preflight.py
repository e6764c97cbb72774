"""Contradictions between the parts of a run, found before a server is started or a file is written.

In: trainer, module and data as the config makes them. Out: nothing, or a ``ConfigError`` with the key and the remedy.
A constructor refuses its own values; here are the checks that need several parts. A part that knows such a check of its
own, a plug-in's included, has a method ``check_run(trainer, module, data)``, which is called from here.
"""

from __future__ import annotations

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from north_lightning.callbacks import RolloutProducerCallback, SidecarCallback, TimeAccounts, WeightSyncCallback
from north_lightning.callbacks.sampler_metrics import SamplerMetrics
from north_lightning.data import RolloutDataModule, SFTDataModule
from north_lightning.errors import ConfigError
from north_lightning.modules import CISPOModule, SFTModule
from north_lightning.synthesis import SynthesisModule, TaskDataModule

PAIRS: dict[type[LightningModule], type[LightningDataModule]] = {
    SFTModule: SFTDataModule,
    CISPOModule: RolloutDataModule,
    SynthesisModule: TaskDataModule,
}
"""Modules, and the data that each is made for."""

RL_CALLBACKS = (SidecarCallback, WeightSyncCallback, RolloutProducerCallback)
"""What RL needs exactly one of each of."""

ONLY_IN_RL = (*RL_CALLBACKS, SamplerMetrics, TimeAccounts)


def check_run(trainer: Trainer, module: LightningModule, data: LightningDataModule | None, command: str) -> None:
    """Refuse what cannot work, before ``command`` (fit, validate or predict) begins.

    Raises:
        NorthError: one that names the key and the remedy.
    """
    check_pair(module, data)
    if command != "fit":
        return
    if isinstance(module, CISPOModule):
        check_rl_callbacks(trainer)
    else:
        refuse_rl_callbacks(trainer, module)
    for part in (module, data, trainer.strategy, *trainer.callbacks):  # type: ignore[attr-defined]
        if (check := getattr(part, "check_run", None)) is not None:
            check(trainer, module, data)


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
