"""A sidecar without vLLM: random tokens, with the experts that the sampler would have visited."""

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from north_lightning.faults import FakeSidecar, FakeVLLM
from north_lightning.faults.server import random_tokens


class RoutedVLLM(FakeVLLM):
    def __init__(self, config: dict[str, Any], port: int) -> None:
        super().__init__(lambda request: random_tokens(request, config["vocab_size"]), port=port)
        self.config = config

    def choice(self, request: Mapping[str, Any]) -> dict[str, Any]:
        choice, params, config = super().choice(request), request["sampling_params"], self.config
        if "routed_experts_prompt_start" in params:
            num_tokens = len(request["token_ids"]) + len(choice["token_ids"])
            num_read = num_tokens - params["routed_experts_prompt_start"] - 1
            draw = np.random.default_rng(params["seed"])
            scores = draw.random((num_read, config["num_hidden_layers"], config["num_experts"]))
            experts = scores.argsort(-1)[..., : config["num_experts_per_tok"]].astype(np.uint8)
            buffer = io.BytesIO()
            np.save(buffer, experts)
            choice["routed_experts"] = base64.b64encode(buffer.getvalue()).decode()
        return choice


class RoutedSidecar(FakeSidecar):
    def make_server(self, port: int) -> FakeVLLM:
        return RoutedVLLM(json.loads((self.model_dir / "config.json").read_text()), port)
