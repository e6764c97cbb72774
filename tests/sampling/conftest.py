"""References for what the server must answer: transformers, on the served checkpoint and on another of its shape."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Cohere2MoeConfig, Cohere2MoeForCausalLM

from north_lightning.sampling.client import VLLMSampler


@pytest.fixture(scope="session")
def other_checkpoint(vllm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The served checkpoint's shape with other random weights: what a trainer would push."""
    directory = tmp_path_factory.mktemp("pushed") / "checkpoint"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        Cohere2MoeForCausalLM(Cohere2MoeConfig.from_pretrained(vllm_checkpoint)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def served_logprobs(vllm_checkpoint: Path) -> Reference:
    return transformers_logprobs(vllm_checkpoint)


@pytest.fixture(scope="session")
def pushed_logprobs(other_checkpoint: Path) -> Reference:
    return transformers_logprobs(other_checkpoint)


@pytest.fixture
def pushed_tensors(other_checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(other_checkpoint / "model.safetensors")


@pytest.fixture
def score(vllm_sampler: VLLMSampler) -> Callable[[list[int]], list[float]]:
    """``score(token_ids)``: log-probability of every token given those before it, by the session's server."""

    def run(token_ids: list[int]) -> list[float]:
        async def ask() -> list[float]:
            try:
                return await vllm_sampler.score(token_ids)
            finally:
                await vllm_sampler.close()

        return asyncio.run(ask())

    return run


def transformers_logprobs(directory: Path) -> Reference:
    """``f(token_ids, temperature) -> log-probability of every token given those before it`` (0.0 for the first).

    ``f.rows`` does the same for several rows of one length at once.
    transformers attends to ``sliding_window`` keys and vLLM to one more: the reference is told to do as vLLM does.
    """
    model = Cohere2MoeForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    wider = model.config.sliding_window + 1
    model.config.sliding_window = wider
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = wider

    return Reference(model)


class Reference:
    def __init__(self, model: Cohere2MoeForCausalLM) -> None:
        self.model = model

    def __call__(self, token_ids: list[int], temperature: float = 1.0) -> list[float]:
        return self.rows([token_ids], temperature)[0]

    @torch.no_grad()
    def rows(self, rows: list[list[int]], temperature: float = 1.0) -> list[list[float]]:
        ids = torch.tensor(rows)
        table = (self.model(ids).logits / temperature).log_softmax(-1)  # [B, T, V]
        logprobs = table[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        return [[0.0, *row] for row in logprobs.tolist()]
