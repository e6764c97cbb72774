"""The facts of a ``fit`` config that decide memory and speed, read without building anything.

In: the YAML as it is written. Out: a ``TrainingSetup``. Not here: whether the config is valid; ``fit`` says that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from north_lightning.config_files import load_yaml
from north_lightning.errors import ConfigError
from north_lightning.model.config import NorthConfig
from north_lightning.model.files import stored_dtype
from north_lightning.model.precision import BYTES, MOMENT_BYTES, MOMENTS, Precision, choose_precision
from north_lightning.untrusted import read_json


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that an estimate depends on.

    Sizes of the mesh are as in ``NorthStrategy``; ``sharded`` says whether there is one at all. ``moment_bytes`` is the
    optimizer's state per trained parameter.
    """

    config: NorthConfig
    row_tokens: int
    sharded: bool = False
    replicate: int = 1
    shard: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1
    parameter_bytes: int = 4  # of the base, where adapters are trained
    compute_bytes: int = 4
    moment_bytes: float = 8.0
    precision: str = ""  # in words
    optimizer: str = "AdamW"
    checkpointing: str = "none"
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    on_gpu: bool = True

    @property
    def num_processes(self) -> int:
        return self.replicate * self.num_parts

    @property
    def num_parts(self) -> int:
        """Processes that one copy of the model is cut over."""
        return self.shard * self.context * self.tensor

    @property
    def tokens_here(self) -> int:
        """Tokens of a row that one process holds between layers."""
        return math.ceil(self.row_tokens / (self.context * self.tensor))


def read_setup(path: Path, num_gpus: int | None = None, shape: Path | None = None) -> tuple[TrainingSetup, Path]:
    """The setup of a config, and the file its model's shape was read from.

    Args:
        path: YAML of ``fit``.
        num_gpus: Processes; default: what the config says. ``shard: auto`` takes what is left of them.
        shape: A ``config.json``. Default: ``model.config``; or ``model.checkpoint``'s, and where that folder is not on
            this machine, the ``model.json`` beside the YAML.

    Raises:
        ConfigError: no such file, or something missing that decides.
    """
    if not path.is_file():
        raise ConfigError(f"config: expected a YAML file, got '{path}'")
    fit = load_yaml(path.read_text(encoding="utf-8"), str(path))
    model, data, trainer = (_section(fit, name, path) for name in ("model", "data", "trainer"))
    shape = shape or _shape_file(model, path)
    arguments = data.get("init_args", {})
    row_tokens = arguments.get("row_tokens") or arguments.get("max_row_tokens") or _longest_rollout(trainer)
    if not row_tokens:
        raise ConfigError(f"{path}: data: expected row_tokens or max_row_tokens, got {sorted(arguments)}")
    init = model.get("init_args", {})
    has_adapters = init.get("lora") is not None or init.get("adapter") is not None
    lora = init.get("lora") or _adapter(init.get("adapter"))
    setup = TrainingSetup(
        config=NorthConfig.load(shape),
        row_tokens=int(row_tokens),
        checkpointing=(init.get("compute") or {}).get("checkpointing", "none"),
        lora_rank=int(lora.get("rank", 16)) if has_adapters else 0,
        lora_targets=tuple(lora.get("targets", ("attention", "experts"))),
        on_gpu=trainer.get("accelerator", "auto") != "cpu",
    )
    setup, precision = _with_mesh(setup, trainer, num_gpus, _stored(init, shape), has_adapters)
    return _with_optimizer(setup, init.get("optimizer") or {}, precision), shape


def _section(fit: Any, name: str, path: Path) -> dict[str, Any]:
    section = fit.get(name) if isinstance(fit, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: expected a config of `fit` with a section '{name}', got none")
    return section


def _longest_rollout(trainer: Mapping[str, Any]) -> int | None:
    """What ``max_row_tokens`` is where it is left out."""
    arguments = [callback.get("init_args") or {} for callback in trainer.get("callbacks") or []]
    found = [(one.get("rollouts") or {}).get("max_context_tokens") for one in arguments]
    return next((length for length in found if length), None)


def _shape_file(model: Mapping[str, Any], path: Path) -> Path:
    init = model.get("init_args", {})
    named = init.get("config") or init.get("checkpoint")
    candidates = [Path(named)] if named else []
    candidates = [folder / "config.json" if folder.is_dir() else folder for folder in candidates]
    candidates.append(path.parent / "model.json")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{path}: the model's shape is in none of {[str(c) for c in candidates]}: give one by --shape")


def _adapter(folder: str | None) -> dict[str, Any]:
    """Rank and targets of adapters that are trained on, if they are on this machine."""
    file = Path(folder or "") / "adapter_config.json"
    if not file.is_file():
        return {}
    stored = read_json(file, ConfigError)
    kinds = (("attention", "target_modules"), ("experts", "target_parameters"))
    return {"rank": stored.get("r", 16), "targets": [target for target, key in kinds if stored.get(key)]}


def _stored(init: Mapping[str, Any], shape: Path) -> str | None:
    """The base checkpoint's dtype: of its weights, or, where these are not on this machine, of its ``config.json``."""
    if init.get("config"):
        return None
    if init.get("checkpoint") and Path(init["checkpoint"]).is_dir():
        return stored_dtype(Path(init["checkpoint"]))
    stored = yaml.safe_load(shape.read_text(encoding="utf-8"))
    return stored.get("dtype") or stored.get("torch_dtype") or "float32"


def _with_mesh(
    setup: TrainingSetup, trainer: Mapping[str, Any], num_gpus: int | None, stored: str | None, has_adapters: bool
) -> tuple[TrainingSetup, Precision]:
    strategy = trainer.get("strategy")
    if not isinstance(strategy, dict):  # one process, or copies that see nothing of each other
        copies = num_gpus or _configured_processes(trainer) or 1
        precision = choose_precision(trainer.get("precision"), stored, has_adapters)
        return _in_bytes(replace(setup, replicate=copies), precision), precision
    given = strategy.get("init_args", {})
    sizes = {name: given.get(name, 1) for name in ("replicate", "context", "expert", "tensor")}
    others = sizes["replicate"] * sizes["context"] * sizes["tensor"]
    shard = given.get("shard", "auto")
    if shard == "auto":
        total = num_gpus or _configured_processes(trainer)
        if total is None:
            raise ConfigError("strategy.shard is auto and trainer.devices says no number: expected --gpus")
        shard = max(1, total // others)
    parameter_dtype = given.get("parameter_dtype", "float32")
    precision = Precision(parameter_dtype, given.get("compute_dtype") or parameter_dtype)
    setup = _in_bytes(replace(setup, sharded=True, shard=shard, **sizes), precision)
    if num_gpus is not None and setup.num_processes != num_gpus:
        raise ConfigError(
            f"gpus: expected replicate x shard x context x tensor = {setup.num_processes} of the config, got {num_gpus}"
        )
    return setup, precision


def _in_bytes(setup: TrainingSetup, precision: Precision) -> TrainingSetup:
    parameter_bytes = BYTES[precision.base or precision.weights]
    return replace(setup, parameter_bytes=parameter_bytes, compute_bytes=BYTES[precision.compute])


def _configured_processes(trainer: Mapping[str, Any]) -> int | None:
    devices = trainer.get("devices", 1 if trainer.get("accelerator") == "cpu" else None)
    count = len(devices) if isinstance(devices, list) else devices
    return count * int(trainer.get("num_nodes", 1)) if isinstance(count, int) and count > 0 else None


def _with_optimizer(setup: TrainingSetup, optimizer: Mapping[str, Any], precision: Precision) -> TrainingSetup:
    name = str(optimizer.get("class_path", "AdamW")).rpartition(".")[2]
    moments = precision.moments(name)
    if moments is None:
        raise ConfigError(f"optimizer: expected one whose memory is known ({', '.join(MOMENTS)}), got {name}")
    return replace(setup, moment_bytes=MOMENT_BYTES[moments], optimizer=name, precision=precision.describe(name))
