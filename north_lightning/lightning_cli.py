"""``fit``, ``validate`` and ``predict``: Lightning's CLI with the habits this package needs.

In: the command line. Out: a finished run, or an error of ``errors``. Not here: the parts that are composed; each is
chosen in YAML by ``class_path``, by its short name if it belongs to this package.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from north_lightning.doctor import refuse_cuda_torchvision

refuse_cuda_torchvision()

import torch  # noqa: E402
from jsonargparse.typing import PositiveInt  # noqa: E402
from lightning.pytorch import LightningDataModule, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException  # noqa: E402

import north_lightning.data.sft  # noqa: E402 (here and below: importing a class makes its short name known)
import north_lightning.synthesis  # noqa: E402, F401
from north_lightning.callbacks import RandomState, RunLock, SaveOnTermination  # noqa: E402
from north_lightning.errors import ConfigError  # noqa: E402
from north_lightning.modules import NorthModule  # noqa: E402, and with it NorthStrategy's short name
from north_lightning.parallel.single_file import DurableCheckpointIO  # noqa: E402
from north_lightning.parser import ExplainingParser, check_values  # noqa: E402
from north_lightning.preflight import check_run  # noqa: E402

PLUGIN_GROUP = "north_lightning.plugins"


class TrainingParser(ExplainingParser, LightningArgumentParser):
    """Lightning's parser, with ``ExplainingParser``'s errors."""


class NorthCLI(LightningCLI):
    """Chooses model, data and every plug-in from the config; nothing is linked behind the user's back."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands that fit here; ``test`` is a command of ``evaluation``, which trains nothing."""
        commands = ("fit", "validate", "predict")
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in commands}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--num_threads", type=PositiveInt | None, help="CPU threads of torch; all cores by default."
        )
        parser.set_defaults(
            {
                "trainer.num_sanity_val_steps": 0,
                "trainer.use_distributed_sampler": False,
                "trainer.logger": False,
                "trainer.enable_model_summary": False,
                "trainer.enable_progress_bar": False,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Threads; and no code is run from a checkpoint's pickle on resuming, unless the user says otherwise."""
        settings = self.config[self.subcommand]
        check_values(settings, None)
        if settings.seed_everything is False:
            raise ConfigError("seed_everything: expected a number, got false: a run without a seed cannot be resumed")
        if settings.weights_only is None:
            settings.weights_only = True
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)

    def before_fit(self) -> None:
        check_run(self.trainer, self.model, self.datamodule, "fit")

    def before_validate(self) -> None:
        check_run(self.trainer, self.model, self.datamodule, "validate")

    def before_predict(self) -> None:
        check_run(self.trainer, self.model, self.datamodule, "predict")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With checkpoints that survive a crash, where the config does not choose how they are written."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        return trainer


def run_training(arguments: Sequence[str]) -> int:
    """Run one of Lightning's commands; 0, or 143 after a SIGTERM and 130 after Ctrl-C, when callbacks have saved.

    Raises:
        ConfigError: also in place of Lightning's own complaints about a configuration.
    """
    for plugin in entry_points(group=PLUGIN_GROUP):
        plugin.load()
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"Total length of .* across ranks is zero")  # no validation data: as configured
    warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated")
    sys.argv = [sys.argv[0], *arguments]  # Lightning warns when it is given both
    saver = SaveOnTermination(shlex.join(["python", "-m", "north_lightning", *arguments]))
    try:
        NorthCLI(
            LightningModule if arguments[0] == "predict" else NorthModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_class=TrainingParser,
            parser_kwargs=_parser_kwargs(),
            trainer_defaults={"callbacks": [RunLock(), RandomState(), saver]},
        )
    except SystemExit as ended:  # SIGTERMException is one; Lightning makes one of a KeyboardInterrupt
        if saver.received is None and not isinstance(ended, SIGTERMException):
            raise
        return 128 + (saver.received or signal.SIGTERM)
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error
    return 0


def _parser_kwargs() -> dict[str, Any]:
    prog = "python -m north_lightning"
    return {"prog": prog, **{name: {"prog": f"{prog} {name}"} for name in NorthCLI.subcommands()}}
