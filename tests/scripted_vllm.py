"""A sidecar without vLLM whose model plays a script, or gives up at once, by the seed it is asked with."""

from collections.abc import Mapping
from typing import Any

from north_lightning.faults import FakeSidecar, FakeVLLM

_script: list[list[int]] = []


def play(turns: list[list[int]]) -> None:
    """What is said, turn by turn; the last turn is what an attempt that gives up says at once."""
    _script[:] = turns


def reply(request: Mapping[str, Any]) -> list[int]:
    """The turn after as many as the prompt shows: each is followed by its stop token and its result's."""
    prompt = request["token_ids"]
    said = [turn for turn in _script[:-1] if _holds(prompt, turn)]
    gives_up = not said and request["sampling_params"]["seed"] % 2
    return _script[-1] if gives_up else _script[len(said)]


def _holds(prompt: list[int], turn: list[int]) -> bool:
    return any(prompt[i : i + len(turn)] == turn for i in range(len(prompt)))


class ScriptedSidecar(FakeSidecar):
    def make_server(self, port: int) -> FakeVLLM:
        return FakeVLLM(reply, port=port)
