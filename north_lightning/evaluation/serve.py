"""One sidecar that serves several checkpoints of one shape in turn: the first is loaded, the others are pushed.

In: checkpoint directories and a way to make a sidecar. Out: a runner to attempt tasks with, and ``serve`` to switch
weights. A server's start takes half a minute, a push a fraction of a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from north_lightning.chat import NorthTokenizer
from north_lightning.errors import CheckpointError, ConfigError, TokenizerError
from north_lightning.rollout.runner import RolloutRunner
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.sampling import SharedMemoryTransport, Sidecar
from north_lightning.types import Task

SHAPE_KEYS = ("hidden_size", "num_hidden_layers", "num_experts", "vocab_size", "head_dim")

SidecarFactory = Callable[[Path, Path], Sidecar]
"""(checkpoint directory, log file) -> a sidecar that is not started yet."""


@dataclass
class CheckpointServer:
    """A running sidecar; ``serve`` switches its weights, ``runner`` attempts tasks with them."""

    runner: RolloutRunner
    _transport: SharedMemoryTransport
    _serving: Path
    _version: int = 0

    def serve(self, checkpoint: Path) -> None:
        """Make ``checkpoint`` the served weights; nothing to do if it is."""
        if checkpoint == self._serving:
            return
        from safetensors.torch import load_file

        self._version += 1
        tensors = {name: value for shard in _shards(checkpoint) for name, value in load_file(shard).items()}
        self._transport.push(tensors.items(), self._version)
        self._serving = checkpoint


def check_serving(
    checkpoints: Sequence[Path], tasks: Sequence[Task], settings: RolloutSettings, sidecar: SidecarFactory, folder: Path
) -> None:
    """Refuse what cannot be served or attempted; nothing is started or written.

    Raises:
        NorthError: one that names the key and the remedy.
    """
    _check_same_shape(checkpoints)
    tokenizer = NorthTokenizer.load(checkpoints[0])
    for other in checkpoints[1:]:
        if NorthTokenizer.load(other).fingerprint != tokenizer.fingerprint:
            raise TokenizerError(f"{other}: its tokenizer.json differs from that of {checkpoints[0]}")
    server = sidecar(checkpoints[0], folder / "vllm.log")
    server.check()
    settings.check_server(server.max_model_len)
    settings.prepare(tasks)
    settings.fitting(tasks, checkpoints[0], "attempts at these tasks end at once and count as failed")


@contextmanager
def checkpoint_server(
    checkpoints: list[Path], settings: RolloutSettings, sidecar: SidecarFactory, log: Path
) -> Iterator[CheckpointServer]:
    """Start a sidecar on the first of ``checkpoints``; they must share shape and tokenizer."""
    check_serving(checkpoints, [], settings, sidecar, log.parent)
    with sidecar(checkpoints[0], log) as server:
        # A push takes no longer than the start, which reads the weights too.
        transport = SharedMemoryTransport(server.url, server.start_timeout_s)
        try:
            yield CheckpointServer(settings.make_runner(checkpoints[0], server.url), transport, checkpoints[0])
        finally:
            transport.close()


def _shards(checkpoint: Path) -> list[Path]:
    shards = sorted(checkpoint.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{checkpoint}: expected a checkpoint directory with *.safetensors")
    return shards


def _check_same_shape(checkpoints: Sequence[Path]) -> None:
    if not checkpoints:
        raise ConfigError("checkpoints: expected at least one")
    shapes = []
    for checkpoint in checkpoints:
        _shards(checkpoint)
        config = json.loads((checkpoint / "config.json").read_text())
        shapes.append({key: config.get(key) for key in SHAPE_KEYS})
        if shapes[-1] != shapes[0]:
            raise CheckpointError(
                f"{checkpoint}: its shape {shapes[-1]} differs from that of {checkpoints[0]}, {shapes[0]}; "
                "evaluate checkpoints of different shapes in separate runs"
            )
