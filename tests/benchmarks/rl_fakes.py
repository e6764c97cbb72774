"""What the benchmarks run in the rollout process: the real runner over a fake sampler, sandbox and verifier."""

from __future__ import annotations

from pathlib import Path

from rollout_fakes import (
    EchoHarness,
    FakeSandboxes,
    PlannedVerifier,
    RecordingSampler,
    answer,
    call,
    image_of,
    load_chat,
)

from north_lightning.rollout import RolloutRunner
from north_lightning.types import Sample, SamplingParams

FAILS_EVERY = 7
"""Every seventh group fails for good: the ledger has reasons in it too."""


class FileSampler(RecordingSampler):
    """Serves the version that was pushed last, by what the pusher wrote in a file."""

    def __init__(self, chat, actions, path: Path, delay_s: float) -> None:
        super().__init__(chat, actions, delay_s)
        self.path = path

    async def generate(self, prompt_token_ids, params: SamplingParams) -> Sample:
        version = int(self.path.read_text())
        sample = await super().generate(prompt_token_ids, params)
        return Sample(sample.token_ids, sample.logprobs, [version] * len(sample.token_ids), sample.finish_reason)


def fake_runner(tokenizer_dir: Path, once: Path, version: Path) -> RolloutRunner:
    chat = load_chat(tokenizer_dir)
    sampler = FileSampler(chat, [call("one"), answer()], version, delay_s=0.01)
    harnesses = {"terminal": EchoHarness()}
    verifier = PlannedVerifier(dict.fromkeys(range(0, 10000, FAILS_EVERY), "raise"), once)
    return RolloutRunner(chat, sampler, FakeSandboxes(), harnesses, verifier, image_of, 200, 2000, max_attempts=1)
