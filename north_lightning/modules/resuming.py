"""What a resumed run may change: the settings that a checkpoint was trained with, compared with those of now.

In: facts about the model and its optimizer, and the config of ``fit``. Out: plain dictionaries that lie in every
training checkpoint, and a ``ConfigError`` for a change that a resume cannot honor. Not here: whether the data is the
same (``data.loader`` and the queue say that).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from north_lightning.errors import CheckpointError, ConfigError

KEY, FORMAT = "north_lightning", 1
"""Where in a training checkpoint the settings lie, and the version of its layout."""

SETTLED = (
    "seed_everything",
    "model.class_path",
    "model.loss_mean",
    "model.loss.class_path",
    "model.freeze_router",
    "model.facts.*",
    "data.class_path",
    "data.seed",
    "data.sources.*",
    "data.row_tokens",
    "data.reasoning",
    "data.filters*",
    "data.order",
    "data.buffer_samples",
    "data.queue.*",
    "data.groups_per_batch",
    "trainer.callbacks.RolloutProducerCallback.group_size",
)
"""What the checkpoint's state was made with: another value is refused."""

FREE = (
    "config*",
    "ckpt_path",
    "resume",
    "overwrite",
    "weights_only",
    "num_threads",
    "return_predictions",
    "model.checkpoint",  # full weights are the checkpoint's; below adapters, the base's own fingerprint is compared
    "model.config",
    "model.tokenizer",
    "model.optimizer*",  # compared as facts, defaults included; and so the schedule and the adapters
    "model.lr_scheduler*",
    "model.lora*",
    "model.adapter",
    "data.tokenizer",
    "data.sources.*.files",  # their samples are compared
    "data.num_workers",
    "data.cache_dir",
    "trainer.default_root_dir",
    "trainer.logger*",
    "trainer.enable_*",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "trainer.strategy.*",
    "trainer.callbacks.ProgressLine.*",
    "*.dirpath",
)
"""What may change without a word: places, devices, and what is compared elsewhere. All other keys take effect from the
config, which is said."""

Settings = Mapping[str, Any]


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config of ``fit`` as ``trainer.callbacks.HFCheckpoint.every_n_steps`` and the like, with plain values.

    Entries of a list of classes go by the classes' names, so that their order does not matter.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            below = path if key in ("init_args", "dict_kwargs") else f"{path}.{key}".removeprefix(".")
            yield from flatten(inner, below)
    elif isinstance(value, list) and any(isinstance(entry, Mapping) and "class_path" in entry for entry in value):
        for entry in value:
            name = entry["class_path"].rpartition(".")[2] if isinstance(entry, Mapping) else str(entry)
            yield from flatten(entry, f"{path}.{name}")
    else:
        kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), str)
        yield path, None if value is None else kind(value)  # jsonargparse has kinds of int that are not plain


def describe_part(part: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The class of an optimizer or a schedule, and those of its settings that are numbers."""
    plain = {
        key: [*value] if isinstance(value, tuple) else value
        for key, value in state.items()
        if not key.startswith("_")
        and key not in ("last_epoch", "fused", "foreach", "capturable", "differentiable")
        and isinstance(value, bool | int | float | str | tuple | list | None)
    }
    return {"class_path": f"{type(part).__module__}.{type(part).__qualname__}", **plain}


def read_settings(checkpoint: Any, path: object = "the checkpoint") -> Settings:
    """The settings in a training checkpoint.

    Raises:
        CheckpointError: it is not one of this package, or has another format.
    """
    record = checkpoint.get(KEY) if isinstance(checkpoint, Mapping) else None
    record = record if isinstance(record, Mapping) else {}
    found = record.get("format")
    if found != FORMAT:
        raise CheckpointError(
            f"'{path}': expected a training checkpoint of format {FORMAT}, got "
            + ("one without a format: another program or an earlier version wrote it" if found is None else f"{found}")
            + "; resume with the version that wrote it, or start from weights (model.checkpoint)"
        )
    settings: Settings = record["settings"]
    return settings


def refuse_changes(then: Settings, now: Settings, trains: bool = True) -> list[str]:
    """What takes effect from the config of now although the checkpoint's was another: ``key then -> now``.

    Args:
        then: of the checkpoint.
        now: of this run.
        trains: whether training goes on; else what the weights need is compared, and nothing more.

    Raises:
        ConfigError: a setting that is built into the checkpoint's state has changed.
    """
    changed = [key for key in sorted({*then, *now}) if not _same(then.get(key), now.get(key))]
    changed = [key for key in changed if not any(fnmatchcase(key, pattern) for pattern in FREE)]
    if not trains:
        needed = ("model.facts.config.*", "model.facts.tokenizer", "model.facts.lora.*")
        changed = [key for key in changed if any(fnmatchcase(key, pattern) for pattern in needed)]
    both = [key for key in changed if key in then and key in now]
    settled = [key for key in both if any(fnmatchcase(key, pattern) for pattern in SETTLED)]
    if settled:
        lines = [
            f"{key.replace('.facts', '')}: the checkpoint has {then[key]}, the config {now[key]}" for key in settled
        ]
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise ConfigError(
            f"cannot resume with other settings: {'; '.join(lines[:3])}{more}. Restore them, or begin a new run "
            "from the checkpoint's weights: python -m north_lightning export, then model.checkpoint"
        )
    return [f"{key} {then.get(key, 'none')} -> {now.get(key, 'none')}" for key in changed]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, float | int) and isinstance(right, float | int):
        return math.isclose(left, right, rel_tol=1e-12)
    return bool(left == right)
