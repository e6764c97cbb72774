"""The client against hand-written answers and a small server that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from north_lightning.errors import SamplerError
from north_lightning.sampling.client import (
    VLLMSampler,
    routed_experts_from_answer,
    sample_from_answer,
    versions_from_spans,
)
from north_lightning.types import Sample, SamplingParams


def answer(**changes: Any) -> dict[str, Any]:
    choice = {
        "token_ids": [31, 32, 7],
        "logprobs": {"content": [{"token_id": t, "logprob": -0.25 * t} for t in (31, 32, 7)]},
        "finish_reason": "stop",
        "weight_versions": [{"version": "0", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 3}],
    }
    return {"choices": [choice | changes]}


def test_an_answer_becomes_a_sample_token_by_token():
    assert sample_from_answer(answer()) == Sample([31, 32, 7], [-7.75, -8.0, -1.75], [0, 3, 3], "stop")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": [31, 32]}, "of 3 tokens do not belong to the 2 sampled"),
        ({"token_ids": [31, 33, 7]}, "do not belong"),
        ({"logprobs": {"content": [{"token_id": t, "logprob": float("nan")} for t in (31, 32, 7)]}}, "nan at token 0"),
        ({"logprobs": {"content": [{"token_id": t, "logprob": -9999.0} for t in (31, 32, 7)]}}, "-9999.0 at token 0"),
        ({"finish_reason": "error"}, "got 'error'"),
        ({"weight_versions": None}, "spans cover 0 of 3 tokens"),
        ({"weight_versions": [{"version": "1", "start": 0, "end": 2}]}, "spans cover 2 of 3"),
        ({"weight_versions": [{"version": "1", "start": 1, "end": 3}]}, "follow each other from 0"),
        ({"weight_versions": [{"version": "step-4", "start": 0, "end": 3}]}, "got 'step-4'"),
    ],
)
def test_an_answer_that_cannot_be_trained_on_is_refused(changes, message):
    with pytest.raises(SamplerError, match=message):
        sample_from_answer(answer(**changes))


def encoded(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def test_routed_experts_are_read_as_vllm_encodes_them():
    experts = np.arange(4 * 5 * 2, dtype=np.uint8).reshape(4, 5, 2)
    read = routed_experts_from_answer(answer(routed_experts=encoded(experts)), 4)
    assert np.array_equal(read, experts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--enable-return-routed-experts"),
        ({"routed_experts": encoded(np.zeros((3, 5, 2), np.uint8))}, r"expected integers \[4, .*got uint8 \[3, 5, 2\]"),
        ({"routed_experts": encoded(np.zeros((4, 5, 2)))}, "got float64"),
        ({"routed_experts": encoded(np.array([{}], dtype=object))}, "expected a base64 .npy"),
        ({"routed_experts": "bm90IG51bXB5"}, "expected a base64 .npy"),
    ],
)
def test_routed_experts_that_are_missing_or_malformed_are_refused(changes, message):
    with pytest.raises(SamplerError, match=message):
        routed_experts_from_answer(answer(**changes), 4)


def test_weights_that_nobody_has_named_are_version_zero():
    spans = [{"version": "default", "start": 0, "end": 2}, {"version": "12", "start": 2, "end": 4}]
    assert versions_from_spans(spans, 4) == [0, 0, 12, 12]


Handler = Callable[[dict[str, Any]], Awaitable[tuple[int, str]]]


async def ask(handler: Handler, routed_experts_from: int | None = None, **settings: Any) -> Sample:
    """Start a server that answers with ``handler`` (an exception from it breaks the connection), and ask once."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            size = int(head.split("content-length:")[1].split("\r\n")[0])
            status, text = await handler(json.loads(await reader.readexactly(size)))
            writer.write(
                f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n"
                f"Connection: close\r\n\r\n{text}".encode()
            )
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    sampler = VLLMSampler(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", **{"timeout_s": 60.0, **settings})
    params = SamplingParams(9, 0.5, 0.9, stop_token_ids=(7,), seed=3, routed_experts_from=routed_experts_from)
    try:
        return await sampler.generate([1, 2], params)
    finally:
        await sampler.close()
        server.close()


def test_a_request_carries_ids_and_every_sampling_parameter():
    requests: list[dict[str, Any]] = []

    async def handler(request: dict[str, Any]) -> tuple[int, str]:
        requests.append(request)
        return 200, json.dumps(answer())

    asyncio.run(ask(handler))
    assert requests == [
        {
            "token_ids": [1, 2],
            "sampling_params": {
                "max_tokens": 9,
                "temperature": 0.5,
                "top_p": 0.9,
                "stop_token_ids": [7],
                "seed": 3,
                "ignore_eos": True,
                "detokenize": False,
                "logprobs": 0,
            },
        }
    ]


def test_routed_experts_are_asked_for_from_a_token_on_and_without_the_last():
    """Two tokens of prompt, the first known already, and three generated: 1 + 3 - 1 that the sampler has read."""
    requests: list[dict[str, Any]] = []
    experts = np.arange(3 * 5 * 2, dtype=np.uint8).reshape(3, 5, 2)

    async def handler(request: dict[str, Any]) -> tuple[int, str]:
        requests.append(request["sampling_params"])
        return 200, json.dumps(answer(routed_experts=encoded(experts)))

    sample = asyncio.run(ask(handler, routed_experts_from=1))
    assert requests[0]["routed_experts_prompt_start"] == 1
    assert sample.routed_experts is not None
    assert np.array_equal(sample.routed_experts, experts)
    with pytest.raises(SamplerError, match=r"expected integers \[4,"):
        asyncio.run(ask(handler, routed_experts_from=0))


@pytest.mark.parametrize(("num_breaks", "succeeds"), [(0, True), (2, True), (3, False)])
def test_broken_connections_are_retried_so_often_and_no_more(num_breaks, succeeds):
    attempts = 0

    async def handler(request: dict[str, Any]) -> tuple[int, str]:
        nonlocal attempts
        attempts += 1
        if attempts <= num_breaks:
            raise ConnectionError
        return 200, json.dumps(answer())

    if succeeds:
        assert asyncio.run(ask(handler, num_retries=2)).token_ids == [31, 32, 7]
    else:
        with pytest.raises(SamplerError, match="no connection after 3 attempts .*is the vLLM sidecar still running"):
            asyncio.run(ask(handler, num_retries=2))
    assert attempts == min(num_breaks + 1, 3)


def test_an_answer_that_does_not_come_in_time_is_an_error_and_is_not_asked_for_again():
    attempts = 0

    async def handler(request: dict[str, Any]) -> tuple[int, str]:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(5)
        return 200, "{}"

    with pytest.raises(SamplerError, match="no answer within 0.2 s"):
        asyncio.run(ask(handler, timeout_s=0.2))
    assert attempts == 1


def test_a_refusal_is_an_error_that_quotes_the_server():
    async def handler(request: dict[str, Any]) -> tuple[int, str]:
        return 400, '{"error": "prompt is too long"}'

    with pytest.raises(SamplerError, match=r"status 400: .*prompt is too long"):
        asyncio.run(ask(handler))


def test_an_answer_of_another_shape_is_an_error_of_the_sampler():
    async def handler(request: dict[str, Any]) -> tuple[int, str]:
        return 200, '{"choices": []}'

    with pytest.raises(SamplerError, match="an answer of another shape"):
        asyncio.run(ask(handler))


def test_a_sampler_can_be_sent_to_another_process_while_it_is_connected():
    async def run() -> VLLMSampler:
        sampler = VLLMSampler("http://127.0.0.1:9/", timeout_s=3)
        sampler._open_session()
        copy = pickle.loads(pickle.dumps(sampler))
        await sampler.close()
        return copy

    copy = asyncio.run(run())
    assert (copy.url, copy.timeout_s, copy._session) == ("http://127.0.0.1:9", 3, None)


def test_the_rollout_process_imports_the_client_without_torch():
    program = "import sys, north_lightning.sampling.client, north_lightning.sampling.scripted; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "vllm", "lightning", "transformers"} & set(output.split())
