"""Configs that work, small; a way to edit them; and a way to run a command up to where it would start something."""

import contextlib
import copy
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from small_runs import MODEL, sft_config, write_run_inputs

from north_lightning import cli
from north_lightning.model import NorthConfig, NorthModel, save_checkpoint
from north_lightning.sampling.sidecar import Sidecar
from north_lightning.tasks import write_task
from north_lightning.tasks.software import software_task
from north_lightning.tasks.terminal import terminal_task

CALLBACKS = {"sidecar": "SidecarCallback", "sync": "WeightSyncCallback", "producer": "RolloutProducerCallback"}


class StartedError(BaseException):
    """Something was started: the command has accepted its config."""


def write_inputs(folder: Path) -> Path:
    """What ``write_run_inputs`` writes, ``checkpoint/`` of that model, ``tasks/terminal`` and ``tasks/swe``."""
    write_run_inputs(folder)
    config = NorthConfig.from_hf(json.loads((folder / "model.json").read_text()))
    with torch.random.fork_rng():
        save_checkpoint(NorthModel(config), folder / "checkpoint", tokenizer_dir=folder / "tokenizer")
    for index in range(2):
        write_task(terminal_task(index, 0, "train"), folder / "tasks" / "terminal")
        write_task(software_task(index, 0, "train"), folder / "tasks" / "swe")
    return folder


def rollouts(**more: Any) -> dict[str, Any]:
    return {
        "harnesses": {
            "terminal": {"class_path": "ReActTerminalHarness", "init_args": {"command_timeout_s": 3}},
            "swe": {"class_path": "SWEAgentHarness", "init_args": {"command_timeout_s": 3}},
        },
        "verifier": {"class_path": "UnitTestVerifier"},
        "sandboxes": {"class_path": "BubblewrapProvider"},
        **more,
    }


def model_rollouts() -> dict[str, Any]:
    return rollouts(max_turn_tokens=64, max_context_tokens=2000)


def sidecar() -> dict[str, Any]:
    return {"class_path": "Sidecar", "init_args": {"max_model_len": 2048, "max_num_seqs": 8}}


def base_config(kind: str, inputs: Path, out: Path) -> dict[str, Any]:
    """A config that ``kind`` (sft, rl, predict, or a utility) accepts; everything it writes is under ``out``."""
    tasks = [str(inputs / "tasks" / "terminal"), str(inputs / "tasks" / "swe")]
    checkpoint = str(inputs / "checkpoint")
    if kind in ("sft", "validate"):
        config = sft_config(inputs, out)
        config["trainer"]["devices"] = 1
        if kind == "validate":
            config["data"]["init_args"]["validation_files"] = [str(inputs / "names.jsonl")]
        return config
    if kind == "rl":
        return rl_config(tasks, checkpoint, out)
    if kind == "predict":
        return {
            "trainer": {"default_root_dir": str(out), "accelerator": "cpu", "devices": 1},
            "model": {
                "class_path": "SynthesisModule",
                "init_args": {
                    "output_dir": str(out),
                    "checkpoint": checkpoint,
                    "sidecar": sidecar(),
                    "rollouts": model_rollouts(),
                },
            },
            "data": {"class_path": "TaskDataModule", "init_args": {"task_sets": tasks}},
        }
    names = str(inputs / "names.jsonl")
    data = sft_config(inputs, out)["data"]
    return {
        "tasks": {
            "output_dir": str(out),
            "sets": [{"name": "a", "environment": "terminal", "split": "train", "count": 2}],
        },
        "trajectories": {"task_sets": tasks, "output_dir": str(out), "rollouts": rollouts()},
        "tokenizer": {"files": [names], "output_dir": str(out), "model_config": str(inputs / "model.json")},
        "calibrate": {
            "checkpoint": checkpoint,
            "task_sets": tasks,
            "output": str(out / "rl.jsonl"),
            "rollouts": model_rollouts(),
            "sidecar": sidecar(),
        },
        "test": {
            "checkpoints": {"a": checkpoint},
            "task_sets": tasks,
            "output_dir": str(out),
            "rollouts": model_rollouts(),
            "sidecar": sidecar(),
        },
        "report": {"run_dir": str(out)},
        "estimate": {"config": str(inputs / "estimate.yaml")},
        "data filter": {"sources": {"names": {"files": [names]}}, "output_dir": str(out)},
        "data report": {"data": data, "output_dir": str(out)},
        "data preview": {"data": data},
        "tasks build": {
            "output_dir": str(out),
            "sandboxes": {"class_path": "BubblewrapProvider"},
            "packages": {"markdown": "3.6"},
        },
        "tasks import": {"rows": [names], "clones": {}, "output_dir": str(out)},
        "recipe": {"run_dir": str(out), "stages": [{"name": "one", "command": "doctor"}]},
    }[kind]


def rl_config(tasks: list[str], checkpoint: str, out: Path) -> dict[str, Any]:
    queue = {"class_path": "WindowedFIFOQueue", "init_args": {"groups_per_batch": 2, "max_batches_ahead": 1}}
    return {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": str(out),
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 4,
            "log_every_n_steps": 1,
            "logger": [{"class_path": "JSONLHistory", "init_args": {"save_dir": str(out)}}],
            "callbacks": [
                {"class_path": "SidecarCallback", "init_args": {"sidecar": sidecar()}},
                {"class_path": "WeightSyncCallback", "init_args": {"every_n_steps": 2}},
                {
                    "class_path": "RolloutProducerCallback",
                    "init_args": {
                        "task_sets": tasks,
                        "rollouts": model_rollouts(),
                        "group_size": 4,
                        "max_concurrent_groups": 2,
                    },
                },
                {"class_path": "HFCheckpoint"},
                {"class_path": "RunSummary"},
            ],
        },
        "model": {
            "class_path": "CISPOModule",
            "init_args": {
                "checkpoint": checkpoint,
                "loss": {"class_path": "CISPOLoss"},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4}},
                "lr_scheduler": {"class_path": "WarmupSchedule", "init_args": {"warmup_steps": 2}},
            },
        },
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {"queue": queue, "groups_per_batch": 2, "max_row_tokens": 4000, "num_batches": 4},
        },
    }


def edit(config: dict[str, Any], path: str, value: Any) -> None:
    """Set the key at ``path``, such as ``producer.rollouts.max_turn_tokens``; the last key is new, or replaced.

    ``model``, ``data`` and callbacks of RL by their short names are entered at their ``init_args``. ``...`` deletes,
    and a path that ends in ``+`` appends.
    """
    first, *keys = path.split(".")
    place: Any = config
    if first in CALLBACKS and "trainer" in config:
        callbacks = config["trainer"]["callbacks"]
        place = next(one for one in callbacks if one["class_path"] == CALLBACKS[first])["init_args"]
    else:
        keys = [first, *keys]
    while len(keys) > 1:
        place = place[int(keys[0]) if isinstance(place, list) else keys[0]]
        keys = keys[1:]
        if "class_path" in place and keys[0] not in ("class_path", "init_args", "dict_kwargs"):
            place = place["init_args"] if "init_args" in place else place.setdefault("init_args", {})
    (key,) = keys
    if key.endswith("+"):
        place[key[:-1]].append(value)
    elif value is ...:
        del place[int(key) if isinstance(place, list) else key]
    else:
        place[int(key) if isinstance(place, list) else key] = value


@dataclass
class Outcome:
    code: int | None
    """None: the config was accepted."""
    err: str
    written: list[str]


@contextlib.contextmanager
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A trainer or a server that is started ends the command with ``StartedError`` instead."""

    def refuse(kind: type, name: str) -> None:
        @functools.wraps(getattr(kind, name))
        def start(self: object, *args: Any, **kwargs: Any) -> NoReturn:
            raise StartedError(type(self).__name__)

        patched.setattr(kind, name, start)

    with monkeypatch.context() as patched:
        for name in ("fit", "validate", "predict"):
            refuse(Trainer, name)
        refuse(Sidecar, "start")
        yield


def run(
    kind: str, text: str, out: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, arguments: tuple[str, ...] = ()
) -> Outcome:
    """Run the command of ``kind`` on the config ``text``."""
    command = {"sft": "fit", "rl": "fit"}.get(kind, kind).split()
    path = out.parent / "config.yaml"
    path.write_text(text)
    given = ["--config", str(path)]
    if kind == "estimate":  # its config is one of fit
        given = [f"--{key}={value}" for key, value in yaml.safe_load(text).items()]
    monkeypatch.setattr(sys, "argv", ["north_lightning"])
    monkeypatch.chdir(out.parent)
    before = {str(one) for one in out.parent.rglob("*")}
    capfd.readouterr()
    with nothing_starts(monkeypatch):
        try:
            code: int | None = cli.main([*command, *given, *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        except StartedError:
            code = None
    written = sorted({str(one) for one in out.parent.rglob("*")} - before)
    return Outcome(code, capfd.readouterr().err, written)


def as_yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(copy.deepcopy(dict(config)), sort_keys=False)


__all__ = ["MODEL", "StartedError", "as_yaml", "base_config", "edit", "run", "write_inputs"]
