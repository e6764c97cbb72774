"""The command line: which command runs what, and how errors reach a person.

In: ``sys.argv``. Out: an exit code (0; 1 for an error we raise on purpose, in one line; 2 for a mistake in the
arguments or the config; 130 after Ctrl-C, 143 after SIGTERM and SLURM's SIGUSR1, see ``signals``). Not here: what the
commands do.

``fit``, ``validate`` and ``predict`` are Lightning's and live in ``lightning_cli``, slow to import.
Every other command is a row of ``UTILITIES``: a function whose parameters are the command's arguments (``--help``, and
``--config FILE.yaml`` for all of them at once). It is imported when it runs, and so without Lightning or torch if it
needs neither.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import inspect
import itertools
import os
import re
import shlex
import sys
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from north_lightning.errors import ConfigError, NorthError
from north_lightning.signals import Ended, as_before, end_in_order

TRAINING = {
    "fit": "train: an SFT stage or asynchronous RL",
    "validate": "the validation loss of a checkpoint",
    "predict": "sample trajectories of a served model, and keep what a verifier passes",
}

UTILITIES: dict[str, tuple[str, str]] = {  # name, of one word or two: (module:function, one line)
    "tasks": ("north_lightning.tasks.build:build_task_sets", "generate the quickstart's task sets"),
    "tasks check": (
        "north_lightning.tasks.check:check_tasks",
        "DIR...: which directories are Harbor tasks, or why not",
    ),
    "tasks build": (
        "north_lightning.factory.build:build_tasks",
        "verified software tasks from PyPI releases and git repositories",
    ),
    "tasks import": (
        "north_lightning.tasks.swe_rows:import_rows",
        "rows of SWE-bench, SWE-bench Pro, SWE-smith or R2E-Gym as tasks",
    ),
    "tasks live_code_bench": (
        "north_lightning.tasks.live_code_bench:import_live_code_bench",
        "rows of LiveCodeBench as tasks, of a range of contest dates",
    ),
    "tasks scicode": ("north_lightning.tasks.scicode:import_scicode", "problems of SciCode as tasks"),
    "plugins check": (
        "north_lightning.conformance.command:check_plugins",
        "FILE...: does a reward, loss or queue keep its interface's promises",
    ),
    "trajectories": (
        "north_lightning.rollout.trajectories:record_trajectories",
        "record verified SFT data in the sandbox",
    ),
    "data report": ("north_lightning.views.data_report:report_data", "one page about the SFT mix of a training config"),
    "data preview": ("north_lightning.views.data_preview:preview_data", "a packed row in the terminal, in colours"),
    "tokenizer": ("north_lightning.data.tokenizer:train_tokenizer_command", "train a small model's tokenizer"),
    "data filter": ("north_lightning.data.prepare:filter_data", "raw trajectories to samples fit for SFT"),
    "data blocklist": ("north_lightning.data.block_lists:write_block_list", "a benchmark's list for decontamination"),
    "export": (
        "north_lightning.export.command:export_checkpoint",
        "a checkpoint as a release, in bfloat16 or FP8, checked against it",
    ),
    "calibrate": ("north_lightning.evaluation.calibrate:calibrate", "measure pass@k and step budgets before RL"),
    "test": ("north_lightning.evaluation.command:evaluate", "evaluate checkpoints on held-out tasks"),
    "results": (
        "north_lightning.evaluation.interchange:write_results",
        "an evaluation for Inspect, Harbor, SWE-bench and the Hugging Face hub",
    ),
    "compare": (
        "north_lightning.views.comparison:compare_runs",
        "RUN RUN ...: which of several evaluations is better, and what cannot be told",
    ),
    "human-eval prepare": (
        "north_lightning.human_evaluation.prepare:prepare_study",
        "NAME=FOLDER NAME=FOLDER: a blind comparison of attempts, for people to rate",
    ),
    "human-eval serve": ("north_lightning.human_evaluation.serve:serve_study", "the rating app of such a study"),
    "human-eval report": (
        "north_lightning.human_evaluation.report:write_study_report",
        "win rates, agreement and biases of a study",
    ),
    "human-eval export": (
        "north_lightning.human_evaluation.exchange:export_ratings",
        "a study for Label Studio, its ratings as tables",
    ),
    "human-eval import": (
        "north_lightning.human_evaluation.exchange:import_ratings",
        "ratings from Label Studio into a study",
    ),
    "report": ("north_lightning.views.report:write_report", "numbers and curves of a finished run"),
    "figures": ("north_lightning.views.figures:write_figures", "pictures of a run: benchmarks, training, preferences"),
    "card": ("north_lightning.views.card:write_card", "a release's model card, from the files of its run"),
    "estimate": ("north_lightning.planning.command:estimate", "memory and speed of a training config, in advance"),
    "doctor": ("north_lightning.doctor:doctor", "check that this machine can run everything"),
    "recipe": ("north_lightning.recipe:run_recipe", "run a list of these commands, one after another"),
}

POSITIONAL = {"tasks check": "directories", "plugins check": "files", "compare": "sides", "human-eval prepare": "sides"}
"""Commands whose leading words are paths, and the parameter they are for."""

TAKES_TRAINING_CONFIG = ("data report", "data preview")
"""Commands about the ``data`` of a config of ``fit``."""

OTHER_SECTIONS = ("seed_everything", "num_threads", "resume", "overwrite", "trainer", "model")
"""Sections of a ``fit`` config that are not data. The seed decides the order of the data."""

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPT = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. ``NORTH_DEBUG=1`` shows the traceback of our own errors too."""
    command, arguments = split_command(list(sys.argv[1:] if arguments is None else arguments))
    with as_before():
        return _run(command, arguments)


def _run(command: str, arguments: list[str]) -> int:
    try:
        if command in ("-h", "--help"):
            print(overview())
        elif command in UTILITIES or command in TRAINING:
            add_plugins_to_path()
            from north_lightning.parser import ExplainingParser

            ExplainingParser.commands = UTILITIES
            if command in UTILITIES:
                run_utility(command, arguments)
                return 0
            from north_lightning.lightning_cli import run_training

            return run_training([command, *arguments])
        else:
            raise UnknownCommandError(command)
    except Exception as error:
        line = one_line(error)
        if line is None or os.environ.get("NORTH_DEBUG"):
            raise
        print(f"error: {located(line)}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, UnknownCommandError) else EXIT_ERROR
    except Ended as ended:
        print(f"ended by {ended.signal.name}", file=sys.stderr)
        return ended.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPT
    return 0


def split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The command, of one word or two, and what follows it."""
    for num_words in (2, 1):
        command = " ".join(arguments[:num_words])
        if command in (*UTILITIES, *TRAINING):
            return command, arguments[num_words:]
    return (arguments or ["--help"])[0], arguments[1:]


def one_line(error: BaseException | None) -> str | None:
    """What ``error`` says if it, or what it was raised from, is ours or the system's about a file; else None.

    jsonargparse wraps what a constructor raises; a ValueError is a constructor's word on a value in the config.
    """
    is_made = error is not None and any(
        str(frame.f_globals.get("__name__")).startswith("jsonargparse.")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    while error is not None:
        if isinstance(error, NorthError):
            return str(error)
        if isinstance(error, OSError) and error.filename is not None:
            return f"{error.filename}: {error.strerror}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            return f"a file could not be written: {error.strerror}"
        if is_made and type(error) is ValueError and error.__cause__ is None:
            return " ".join(str(error).split())
        error = error.__cause__
    return None


def located(line: str) -> str:
    """``line`` with the file and line of the key that it begins with, if a config sets that."""
    from north_lightning.config_files import place_of

    key = re.match(r"([a-z][\w.]*): ", line)
    place = place_of(key[1]) if key else None
    return f"{place}: {line}" if place else line


def overview() -> str:
    rows = [*TRAINING.items(), *((name, line) for name, (_, line) in UTILITIES.items())]
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        [
            "usage: python -m north_lightning COMMAND [--config FILE.yaml] [--key value ...]",
            "",
            *(f"  {name:<{width}}  {line}" for name, line in rows),
            "",
            "COMMAND --help shows every key; `fit --print_config` prints the complete config and runs nothing.",
            "Exit codes: 0; 1 error; 2 mistake in arguments or config; 130 Ctrl-C; 143 SIGTERM or SLURM's SIGUSR1.",
        ]
    )


class UnknownCommandError(ConfigError):
    def __init__(self, command: str) -> None:
        from difflib import get_close_matches

        known = [*TRAINING, *UTILITIES]
        close = get_close_matches(command, known, 1)
        suggestion = f" Did you mean '{close[0]}'?" if close else ""
        super().__init__(f"unknown command '{command}'.{suggestion} Commands: {', '.join(known)}.")


def run_utility(command: str, arguments: Sequence[str]) -> None:
    """Parse ``arguments`` against the signature of the command's function and call it."""
    from jsonargparse import ActionConfigFile

    from north_lightning.parser import NorthParser, check_values
    from north_lightning.run_folders import check_writable
    from north_lightning.seeds import set_run_seed

    location, description = UTILITIES[command]
    paths, arguments = _leading_paths(arguments) if command in POSITIONAL else ([], arguments)
    module_name, function_name = location.split(":")
    function = getattr(importlib.import_module(module_name), function_name)
    parser = NorthParser(prog=f"python -m north_lightning {command}", description=description)
    reads_config_itself = "config" in inspect.signature(function).parameters
    if not reads_config_itself:
        parser.add_argument("--config", action=ActionConfigFile, help="YAML file of arguments.")
    parser.add_function_arguments(function, as_group=False, as_positional=False, sub_configs=True)
    if command in TAKES_TRAINING_CONFIG:
        for section in OTHER_SECTIONS:
            parser.add_argument(f"--{section}", type=Any, help=argparse.SUPPRESS)
    if paths:  # jsonargparse copies a list for each of its items: thousands would take minutes
        parser.set_defaults({POSITIONAL[command]: []})
    settings = parser.parse_args([_underscored(argument) for argument in arguments])
    hints = typing.get_type_hints(function, include_extras=True)
    for name, value in settings.items(branches=True, nested=False):
        check_values(value, hints.get(name), name)
    seed = settings.get("seed", settings.get("seed_everything"))
    if type(seed) is int:
        set_run_seed(seed)  # before parts are made: theirs derive from it
    values = parser.instantiate(settings)
    if command == "recipe":
        _check_stages(values["stages"])
    given = {name: value for name, value in values.items() if name in inspect.signature(function).parameters}
    if isinstance(folder := given.get("output_dir"), Path):
        check_writable(folder, "output_dir")
    end_in_order()
    from north_lightning.sandbox.scratch import delete_stale_scratch

    delete_stale_scratch()
    function(**given | ({POSITIONAL[command]: paths} if paths else {}))


def _check_stages(stages: Sequence[Any]) -> None:
    """Refuse a stage that would fail at once when its turn comes, before the first one runs."""
    if not stages:
        raise ConfigError("stages: expected at least one, got none")
    for stage in stages:
        try:
            words = shlex.split(stage.command)
        except ValueError as error:
            raise ConfigError(f"stages.command: stage {stage.name!r}: {error}: check the quotes") from error
        name, _ = split_command(words)
        if name not in (*UTILITIES, *TRAINING) and not name.startswith("-"):
            raise UnknownCommandError(name)
        for option, file in itertools.pairwise(words):
            if option == "--config" and not Path(file).is_file():
                raise ConfigError(f"stages.command: stage {stage.name!r}: expected a file, '{file}' does not exist")


def _underscored(argument: str) -> str:
    """``--gpu-memory=80`` as ``--gpu_memory=80``: the commands' arguments are parameters of functions."""
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else argument


def _leading_paths(arguments: Sequence[str]) -> tuple[list[Path], Sequence[str]]:
    """``DIR DIR --key value`` in two."""
    num_words = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return [Path(word) for word in arguments[:num_words]], arguments[num_words:]


def add_plugins_to_path() -> None:
    """Make plug-ins importable: ``$NORTH_PLUGINS`` (folders, separated as in ``$PATH``), else ``./plugins``.

    Installed packages join through the entry-point group ``north_lightning.plugins``; importing them is enough.
    """
    wanted = os.environ.get("NORTH_PLUGINS")
    folders = [Path(folder) for folder in wanted.split(os.pathsep)] if wanted else [Path("plugins")]
    for folder in folders:
        if folder.is_dir():
            sys.path.append(str(folder.resolve()))
        elif wanted:
            raise ConfigError(f"NORTH_PLUGINS: expected folders, got '{folder}', which is not one")
