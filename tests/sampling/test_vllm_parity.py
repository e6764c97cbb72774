"""Log-probabilities of the real vLLM server against transformers and against our own model, same weights, fp32."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from north_lightning.model import load_checkpoint, named_hf_tensors
from north_lightning.sampling import SharedMemoryTransport, VLLMSampler
from north_lightning.types import Sample, SamplingParams

TOLERANCE = 1e-5
PROMPT = [(37 * i) % 580 + 10 for i in range(70)]  # longer than the window of 16 keys and than two cache blocks of 32

Logprobs = Callable[..., list[float]]


def sample(sampler: VLLMSampler, prompts: list[list[int]], **params: float) -> list[Sample]:
    """Sample from every prompt at once, 64 tokens each unless told otherwise."""

    async def run() -> list[Sample]:
        settings = SamplingParams(**({"max_tokens": 64} | params))
        try:
            return await asyncio.gather(*(sampler.generate(prompt, settings) for prompt in prompts))
        finally:
            await sampler.close()

    return asyncio.run(run())


def test_logprobs_of_sampled_tokens_equal_transformers_beyond_the_window(vllm_sampler, served_logprobs):
    (answer,) = sample(vllm_sampler, [PROMPT])
    expected = served_logprobs(PROMPT + answer.token_ids)[len(PROMPT) :]
    assert answer.logprobs == pytest.approx(expected, abs=TOLERANCE)
    assert answer.policy_versions == [0] * 64
    assert max(answer.logprobs) - min(answer.logprobs) > 1.0  # the model is not so flat that everything agrees


def test_prompts_of_different_lengths_in_one_batch_do_not_touch_each_other(vllm_sampler, served_logprobs):
    prompts = [PROMPT[:size] for size in (1, 15, 16, 17, 31, 32, 33, 64, 70)]
    for prompt, answer in zip(prompts, sample(vllm_sampler, prompts, max_tokens=20), strict=True):
        expected = served_logprobs(prompt + answer.token_ids)[len(prompt) :]
        assert answer.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_temperature_is_part_of_the_logprobs(vllm_sampler, served_logprobs):
    (answer,) = sample(vllm_sampler, [PROMPT], temperature=0.6)
    expected = served_logprobs(PROMPT + answer.token_ids, 0.6)[len(PROMPT) :]
    assert answer.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_later_turns_on_a_cached_prefix_have_the_logprobs_of_a_fresh_computation(vllm_sampler, served_logprobs):
    conversation = list(PROMPT)
    for observation in ([11, 12, 13], [500, 400, 300, 200], [77]):
        (answer,) = sample(vllm_sampler, [conversation], max_tokens=40)
        expected = served_logprobs(conversation + answer.token_ids)[len(conversation) :]
        assert answer.logprobs == pytest.approx(expected, abs=TOLERANCE)
        conversation += answer.token_ids + observation


def test_the_same_seed_samples_the_same_tokens_and_another_seed_others(vllm_sampler):
    first, again = (sample(vllm_sampler, [PROMPT], seed=3)[0] for _ in range(2))
    (other,) = sample(vllm_sampler, [PROMPT], seed=4)
    assert first.token_ids == again.token_ids != other.token_ids


def test_long_seeded_prompts_that_do_not_fit_one_engine_step_are_answered(vllm_sampler, served_logprobs):
    prompts = [[(37 * i + 11 * number) % 580 + 10 for i in range(1900)] for number in range(10)]
    answers = sample(vllm_sampler, prompts, max_tokens=4, seed=3)
    assert [len(answer.token_ids) for answer in answers] == [4] * 10
    expected = served_logprobs(prompts[9] + answers[9].token_ids)[1900:]
    assert answers[9].logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_generation_stops_at_stop_tokens_only_and_keeps_them(vllm_sampler):
    (unstopped,) = sample(vllm_sampler, [PROMPT], temperature=0.0)
    assert (len(unstopped.token_ids), unstopped.finish_reason) == (64, "length")
    stop = unstopped.token_ids[20]
    end = unstopped.token_ids.index(stop) + 1
    (stopped,) = sample(vllm_sampler, [PROMPT], temperature=0.0, stop_token_ids=(stop,))
    assert (stopped.token_ids, stopped.finish_reason) == (unstopped.token_ids[:end], "stop")
    assert len(stopped.logprobs) == len(stopped.policy_versions) == end


def test_scores_of_given_tokens_equal_transformers(score, served_logprobs):
    assert score(PROMPT) == pytest.approx(served_logprobs(PROMPT), abs=TOLERANCE)


def test_our_model_and_the_sampler_agree_before_and_after_a_push(
    vllm_sampler, weight_transport, vllm_checkpoint, other_checkpoint
):
    for version, checkpoint in enumerate((vllm_checkpoint, other_checkpoint)):
        model = load_checkpoint(checkpoint)
        if version > 0:
            weight_transport.push(named_hf_tensors(model), version)
        (answer,) = sample(vllm_sampler, [PROMPT])
        ids = torch.tensor(PROMPT + answer.token_ids)
        with torch.no_grad():
            hidden = model(ids, torch.tensor([0, len(ids)], dtype=torch.int32))
        table = (hidden @ model.embedding_weight.T).float().log_softmax(-1)
        expected = table[:-1].gather(1, ids[1:, None])[len(PROMPT) - 1 :, 0].tolist()
        assert answer.logprobs == pytest.approx(expected, abs=TOLERANCE)
        assert answer.policy_versions == [version] * 64


def test_after_a_push_every_part_of_the_model_is_the_new_one(
    vllm_sampler: VLLMSampler,
    weight_transport: SharedMemoryTransport,
    served_logprobs: Logprobs,
    pushed_logprobs: Logprobs,
    pushed_tensors: dict[str, torch.Tensor],
) -> None:
    sample(vllm_sampler, [PROMPT])  # leaves PROMPT's keys and values in the cache, computed with the old weights
    weight_transport.push(pushed_tensors.items(), 1)
    (answer,) = sample(vllm_sampler, [PROMPT])
    ids = PROMPT + answer.token_ids
    assert answer.logprobs == pytest.approx(pushed_logprobs(ids)[len(PROMPT) :], abs=TOLERANCE)
    assert answer.logprobs != pytest.approx(served_logprobs(ids)[len(PROMPT) :], abs=0.1)
    assert answer.policy_versions == [1] * 64


@pytest.mark.parametrize(
    "part", ["experts", "gate.weight", "self_attn", "layers.0.mlp", "layernorm", "embed", "model.norm"]
)
def test_pushing_one_changed_part_equals_a_fresh_load(
    part: str,
    score: Logprobs,
    weight_transport: SharedMemoryTransport,
    vllm_checkpoint: Path,
    pushed_tensors: dict[str, torch.Tensor],
) -> None:
    """Experts are packed at load time, attention is fused, the embedding padded: each is written back its own way."""
    tensors = load_file(vllm_checkpoint / "model.safetensors")
    changed = [name for name in tensors if part in name]
    assert changed
    for name in changed:
        tensors[name] = pushed_tensors[name] + 0.3 * torch.ones_like(tensors[name]) * ("norm" in name)
    weight_transport.push(tensors.items(), 1)
    model = load_checkpoint(vllm_checkpoint)
    own = dict(named_hf_tensors(model))
    with torch.no_grad():
        for name in changed:
            own[name].copy_(tensors[name])
        hidden = model(torch.tensor(PROMPT), torch.tensor([0, len(PROMPT)], dtype=torch.int32))
        table = (hidden @ model.embedding_weight.T).float().log_softmax(-1)
    expected = table[:-1].gather(1, torch.tensor(PROMPT)[1:, None])[:, 0].tolist()
    assert score(PROMPT)[1:] == pytest.approx(expected, abs=TOLERANCE)


def test_pushing_identical_weights_changes_no_logprob(
    vllm_sampler, score, weight_transport, vllm_checkpoint, served_logprobs
):
    before = score(PROMPT)
    assert before == pytest.approx(served_logprobs(PROMPT), abs=TOLERANCE)
    (greedy_before,) = sample(vllm_sampler, [PROMPT], temperature=0.0)
    for version in (1, 2):
        weight_transport.push(load_file(vllm_checkpoint / "model.safetensors").items(), version)
    assert score(PROMPT) == before
    (greedy_after,) = sample(vllm_sampler, [PROMPT], temperature=0.0)
    assert greedy_after.token_ids == greedy_before.token_ids
    assert greedy_after.logprobs == pytest.approx(greedy_before.logprobs, abs=1e-6)
    assert greedy_after.policy_versions == [2] * 64
