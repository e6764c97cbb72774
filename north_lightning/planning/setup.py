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

from north_lightning.errors import ConfigError
from north_lightning.model.config import NorthConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

MOMENT_BYTES: Mapping[str, float | None] = {
    "AdamW": None,  # two moments in the parameter's dtype
    "_AdamW": None,  # torchao's, which rounds bfloat16 weights stochastically
    "Adam": None,
    "SGD": 0.0,
    "AdamWBF16Moments": 4.0,
    "AdamW8bit": 2.06,  # two bytes, and a float32 scale for every 256 entries of each moment (torchao)
    "AdamWFp8": 2.06,
    "AdamW4bit": 1.06,
}
"""Bytes of optimizer state per parameter, by the class's name."""


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
    parameter_bytes: int = 4
    compute_bytes: int = 4
    moment_bytes: float = 8.0
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
    fit = yaml.safe_load(path.read_text(encoding="utf-8"))
    model, data, trainer = (_section(fit, name, path) for name in ("model", "data", "trainer"))
    shape = shape or _shape_file(model, path)
    arguments = data.get("init_args", {})
    row_tokens = arguments.get("row_tokens") or arguments.get("max_row_tokens")
    if not row_tokens:
        raise ConfigError(f"{path}: data: expected row_tokens or max_row_tokens, got {sorted(arguments)}")
    init = model.get("init_args", {})
    lora = init.get("lora") or {}
    setup = TrainingSetup(
        config=NorthConfig.load(shape),
        row_tokens=int(row_tokens),
        checkpointing=(init.get("compute") or {}).get("checkpointing", "none"),
        lora_rank=int(lora.get("rank", 16)) if init.get("lora") is not None else 0,
        lora_targets=tuple(lora.get("targets", ("attention", "experts"))),
        on_gpu=trainer.get("accelerator", "auto") != "cpu",
    )
    setup = _with_mesh(setup, trainer, num_gpus, _stored_bytes(init, shape))
    return _with_optimizer(setup, init.get("optimizer") or {}), shape


def _section(fit: Any, name: str, path: Path) -> dict[str, Any]:
    section = fit.get(name) if isinstance(fit, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: expected a config of `fit` with a section '{name}', got none")
    return section


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


def _stored_bytes(init: Mapping[str, Any], shape: Path) -> int:
    """Without a mesh a model is trained in its checkpoint's dtype; random weights are float32."""
    if init.get("config"):
        return 4
    stored = yaml.safe_load(shape.read_text(encoding="utf-8"))
    return BYTES[stored.get("dtype") or stored.get("torch_dtype") or "float32"]


def _with_mesh(
    setup: TrainingSetup, trainer: Mapping[str, Any], num_gpus: int | None, stored_bytes: int
) -> TrainingSetup:
    strategy = trainer.get("strategy")
    if not isinstance(strategy, dict):  # one process, or copies that see nothing of each other
        copies = num_gpus or _configured_processes(trainer) or 1
        return replace(setup, replicate=copies, parameter_bytes=stored_bytes, compute_bytes=stored_bytes)
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
    setup = replace(
        setup,
        sharded=True,
        shard=shard,
        parameter_bytes=BYTES[parameter_dtype],
        compute_bytes=BYTES[given.get("compute_dtype") or parameter_dtype],
        **sizes,
    )
    if num_gpus is not None and setup.num_processes != num_gpus:
        raise ConfigError(
            f"gpus: expected replicate x shard x context x tensor = {setup.num_processes} of the config, got {num_gpus}"
        )
    return setup


def _configured_processes(trainer: Mapping[str, Any]) -> int | None:
    devices = trainer.get("devices", 1 if trainer.get("accelerator") == "cpu" else None)
    count = len(devices) if isinstance(devices, list) else devices
    return count * int(trainer.get("num_nodes", 1)) if isinstance(count, int) and count > 0 else None


def _with_optimizer(setup: TrainingSetup, optimizer: Mapping[str, Any]) -> TrainingSetup:
    name = str(optimizer.get("class_path", "AdamW")).rpartition(".")[2]
    if name not in MOMENT_BYTES:
        raise ConfigError(f"optimizer: expected one whose memory is known ({', '.join(MOMENT_BYTES)}), got {name}")
    moment_bytes = MOMENT_BYTES[name]
    # Adapters are float32 whatever the weights are.
    trained_bytes = 4 if setup.lora_rank else setup.parameter_bytes
    moments = 2.0 * trained_bytes if moment_bytes is None else moment_bytes
    return replace(setup, moment_bytes=moments, optimizer=name)
