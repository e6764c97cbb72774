"""What the rollout process of a fault trial runs; imports no torch, so that a new process is soon there."""

from __future__ import annotations

from pathlib import Path

from rollout_fakes import EchoHarness, FakeVerifier, by_index, image_of, load_chat

from north_lightning.faults import FaultPlan, FaultySandboxes, FaultyVerifier, NoSandboxes
from north_lightning.rollout import RolloutRunner, Timeouts
from north_lightning.rollout.journal import JournalledSampler
from north_lightning.sampling.client import VLLMSampler
from north_lightning.sampling.pool import SamplerPool


def faulty_runner(
    tokenizer: Path, urls: list[str], plan: FaultPlan, timeout_s: float, timeouts: Timeouts | None = None
) -> RolloutRunner:
    """The real runner, client and pool; what they ask fails as planned. ``timeout_s`` is the client's."""
    chat = load_chat(tokenizer)
    sampler = SamplerPool(
        [JournalledSampler(VLLMSampler(url, timeout_s, num_retries=1), index) for index, url in enumerate(urls)],
        rest_s=1.0,
    )
    sandboxes = FaultySandboxes(NoSandboxes(), plan)
    verifier = FaultyVerifier(FakeVerifier(by_index), plan)
    harnesses = {"terminal": EchoHarness()}
    limits = {"timeouts": timeouts, "max_attempts": 2, "retry_delay_s": 0.02}
    return RolloutRunner(chat, sampler, sandboxes, harnesses, verifier, image_of, 200, 1900, **limits)


def pooled_runner(tokenizer: Path, urls: list[str], timeout_s: float) -> RolloutRunner:
    """The real runner, client and pool, with their own defaults; only the servers may fail."""
    sampler = SamplerPool([VLLMSampler(url, timeout_s) for url in urls])
    harnesses = {"terminal": EchoHarness()}
    verifier = FakeVerifier(by_index)
    return RolloutRunner(load_chat(tokenizer), sampler, NoSandboxes(), harnesses, verifier, image_of, 200, 1900)


def one_server_runner(tokenizer: Path, url: str) -> RolloutRunner:
    """As ``pooled_runner``, of a single server; an attempt that fails is not tried again."""
    runner = pooled_runner(tokenizer, [url], 5.0)
    runner.max_attempts = 1
    return runner
