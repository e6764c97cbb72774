"""A resumed run goes on in the loggers of its first life.

In: the loggers of the config, and ``loggers.json``, which a run leaves in its folder. Out: the same W&B run,
TensorBoard folder and CSV file. ``JSONLHistory`` does this by itself.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from north_lightning.durable import replace_text
from north_lightning.errors import ConfigError
from north_lightning.run_folders import LOGGERS

_OFFLINE_MODES = ("offline", "dryrun", "disabled")


def continue_loggers(entries: Any, folder: Path) -> list[Any]:
    """Give the loggers of a config, where they have no version of their own, those of the run in ``folder``.

    Returns:
        The settings of those, whose ``version`` was None.
    """
    continued = []
    path = folder / LOGGERS
    recorded = json.loads(path.read_text()) if path.is_file() else []
    for entry, (class_path, version) in zip(_entries(entries), recorded, strict=False):
        settings = entry.init_args
        if entry.class_path == class_path and "version" in settings and not settings.version and not settings.get("id"):
            settings.version = version
            continued.append(settings)
    return continued


def check_wandb(entries: Any) -> None:
    """Say where the environment keeps W&B offline; refuse to send to a server that cannot be reached.

    Raises:
        ConfigError: within seconds.
    """
    for entry in _entries(entries):
        if not entry.class_path.endswith(".WandbLogger") or entry.init_args.offline:
            continue
        if (mode := os.environ.get("WANDB_MODE", "")) in _OFFLINE_MODES:
            print(f"W&B: WANDB_MODE={mode} in the environment: nothing is sent, though offline: false", file=sys.stderr)
            continue
        url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        try:
            answer = httpx.post(f"{url.rstrip('/')}/graphql", json={"query": "{__typename}"}, timeout=5)
            if answer.is_server_error or answer.status_code == 404:  # W&B would try again for minutes
                raise httpx.HTTPError(f"it answers {answer.status_code} {answer.reason_phrase}")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigError(
                f"trainer.logger: WandbLogger cannot reach {url} ({' '.join(str(error).split())}): set offline: true "
                "and send the run later with `wandb sync`, or check the network, HTTPS_PROXY and WANDB_BASE_URL"
            ) from error


def _entries(loggers: Any) -> list[Any]:
    several = loggers if isinstance(loggers, list) else [loggers]
    return [entry for entry in several if hasattr(entry, "class_path")]


class RunLoggers(Callback):
    """Records which logs a run writes, and keeps what a CSV file holds of a run that goes on.

    Args:
        entries: The loggers of the config.
    """

    def __init__(self, entries: Any) -> None:
        self._entries = _entries(entries)
        self._rows: dict[int, list[Mapping[str, str]]] = {}

    def read(self, trainer: Trainer) -> None:
        """Before Lightning opens the files, and so empties them."""
        for number, logger in enumerate(trainer.loggers if trainer.is_global_zero else ()):
            path = Path(logger.log_dir) / "metrics.csv" if isinstance(logger, CSVLogger) else None
            if path is not None and path.is_file():
                with path.open(newline="") as file:
                    self._rows[number] = list(csv.DictReader(file))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for number, logger in enumerate(trainer.loggers):
            for row in self._rows.pop(number, []):
                if int(row["step"]) < trainer.global_step:
                    values = {name: float(text) for name, text in row.items() if name != "step" and text}
                    logger.log_metrics(values, int(row["step"]))
        recorded = zip(self._entries, trainer.loggers, strict=False)
        text = json.dumps([(entry.class_path, logger.version) for entry, logger in recorded])
        replace_text(Path(trainer.default_root_dir) / LOGGERS, text + "\n")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What was logged before a checkpoint is on disk with it."""
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.save()
            if (flush := getattr(getattr(logger, "experiment", None), "flush", None)) is not None:
                flush()
