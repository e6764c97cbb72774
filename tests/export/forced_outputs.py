"""A logits processor for vLLM that forces what the model says: everything else of the server is real.

``FORCED_OUTPUTS`` names a JSON file, read for each request: ``other``, ids; ``turns``, lists of ids; ``tool``, a text;
``turn``, an id. A prompt whose text holds ``tool`` gets the turn after as many as it shows (tokens ``turn``, less the
one being opened); any other prompt (a title, a summary) gets ``other``. Without turns nothing is forced.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality


class ForcedOutputs(LogitsProcessor):
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._tokenizer = Tokenizer.from_file(f"{vllm_config.model_config.model}/tokenizer.json")
        self._rows: dict[int, tuple[list[int], list[int]]] = {}  # what is to be said, and what has been

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, _, prompt, said in batch_update.added:
            self._rows.pop(index, None)
            if reply := self._reply(prompt or []):
                self._rows[index] = reply, said
        for left, right, direction in batch_update.moved:
            moved, other = self._rows.pop(left, None), self._rows.pop(right, None)
            if moved is not None:
                self._rows[right] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self._rows[left] = other

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for index, (reply, said) in self._rows.items():
            wanted = reply[min(len(said), len(reply) - 1)]
            logits[index] = -torch.inf
            logits[index, wanted] = 0.0
        return logits

    def _reply(self, prompt: list[int]) -> list[int]:
        script = json.loads(Path(os.environ["FORCED_OUTPUTS"]).read_text())
        if not script["turns"]:
            return []
        if script["tool"] not in self._tokenizer.decode(prompt, skip_special_tokens=False):
            return list(script["other"])
        turns = script["turns"]
        return list(turns[min(prompt.count(script["turn"]) - 1, len(turns) - 1)])
