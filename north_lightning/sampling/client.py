"""Token ids in, token ids out, over HTTP from a vLLM server.

Comes in: a prompt as ids. Goes out: a ``Sample`` whose every token carries the log-probability it was sampled with and
the version of the weights that produced it. Nothing here tokenises, parses or imports torch: this module runs in the
rollout process.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import aiohttp

from north_lightning.errors import NonFiniteError, SamplerError
from north_lightning.interfaces import Sampler
from north_lightning.types import FinishReason, Sample, SamplingParams

if TYPE_CHECKING:
    from numpy import ndarray

GENERATE_PATH, VERSION_PATH = "/inference/v1/generate", "/weight_info"
OK = 200
UNNAMED_VERSION = "default"
"""What vLLM calls its weights before anybody has named them: the ones it was started with, version 0."""
CLAMPED_LOGPROB = -9999.0
"""vLLM replaces NaN and -inf by this number before it answers."""

_FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort")


class VLLMSampler(Sampler):
    """Asks one vLLM server. Picklable; the connection is made at the first request, in the event loop that makes it.

    Args:
        url: base URL of the server, as in ``Sidecar.url``.
        timeout_s: limit of one answer, every retry included (a weight push delays it by a fraction of a second).
        num_retries: how often a request is sent again when the connection breaks; answers are never retried.
        salt_by_version: reuse keys and values of prompts that begin alike only where the same weights computed them, by
            asking for the version before each request; for transports whose ``prefix_cache`` is ``salted``.
    """

    def __init__(
        self,
        url: str,
        timeout_s: float,
        num_retries: int = 3,
        salt_by_version: bool = False,
    ) -> None:
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.num_retries = num_retries
        self.salt_by_version = salt_by_version
        self._session: aiohttp.ClientSession | None = None
        self._session_loop: asyncio.AbstractEventLoop | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_session": None, "_session_loop": None}

    async def generate(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> Sample:
        """Sample until one of ``params.stop_token_ids`` (kept, as the last token) or ``max_tokens``.

        Nothing else stops a generation, not even the model's end-of-sequence id. ``SamplerError`` when the server
        cannot be reached, refuses the request, or answers what cannot be trained on.
        """
        sampling_params: dict[str, Any] = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "stop_token_ids": list(params.stop_token_ids),
            "seed": params.seed,
            "ignore_eos": True,
            "detokenize": False,
            "logprobs": 0,  # of the sampled token only
        }
        if params.routed_experts_from is not None:
            sampling_params["routed_experts_prompt_start"] = params.routed_experts_from
        body = {"token_ids": list(prompt_token_ids), "sampling_params": sampling_params}
        try:
            async with asyncio.timeout(self.timeout_s):
                if self.salt_by_version:
                    served = await self._request("GET", VERSION_PATH)
                    body["cache_salt"] = f"version {served['weight_version']}"
                answer = await self._request("POST", GENERATE_PATH, body)
        except TimeoutError as error:
            raise SamplerError(
                f"{self.url}: no answer within {self.timeout_s:g} s (timeouts.sample_s), for a turn of at most "
                f"{params.max_tokens} tokens"
            ) from error
        sample = sample_from_answer(answer)
        if params.routed_experts_from is None:
            return sample
        num_read = len(prompt_token_ids) - params.routed_experts_from + len(sample.token_ids) - 1
        return replace(sample, routed_experts=routed_experts_from_answer(answer, num_read))

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of every token given those before it, under the server's present weights; 0.0 first."""
        sampling_params = {"max_tokens": 1, "temperature": 1.0, "detokenize": False, "prompt_logprobs": 0}
        answer = await self._request(
            "POST", GENERATE_PATH, {"token_ids": list(token_ids), "sampling_params": sampling_params}
        )
        entries = answer["prompt_logprobs"]
        return [0.0] + [
            float(entry[str(token)]["logprob"]) for token, entry in zip(token_ids[1:], entries[1:], strict=True)
        ]

    async def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        """Send one request, again while the connection breaks."""
        for attempt in itertools.count():
            try:
                async with self._open_session().request(method, self.url + path, json=body) as response:
                    if response.status != OK:
                        raise SamplerError(f"{self.url}: status {response.status}: {(await response.text())[:500]}")
                    answer: Mapping[str, Any] = await response.json()
                    return answer
            except aiohttp.ClientConnectionError as error:
                if attempt >= self.num_retries:
                    raise SamplerError(
                        f"{self.url}: no connection after {attempt + 1} attempts ({type(error).__name__}: {error}); "
                        "is the vLLM sidecar still running?"
                    ) from error
                await asyncio.sleep(0.1 * 2**attempt)
            except (aiohttp.ClientError, ValueError) as error:
                what = f"{type(error).__name__}: {error}"
                raise SamplerError(f"{self.url}: expected JSON, got an answer that cannot be read ({what})") from error
        raise AssertionError("unreachable")

    def _open_session(self) -> aiohttp.ClientSession:
        """A session belongs to the event loop it was made in; another loop gets another one."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session_loop is not loop:
            self._session_loop = loop
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # who asks decides how many are in flight
                timeout=aiohttp.ClientTimeout(total=None),  # ``timeout_s`` is over all requests of an answer
            )
        return self._session


def sample_from_answer(answer: Mapping[str, Any]) -> Sample:
    """Read an answer of vLLM's token-in/token-out route; ``SamplerError`` if it is not consistent and finite."""
    try:
        choice = answer["choices"][0]
        token_ids = list(choice["token_ids"])
        content = choice["logprobs"]["content"]
        spans = choice["weight_versions"]
    except (KeyError, IndexError, TypeError) as error:
        raise SamplerError(f"an answer of another shape ({error!r}): {str(answer)[:300]}") from error
    if [entry["token_id"] for entry in content] != token_ids:
        raise SamplerError(f"log-probabilities of {len(content)} tokens do not belong to the {len(token_ids)} sampled")
    logprobs = [float(entry["logprob"]) for entry in content]
    for position, value in enumerate(logprobs):
        if not math.isfinite(value) or value <= CLAMPED_LOGPROB:
            raise NonFiniteError(f"log-probability {value} at token {position}: the sampler's weights are not finite")
    if choice["finish_reason"] not in _FINISH_REASONS:
        raise SamplerError(f"finish reason: expected one of {_FINISH_REASONS}, got {choice['finish_reason']!r}")
    versions = versions_from_spans(spans, len(token_ids))
    return Sample(token_ids, logprobs, versions, choice["finish_reason"])


def routed_experts_from_answer(answer: Mapping[str, Any], num_tokens: int) -> ndarray:
    """The experts of ``num_tokens`` tokens, [num_tokens, L, K]; ``SamplerError`` if they are not there."""
    import numpy

    encoded = answer["choices"][0].get("routed_experts")
    if encoded is None:
        raise SamplerError("the answer has no routed experts: start the server with --enable-return-routed-experts")
    try:
        experts: ndarray = numpy.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SamplerError(f"routed experts: expected a base64 .npy, got {str(encoded)[:60]!r} ({error})") from error
    if experts.ndim != 3 or len(experts) != num_tokens or experts.dtype.kind not in "iu":
        raise SamplerError(
            f"routed experts: expected integers [{num_tokens}, layers, experts per token], "
            f"got {experts.dtype} {list(experts.shape)}"
        )
    return experts


def versions_from_spans(spans: Sequence[Mapping[str, Any]] | None, num_tokens: int) -> list[int]:
    """``[{version, start, end}, ...]`` -> one version per token; ``SamplerError`` unless the spans tile the tokens."""
    versions: list[int] = []
    for span in spans or ():
        if span["start"] != len(versions) or span["end"] < span["start"]:
            raise SamplerError(f"weight versions: expected spans that follow each other from 0, got {spans}")
        name = span["version"]
        if name != UNNAMED_VERSION and not name.isdigit():
            raise SamplerError(f"weight version: expected a number, got {name!r}; is another trainer pushing weights?")
        versions += [0 if name == UNNAMED_VERSION else int(name)] * (span["end"] - span["start"])
    if len(versions) != num_tokens:
        raise SamplerError(f"weight versions: spans cover {len(versions)} of {num_tokens} tokens: {spans}")
    return versions
