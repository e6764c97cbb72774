"""The scripted sampler answers the same thing for the same call."""

from __future__ import annotations

import asyncio

import pytest

from north_lightning.errors import SamplerError
from north_lightning.sampling import ScriptedSampler
from north_lightning.types import Sample, SamplingParams

PARAMS = SamplingParams(max_tokens=4, stop_token_ids=(9,))


def answers_of(sampler: ScriptedSampler, *prompts: list[int]) -> list[list[int]]:
    return [asyncio.run(sampler.generate(prompt, PARAMS)).token_ids for prompt in prompts]


def test_a_list_answers_call_by_call_and_repeats_its_last():
    sampler = ScriptedSampler([[1, 9], [2, 9]])
    assert answers_of(sampler, [5], [6], [7]) == [[1, 9], [2, 9], [2, 9]]
    assert sampler.prompts == [[5], [6], [7]]


def test_a_mapping_answers_by_the_longest_end_of_the_prompt():
    sampler = ScriptedSampler({(5,): [1], (4, 5): [2], (): [3]})
    assert answers_of(sampler, [3, 5], [4, 5], [6]) == [[1], [2], [3]]


def test_a_function_answers_from_the_prompt():
    assert answers_of(ScriptedSampler(lambda prompt: [len(prompt)]), [1, 2, 3]) == [[3]]


def test_a_prompt_the_script_does_not_know_is_a_sampler_error():
    with pytest.raises(SamplerError, match=r"no answer for a prompt ending in \(6,\)"):
        answers_of(ScriptedSampler({(5,): [1]}), [6])


@pytest.mark.parametrize(
    ("script", "token_ids", "reason"),
    [([1, 9, 3], [1, 9], "stop"), ([1, 2, 3, 9], [1, 2, 3, 9], "stop"), ([1, 2, 3, 4, 9], [1, 2, 3, 4], "length")],
)
def test_answers_end_as_a_model_would_end_them(script, token_ids, reason):
    sampler = ScriptedSampler([script], logprob=-0.125, policy_version=6)
    size = len(token_ids)
    assert asyncio.run(sampler.generate([0], PARAMS)) == Sample(token_ids, [-0.125] * size, [6] * size, reason)


def test_a_test_can_push_between_two_calls():
    sampler = ScriptedSampler([[1]])
    first = asyncio.run(sampler.generate([0], PARAMS))
    sampler.policy_version = 2
    second = asyncio.run(sampler.generate([0], PARAMS))
    assert (first.policy_versions, second.policy_versions) == ([0], [2])
