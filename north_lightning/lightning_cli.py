"""``fit``, ``validate`` and ``predict``: Lightning's CLI with the habits this package needs.

In: the command line. Out: a finished run, or an error of ``errors``. Not here: the parts that are composed; each is
chosen in YAML by ``class_path``, by its short name if it belongs to this package; what counts as an earlier run's work
(``run_folders``).
"""

from __future__ import annotations

import atexit
import json
import logging
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from north_lightning.doctor import refuse_cuda_torchvision

refuse_cuda_torchvision()

import torch  # noqa: E402
import yaml  # noqa: E402
from jsonargparse.typing import PositiveInt  # noqa: E402
from lightning.pytorch import LightningDataModule, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback  # noqa: E402
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402
from lightning.pytorch.utilities import rank_zero_only  # noqa: E402
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException  # noqa: E402

import north_lightning.data.sft  # noqa: E402 (here and below: importing a class makes its short name known)
import north_lightning.synthesis  # noqa: E402, F401
from north_lightning.callbacks import (  # noqa: E402
    HFCheckpoint,
    JSONLHistory,
    OwedValidation,
    RandomState,
    RunLock,
    SaveOnTermination,
)
from north_lightning.config_files import set_in_file  # noqa: E402
from north_lightning.durable import replace_text  # noqa: E402
from north_lightning.errors import CheckpointError, ConfigError, NorthError  # noqa: E402
from north_lightning.modules import NorthModule  # noqa: E402, and with it NorthStrategy's short name
from north_lightning.modules.resuming import flatten  # noqa: E402
from north_lightning.parallel.single_file import DurableCheckpointIO  # noqa: E402
from north_lightning.parser import ExplainingParser, check_values  # noqa: E402
from north_lightning.preflight import PAIRS, check_run  # noqa: E402
from north_lightning.run_folders import (  # noqa: E402
    CONFIG,
    FINISHED,
    LIMITS,
    Checkpoint,
    changed_settings,
    claim_run,
    newest_checkpoint,
    results_in,
    step_of,
    write_result,
)
from north_lightning.run_loggers import RunLoggers, check_wandb, continue_loggers  # noqa: E402
from north_lightning.sandbox.scratch import Scratch  # noqa: E402
from north_lightning.signals import Ended, end_in_order, exit_code, requeue_slurm_job  # noqa: E402
from north_lightning.trainer_flags import MonitorCheck, check_flags, complaint, refused_setting  # noqa: E402

PLUGIN_GROUP = "north_lightning.plugins"

ROUTINE = (
    "GPU available",
    "TPU available",
    "💡",
    "LOCAL_RANK",
    "`Trainer",
    "Using default",
    "Initializing distributed",
    "-" * 9,
)
"""How lines begin that Lightning logs in every run."""


class TrainingParser(ExplainingParser, LightningArgumentParser):
    """Lightning's parser, with ``ExplainingParser``'s errors."""

    def _wrong_config(self) -> str | None:
        """Data of the wrong kind explains why its keys are wrong."""
        kinds = [str(set_in_file(section, "class_path")).rpartition(".")[2] for section in ("model", "data")]
        pair = next((of.__name__ for kind, of in PAIRS.items() if kind.__name__ == kinds[0]), kinds[1])
        if kinds[1] != pair and kinds[1] in (of.__name__ for of in PAIRS.values()):
            return f"data.class_path: expected {pair}, because model.class_path is {kinds[0]}, got {kinds[1]}"
        return super()._wrong_config()


class RunConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder when training begins; an earlier, different one is kept. Loggers get
    it too."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a run that cannot begin leaves nothing."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero and (not (folder / CONFIG).exists() or changed_settings(folder, self.text())):
            write_result(folder / CONFIG, self.text())
        if trainer.is_global_zero and trainer.enable_autolog_hparams:
            for logger in trainer.loggers:
                logger.log_hyperparams(yaml.safe_load(self.text()))

    def text(self) -> str:
        return str(self.parser.dump(self.config, skip_unset=False))


class NorthCLI(LightningCLI):
    """Chooses model, data and every plug-in from the config; nothing is linked behind the user's back."""

    _continued: Sequence[Any] = ()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands that fit here; ``test`` is a command of ``evaluation``, which trains nothing."""
        commands = ("fit", "validate", "predict")
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in commands}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--num_threads", type=PositiveInt | None, help="CPU threads of torch; all cores by default."
        )
        if parser.prog.endswith(" fit"):
            parser.add_argument(
                "--resume",
                type=str | None,
                help="Where training goes on. `auto`: from the newest complete checkpoint of the run's folder, "
                "interrupted.ckpt included; from step 0 if there is none; a finished run is left as it is. So the same "
                "command continues after a crash, a requeue or a preemption. `last`: as `auto`, but no checkpoint is "
                "an error. Or a path. Lightning's ckpt_path is another name for it. Null begins at step 0 and refuses "
                "a folder with the work of an earlier run.",
            )
            parser.add_argument(
                "--overwrite",
                type=bool,
                default=False,
                help="Move the work of an earlier run in the run's folder aside, to NAME.1, NAME.2, ..., and begin at "
                "step 0. Nothing is deleted.",
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Lightning would take settings of the model, its class too, from a checkpoint; here they are the config's.

        Raises:
            ConfigError: a value that no part can take.
        """
        super().parse_arguments(parser, args)
        settings = self.config[self.config.subcommand]
        if settings.trainer is None:
            raise ConfigError("trainer: expected keys below it, got null: delete the line")
        if type(seed := settings.seed_everything) is int and not 0 <= seed < 2**32:
            raise ConfigError(f"seed_everything: expected 0 to 2**32 - 1, got {seed}")
        check_values(settings, None)
        self._given_ckpt_path, settings.ckpt_path = settings.ckpt_path, None

    def before_instantiate_classes(self) -> None:
        """Threads, folders; no code is run from a checkpoint's pickle on resuming, unless the user says otherwise."""
        settings = self.config[self.subcommand]
        if settings.seed_everything is False:
            raise ConfigError("seed_everything: expected a number, got false: a run without a seed cannot be resumed")
        settings.ckpt_path = self._given_ckpt_path
        if settings.weights_only is None:
            settings.weights_only = True
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        if settings.get("resume") or settings.ckpt_path:
            self._continued = continue_loggers(settings.trainer.logger, Path(settings.trainer.default_root_dir or "."))
        if settings.trainer.fast_dev_run:  # a trial run leaves nothing
            end_in_order()
            scratch = Scratch("run")
            atexit.register(scratch.delete)
            settings.trainer.default_root_dir = str(scratch.path)
        loggers = settings.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            arguments: Any = getattr(logger, "init_args", None) or {}
            if str(arguments.get("save_dir", "")) == ".":  # left out: what a run writes lies in its folder
                arguments.save_dir = settings.trainer.default_root_dir or Path()

    def after_instantiate_classes(self) -> None:
        """Let checkpoints know the config."""
        if isinstance(self.model, NorthModule):
            self.model.run_settings = dict(flatten(self.config[self.subcommand].as_dict()))

    def before_fit(self) -> None:
        end_in_order()
        check_flags(self.config[self.subcommand].trainer, self.trainer, self.model, self.datamodule)
        check_wandb(self.config[self.subcommand].trainer.logger)
        self._check("fit")
        settings = self.config[self.subcommand]
        for callback in self._callbacks(RunLock):
            callback.take(self.trainer)
        try:
            path = self._begin(settings.resume, settings.ckpt_path, settings.overwrite, bool(settings.weights_only))
        except NorthError as error:
            for callback in self._callbacks(RunLock):
                callback.on_exception(self.trainer, self.model, error)
            raise
        self.config_init[self.subcommand]["ckpt_path"] = None if path is None else str(path)
        if path is not None:
            for loggers in self._callbacks(RunLoggers):
                loggers.read(self.trainer)

    def after_fit(self) -> None:
        """Record that the run is complete: all that it writes is written."""
        if self.trainer.is_global_zero and not self.config[self.subcommand].trainer.fast_dev_run:
            text = json.dumps({"steps": self.trainer.global_step}) + "\n"
            replace_text(Path(self.trainer.default_root_dir) / FINISHED, text)

    def _begin(self, resume: str | None, ckpt_path: Any, overwrite: bool, weights_only: bool) -> Path | None:
        """The checkpoint that training goes on from; the run's folder is free for what comes.

        Every process finds the same; only process 0 moves anything, before the others can join it.
        """
        if ckpt_path is not None and resume is not None:
            raise ConfigError(f"resume: expected it or its other name, ckpt_path, got {resume!r} and {ckpt_path!r}")
        resume = resume if ckpt_path is None else str(ckpt_path)
        if resume is not None and overwrite:
            raise ConfigError(f"resume and overwrite: expected one of them, got {resume!r} and true")
        folder, elsewhere, searched = self._places()
        is_first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        if resume is None:
            claim_run(folder, elsewhere, overwrite, is_first)
            return None
        newest = newest_checkpoint(searched, weights_only, quiet=not is_first)
        self._exit_if_finished(folder, newest, is_first)
        if resume in ("auto", "last"):
            if newest is None and resume == "last":
                raise CheckpointError(f"resume: expected a complete checkpoint in '{folder}', found none")
            if is_first:
                _say(f"goes on from '{newest.path}', step {newest.step}" if newest else f"'{folder}' begins at step 0")
            if newest is None:
                claim_run(folder, elsewhere, True, is_first)
            return None if newest is None else newest.path
        path = Path(resume)
        if not path.exists():
            raise CheckpointError(f"resume: expected auto, last or the path of a checkpoint, got '{resume}'")
        step = step_of(path, weights_only)
        is_own = any(path.resolve().parent == place.resolve() for place in searched)
        if not results_in(folder):
            claim_run(folder, [place for place in elsewhere if place.resolve() not in path.resolve().parents], False)
        elif not is_own or newest is None or step < newest.step:
            raise ConfigError(
                f"resume: '{path}' is not the newest checkpoint of the run in '{folder}', whose later work would be "
                "overwritten. Choose one:\n"
                + (f"  --resume auto          go on from '{newest.path}', step {newest.step}\n" if newest else "")
                + "  another --trainer.default_root_dir, to go on from here beside it"
            )
        return path

    def _places(self) -> tuple[Path, list[Path], list[Path]]:
        """The run's folder; what the config puts elsewhere; where to look for checkpoints."""
        folder = Path(self.trainer.default_root_dir)
        kept = [Path(callback.dirpath) for callback in self._callbacks(ModelCheckpoint) if callback.dirpath]
        released = [callback.directory for callback in self._callbacks(HFCheckpoint) if callback.directory]
        root = folder.resolve()
        history = [logger.path for logger in self.trainer.loggers if isinstance(logger, JSONLHistory)]
        elsewhere = [place for place in [*kept, *released, *history] if not place.resolve().is_relative_to(root)]
        logged = [Path(logger.save_dir) / str(logger.name) for logger in self.trainer.loggers if logger.save_dir]
        found = (place for one in (folder, *logged) for place in (one / "checkpoints", *one.glob("*/checkpoints")))
        return folder, [] if self.config[self.subcommand].trainer.fast_dev_run else elsewhere, [folder, *kept, *found]

    def _exit_if_finished(self, folder: Path, newest: Checkpoint | None, is_first: bool) -> None:
        """``SystemExit`` with code 0 if nothing is left to do; ``ConfigError`` if the config asks for another run."""
        if not (folder / FINISHED).is_file():
            return
        steps = json.loads((folder / FINISHED).read_text())["steps"]
        (config,) = self._callbacks(RunConfig)
        changed = changed_settings(folder, config.text())
        others = [key for key in changed if key.split(".")[-1] not in LIMITS]
        if others:
            raise ConfigError(
                f"trainer.default_root_dir: the run in '{folder}' finished with other settings ({', '.join(others[:3])}"
                f"{', ...' if len(others) > 3 else ''}). Choose one:\n"
                "  --overwrite true       move it aside, and train with these\n"
                "  another --trainer.default_root_dir"
            )
        if not changed or 0 <= self.trainer.max_steps <= steps:
            if is_first:
                _say(f"the run in '{folder}' finished after {steps} steps: nothing to do")
            raise SystemExit(0)
        if newest is None:
            raise CheckpointError(f"resume: the run in '{folder}' finished, and kept no checkpoint to go on from")
        if is_first:
            (folder / FINISHED).unlink()

    def _callbacks(self, kind: type[Any]) -> list[Any]:
        return [callback for callback in self.trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]

    def _check(self, command: str) -> None:
        settings = self.config_init[command]
        path, only = settings.get("resume") or self._given_ckpt_path, bool(settings.get("weights_only", True))
        key = "resume" if settings.get("resume") else "ckpt_path"
        check_run(self.trainer, self.model, self.datamodule, command, path, only, key)

    def before_validate(self) -> None:
        end_in_order()
        self._check("validate")

    def before_predict(self) -> None:
        end_in_order()
        self._check("predict")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With checkpoints that survive a crash, where the config does not choose how they are written."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(refused_setting(self.config[self.subcommand].trainer, error)) from error
        for logger in self._continued:  # made now; the config stays as it was given
            logger.version = None
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = DurableCheckpointIO()
        first = RunLoggers(self.config[self.subcommand].trainer.logger), MonitorCheck()
        trainer.callbacks[:0] = first  # type: ignore[attr-defined]
        return trainer


def run_training(arguments: Sequence[str]) -> int:
    """Run one of Lightning's commands; 0, or 143 after a SIGTERM and 130 after Ctrl-C, when callbacks have saved.

    Raises:
        ConfigError: also in place of Lightning's own complaints about a configuration.
    """
    for plugin in entry_points(group=PLUGIN_GROUP):
        plugin.load()
    for handler in logging.getLogger("lightning").handlers + logging.getLogger("lightning.pytorch").handlers:
        handler.addFilter(lambda record: not record.getMessage().startswith(ROUTINE))
    warnings.filterwarnings("ignore", r"Total length of .* across ranks is zero")  # no validation data: as configured
    warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated")
    warnings.filterwarnings("ignore", r"Using ModelCheckpoint with manual optimization")  # it is for GANs
    warnings.filterwarnings("ignore", r"You're using the WeightAveraging callback with a model that overrides")
    sys.argv = [sys.argv[0], *arguments]  # Lightning warns when it is given both
    saver = SaveOnTermination(shlex.join(["python", "-m", "north_lightning", *_without_beginning(arguments)]))
    try:
        NorthCLI(
            LightningModule if arguments[0] == "predict" else NorthModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            save_config_callback=RunConfig,
            parser_class=TrainingParser,
            parser_kwargs=_parser_kwargs(),
            trainer_defaults={"callbacks": [RandomState(), saver, RunLock(), OwedValidation()]},
        )
    except SystemExit as ended:  # SIGTERMException is one; Lightning makes one of a KeyboardInterrupt
        received = ended.signal if isinstance(ended, Ended) else saver.received
        if received == signal.SIGUSR1 and arguments[0] == "fit" and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            requeue_slurm_job()
        if saver.received is None and not isinstance(ended, SIGTERMException):
            raise
        return exit_code(saver.received or signal.SIGTERM)
    except Exception as error:
        if (line := complaint(error)) is not None:
            raise ConfigError(line) from error
        raise
    return 0


def _without_beginning(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command that goes on: without those that say how it begins."""
    beginnings = ("--resume", "--overwrite", "--ckpt_path")
    left: list[str] = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        if word.partition("=")[0] not in beginnings and before not in beginnings:
            left.append(word)
    return left


def _say(text: str) -> None:
    print(f"resume: {text}", file=sys.stderr, flush=True)


def _parser_kwargs() -> dict[str, Any]:
    prog = "python -m north_lightning"
    return {"prog": prog, **{name: {"prog": f"{prog} {name}"} for name in NorthCLI.subcommands()}}
