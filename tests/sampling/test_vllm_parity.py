"""The sampler's log-probabilities against transformers on the same weights, before and after pushes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Cohere2MoeForCausalLM

from north_lightning.sampling.client import VLLMSampler
from north_lightning.sampling.transport import SharedMemoryTransport
from north_lightning.types import Sample, SamplingParams

TOLERANCE = 1e-5
PROMPT = [(37 * i) % 580 + 10 for i in range(40)]  # longer than the window of 16 keys


@pytest.fixture(scope="session")
def reference(vllm_checkpoint: Path) -> Cohere2MoeForCausalLM:
    """transformers, which attends to ``sliding_window`` keys, told to use as many as vLLM does."""
    model = Cohere2MoeForCausalLM.from_pretrained(vllm_checkpoint, dtype=torch.float32)
    wider = model.config.sliding_window + 1
    model.config.sliding_window = wider
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = wider
    return model.eval()


def test_x(reference, vllm_sampler):
    s = asyncio.run(vllm_sampler.generate(PROMPT, SamplingParams(max_tokens=64, temperature=1.0)))
    with torch.no_grad():
        lp = reference(torch.tensor([PROMPT + s.token_ids])).logits[0].log_softmax(-1)
    ids = torch.tensor(PROMPT + s.token_ids)
    got = lp[:-1].gather(1, ids[1:, None])[:, 0][len(PROMPT) - 1 :]
    d = (got - torch.tensor(s.logprobs)).abs().max()
    print(d, torch.tensor(s.logprobs).std())
    assert d < TOLERANCE
