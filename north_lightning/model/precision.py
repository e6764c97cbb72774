"""In which dtypes a run keeps its weights, gradients and moments, and in which one it computes.

In: ``trainer.precision``, the dtype of the base checkpoint, the optimizer's class. Out: a ``Precision``, which training
follows and ``estimate`` counts with. No torch. Not here: ``NorthStrategy``'s two dtypes, which say it themselves.

The weights that an optimizer works on are float32 unless the config says otherwise, also where the base checkpoint is
stored in bfloat16. An update smaller than 1/512 of a bfloat16 weight is rounded away, and usual learning rates make
nearly only such updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from north_lightning.errors import ConfigError

BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

MOMENTS: Mapping[str, str | None] = {
    "AdamW": None,  # two moments in the weights' dtype
    "_AdamW": None,  # torchao's, which can round bfloat16 weights stochastically
    "Adam": None,
    "SGD": "none",
    "AdamWBF16Moments": "bfloat16",
    "AdamW8bit": "8-bit",
    "AdamWFp8": "8-bit",
    "AdamW4bit": "4-bit",
}
"""What an optimizer's moments are stored in, by the name of its class."""

MOMENT_BYTES: Mapping[str, float] = {"none": 0.0, "float32": 8.0, "bfloat16": 4.0, "8-bit": 2.06, "4-bit": 1.06}
"""Bytes of both moments of a weight. (8-bit: two bytes, and a float32 scale for every 256 entries of each moment.)"""

_ALIASES = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
PRECISIONS = {
    "32-true": ("float32", "float32"),
    "bf16-mixed": ("float32", "bfloat16"),
    "bf16-true": ("bfloat16", "bfloat16"),
}
"""Those that a run trains in, by Lightning's name: the dtypes of weights and of matrix products."""


@dataclass(frozen=True)
class Precision:
    """Names of dtypes: of the trained weights and their gradients; of matrix products; of the frozen weights below
    adapters, where there are adapters."""

    weights: str = "float32"
    compute: str = "float32"
    base: str | None = None

    def moments(self, optimizer: str) -> str | None:
        """What the class ``optimizer`` stores its moments in; None for a class that is not known."""
        return (MOMENTS[optimizer] or self.weights) if optimizer in MOMENTS else None

    def describe(self, optimizer: str) -> str:
        """One line for people."""
        moments, stored = self.moments(optimizer), 2 * BYTES[self.weights]
        known = "" if moments is None else f"; {stored + MOMENT_BYTES[moments]:.0f} bytes per trained parameter"
        below = "" if self.base is None else f", adapters on frozen {self.base} weights"
        return (
            f"weights {self.weights}, gradients {self.weights}, moments {moments or f'as {optimizer} keeps them'}, "
            f"compute {self.compute}{known}{below}"
        )


def canonical(trainer_precision: object) -> str:
    """Lightning's full name of a precision: ``32-true`` for 32, ``bf16-mixed`` for bf16."""
    return _ALIASES.get(str(trainer_precision), str(trainer_precision))


def choose_precision(trainer_precision: object, stored: str | None, has_adapters: bool) -> Precision:
    """What ``trainer.precision`` means.

    Args:
        trainer_precision: as Lightning takes it.
        stored: the base checkpoint's dtype; None for random weights.
        has_adapters: whether the base is frozen. It then stays bfloat16 if it is stored so; adapters are float32.

    Raises:
        ConfigError: a precision that this package does not train in.
    """
    name = canonical(trainer_precision)
    if name not in PRECISIONS:
        raise ConfigError(
            f"trainer.precision: expected one of {', '.join(PRECISIONS)}, got {name}; bf16-mixed keeps float32 weights "
            "and computes in bfloat16, with no loss scale"
        )
    weights, compute = PRECISIONS[name]
    if not has_adapters:
        return Precision(weights, compute)
    base = "bfloat16" if "bfloat16" in (stored, weights) else "float32"
    return Precision(weights, "bfloat16" if base == "bfloat16" else compute, base)
