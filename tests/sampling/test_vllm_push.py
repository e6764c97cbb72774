"""Pushing weights into the real vLLM server while it samples, and pushes that fail."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Iterator

import httpx
import pytest
import torch
from safetensors.torch import load_file

from north_lightning.errors import ConfigError, WeightPushError
from north_lightning.sampling import SharedMemoryTransport, VLLMSampler
from north_lightning.sampling.transport import _write_safetensors
from north_lightning.types import Sample, SamplingParams

TOLERANCE = 1e-5
PROMPTS = [[(31 * i * (row + 1)) % 580 + 10 for i in range(24)] for row in range(16)]


def is_paused(url: str) -> bool:
    return bool(httpx.get(f"{url}/is_paused").json()["is_paused"])


def test_requests_in_flight_survive_a_push_and_every_token_has_the_logprob_of_its_own_version(
    vllm_sampler, weight_transport, pushed_tensors, vllm_checkpoint, served_logprobs, pushed_logprobs
):
    tensors = [load_file(vllm_checkpoint / "model.safetensors"), pushed_tensors]
    num_tokens = 250

    async def run() -> list[Sample]:
        params = SamplingParams(max_tokens=num_tokens)
        in_flight = asyncio.gather(*(vllm_sampler.generate(prompt, params) for prompt in PROMPTS))
        version = 0
        while not in_flight.done():  # the odd versions are the new weights, the even ones the old
            await asyncio.sleep(0.05)
            version += 1
            await asyncio.to_thread(weight_transport.push, tensors[version % 2].items(), version)
        await vllm_sampler.close()
        return await in_flight

    answers = asyncio.run(run())
    rows = [prompt + answer.token_ids for prompt, answer in zip(PROMPTS, answers, strict=True)]
    old, new = served_logprobs.rows(rows), pushed_logprobs.rows(rows)
    seen: set[int] = set()
    for row, answer in enumerate(answers):
        assert (len(answer.token_ids), answer.finish_reason) == (num_tokens, "length")
        assert answer.policy_versions == sorted(answer.policy_versions)
        seen |= set(answer.policy_versions)
        # The prefix is recomputed with the new weights: a token's version alone says which model it came from.
        from_model = [old[row], new[row]]
        expected = [from_model[v % 2][len(PROMPTS[row]) + i] for i, v in enumerate(answer.policy_versions)]
        assert answer.logprobs == pytest.approx(expected, abs=TOLERANCE)
    assert len(seen) >= 2  # how many more depends on the machine


def test_prefixes_of_older_weights_are_forgotten_at_a_push_unless_they_are_kept(
    vllm_server, vllm_sampler, weight_transport, pushed_tensors, pushed_logprobs
):
    keeping = SharedMemoryTransport(vllm_server.url, prefix_cache="kept")
    prompt = [(37 * i) % 580 + 10 for i in range(120)]

    async def run() -> list[Sample]:
        samples = [await vllm_sampler.generate(prompt, SamplingParams(max_tokens=4))]
        for version, transport in ((1, keeping), (2, weight_transport)):
            await asyncio.to_thread(transport.push, pushed_tensors.items(), version)
            samples.append(await vllm_sampler.generate(prompt, SamplingParams(max_tokens=4)))
        await vllm_sampler.close()
        return samples

    _, kept, cleared = asyncio.run(run())
    keeping.close()
    for sample, version, is_exact in ((kept, 1, False), (cleared, 2, True)):
        assert sample.policy_versions == [version] * 4
        expected = pushed_logprobs(prompt + sample.token_ids)[len(prompt) :]
        assert (sample.logprobs == pytest.approx(expected, abs=TOLERANCE)) == is_exact
    with pytest.raises(ConfigError, match="prefix_cache: expected cleared, kept, salted, got 'lost'"):
        SharedMemoryTransport(vllm_server.url, prefix_cache="lost")


def test_salted_prefixes_are_reused_by_their_own_version_alone(
    vllm_server, vllm_sampler, weight_transport, pushed_tensors, pushed_logprobs
):
    salting = SharedMemoryTransport(vllm_server.url, prefix_cache="salted")
    salted = VLLMSampler(vllm_server.url, timeout_s=60, salt_by_version=True)
    prompt = [(41 * i) % 570 + 11 for i in range(120)]

    async def sampled(sampler: VLLMSampler) -> tuple[Sample, float]:
        before = _prefix_hits(vllm_server.url)
        sample = await sampler.generate(prompt, SamplingParams(max_tokens=4))
        return sample, _prefix_hits(vllm_server.url) - before

    async def run() -> list[tuple[Sample, float]]:
        first = [await sampled(salted), await sampled(vllm_sampler)]
        await asyncio.to_thread(salting.push, pushed_tensors.items(), 1)
        second = [await sampled(salted), await sampled(salted), await sampled(vllm_sampler)]
        for sampler in (salted, vllm_sampler):
            await sampler.close()
        return first + second

    first, _, fresh, again, stale = asyncio.run(run())
    salting.close()
    weight_transport.push(pushed_tensors.items(), 2)  # so that the fixture puts the checkpoint's weights back
    assert first[1] == fresh[1] == 0
    assert again[1] >= 64  # tokens, of whole blocks, that were not read again
    assert stale[1] >= 64
    for (sample, _), is_exact in ((fresh, True), (again, True), (stale, False)):
        assert sample.policy_versions == [1] * 4
        expected = pushed_logprobs(prompt + sample.token_ids)[len(prompt) :]
        assert (sample.logprobs == pytest.approx(expected, abs=TOLERANCE)) == is_exact


def _prefix_hits(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


def test_a_push_reports_what_it_took_and_leaves_no_copy_of_the_weights(weight_transport, pushed_tensors):
    weight_transport.push(pushed_tensors.items(), 7)
    report = weight_transport.last_push
    assert report.version == 7
    assert 0 < report.paused_seconds <= report.seconds < 30
    assert report.num_bytes >= sum(tensor.nbytes for tensor in pushed_tensors.values())
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    assert not any("north_lightning-weights" in os.readlink(link) for link in links if os.path.lexists(link))
    assert not is_paused(weight_transport.urls[0])


def test_tensors_are_taken_in_buckets_and_read_in_several_files(
    vllm_server, weight_transport, score, pushed_tensors, pushed_logprobs
):
    alive, most, in_all = 0, 0, 0

    def gathered() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal alive, most, in_all

        def forget(num_bytes: int) -> None:
            nonlocal alive
            alive -= num_bytes

        for name, tensor in pushed_tensors.items():
            copy = tensor.clone()
            alive, in_all = alive + copy.nbytes, in_all + copy.nbytes
            most = max(most, alive)
            weakref.finalize(copy, forget, copy.nbytes)
            yield name, copy
            del copy

    bucket_bytes = max(tensor.nbytes for tensor in pushed_tensors.values())
    transport = SharedMemoryTransport(vllm_server.url, max_staged_gib=bucket_bytes / 2**30)
    files = []
    post = transport._post
    transport._post = lambda path, **content: (files.append(path), post(path, **content))
    transport.push(gathered(), 5)
    transport.close()
    weight_transport.fenced = True  # so that the fixture puts the old weights back
    assert files.count("/update_weights") > 3
    assert most <= 3 * bucket_bytes < in_all / 2
    assert alive == 0
    assert score(PROMPTS[15]) == pytest.approx(pushed_logprobs(PROMPTS[15]), abs=TOLERANCE)


def without(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def reshaped(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return tensors | {name: tensors[name][:-1].clone()}


BAD_PUSHES = {
    "nothing at all": lambda tensors: {},
    "one expert missing": lambda tensors: without(tensors, "layers.3.mlp.experts.5.up_proj"),
    "one of the fused projections missing": lambda tensors: without(tensors, "layers.2.self_attn.k_proj"),
    "the embedding missing": lambda tensors: without(tensors, "embed_tokens"),
    "a layer's norm missing": lambda tensors: without(tensors, "layers.4.input_layernorm"),
    "the final norm missing": lambda tensors: without(tensors, "model.norm"),
    "an expert of another shape": lambda tensors: reshaped(tensors, "model.layers.3.mlp.experts.5.up_proj.weight"),
    "a norm of another shape": lambda tensors: reshaped(tensors, "model.norm.weight"),
    "a vocabulary of another size": lambda tensors: reshaped(tensors, "model.embed_tokens.weight"),
    "a name the model does not have": lambda tensors: tensors | {"model.layers.9.mlp.gate.weight": torch.ones(8, 64)},
}


@pytest.mark.parametrize("defect", BAD_PUSHES)
def test_an_incomplete_push_is_refused_and_fenced_and_the_next_good_one_restores_everything(
    defect, score, weight_transport, pushed_tensors, pushed_logprobs
):
    weight_transport.push(pushed_tensors.items(), 1)
    scrambled = {name: tensor + 0.05 for name, tensor in pushed_tensors.items()}
    with pytest.raises(WeightPushError, match="version 2 was not confirmed"):
        weight_transport.push(BAD_PUSHES[defect](scrambled).items(), 2)
    assert weight_transport.fenced
    assert is_paused(weight_transport.urls[0])
    assert httpx.get(f"{weight_transport.urls[0]}/weight_info").json() == {"weight_version": "1"}

    weight_transport.push(pushed_tensors.items(), 3)
    assert not weight_transport.fenced
    assert not is_paused(weight_transport.urls[0])
    assert score(PROMPTS[15]) == pytest.approx(pushed_logprobs(PROMPTS[15]), abs=TOLERANCE)


def test_a_push_cut_off_after_any_tensor_is_refused_and_a_good_one_restores_everything(
    score, weight_transport, pushed_tensors, pushed_logprobs
):
    names = list(pushed_tensors)
    for num_tensors in [*range(1, len(names), 6), len(names) - 1]:
        with pytest.raises(WeightPushError, match="weights are missing"):
            weight_transport.push([(name, pushed_tensors[name] - 0.05) for name in names[:num_tensors]], 1)
    assert httpx.get(f"{weight_transport.urls[0]}/weight_info").json() == {"weight_version": "0"}
    weight_transport.push(pushed_tensors.items(), 2)
    assert score(PROMPTS[15]) == pytest.approx(pushed_logprobs(PROMPTS[15]), abs=TOLERANCE)


def test_requests_that_wait_behind_a_failed_push_are_answered_by_the_next_good_one(
    vllm_sampler, weight_transport, pushed_tensors, pushed_logprobs
):
    async def run() -> Sample:
        answer = asyncio.create_task(vllm_sampler.generate(PROMPTS[3], SamplingParams(max_tokens=400)))
        await asyncio.sleep(0.3)
        with pytest.raises(WeightPushError):
            await asyncio.to_thread(weight_transport.push, list(pushed_tensors.items())[:9], 1)
        await asyncio.sleep(0.3)
        assert not answer.done()
        await asyncio.to_thread(weight_transport.push, pushed_tensors.items(), 2)
        sample = await answer
        await vllm_sampler.close()
        return sample

    answer = asyncio.run(run())
    assert set(answer.policy_versions) == {0, 2}
    first_new = answer.policy_versions.index(2)
    expected = pushed_logprobs(PROMPTS[3] + answer.token_ids)[len(PROMPTS[3]) :]
    assert answer.logprobs[first_new:] == pytest.approx(expected[first_new:], abs=TOLERANCE)


def test_another_trainer_that_takes_over_a_fenced_server_can_push(
    score, weight_transport, pushed_tensors, pushed_logprobs
):
    """After a crash between two steps of a push, a new process knows nothing of the session that is still open."""
    weight_transport.push(pushed_tensors.items(), 1)
    httpx.post(f"{weight_transport.urls[0]}/pause", params={"mode": "keep"}).raise_for_status()
    httpx.post(f"{weight_transport.urls[0]}/start_weight_update").raise_for_status()
    successor = SharedMemoryTransport(weight_transport.urls[0])
    successor.push(pushed_tensors.items(), 2)
    successor.close()
    assert score(PROMPTS[15]) == pytest.approx(pushed_logprobs(PROMPTS[15]), abs=TOLERANCE)


def test_weights_that_cannot_be_written_leave_the_server_sampling_as_before(vllm_server, pushed_tensors):
    transport = SharedMemoryTransport(vllm_server.url)
    with pytest.raises(WeightPushError, match=r"model\.norm\.weight: expected a dtype of .* got torch\.float64"):
        transport.push([("model.norm.weight", torch.ones(64, dtype=torch.float64))], 1)
    transport.close()
    assert not transport.fenced
    assert not is_paused(vllm_server.url)
    assert httpx.get(f"{vllm_server.url}/weight_info").json() == {"weight_version": "0"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_sent_reads_as_safetensors(dtype, tmp_path):
    fused = torch.randn(3, 4, 8).to(dtype)
    tensors = {"slice": fused[1], "transposed": fused[0].T, "vector": torch.arange(5).to(dtype), "whole": fused}
    with (tmp_path / "weights").open("wb") as file:
        num_bytes = _write_safetensors(list(tensors.items()), file)
    read = load_file(tmp_path / "weights")
    assert list(read) == sorted(tensors)
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == dtype for name in tensors)
    assert num_bytes == (tmp_path / "weights").stat().st_size


def test_a_server_that_is_gone_is_a_push_error_that_says_so(pushed_tensors):
    transport = SharedMemoryTransport("http://127.0.0.1:9")
    with pytest.raises(WeightPushError, match=r"http://127\.0\.0\.1:9: version 1 was not confirmed \(ConnectError"):
        transport.push(pushed_tensors.items(), 1)
    assert transport.fenced
