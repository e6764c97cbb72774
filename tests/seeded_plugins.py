"""A sidecar that answers by the seed of the request, and a verifier that scores by the answer."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from north_lightning.chat import ChatFormat, NorthTokenizer
from north_lightning.faults import FakeSidecar, FakeVLLM
from north_lightning.interfaces import RewardVerifier, SandboxProvider
from north_lightning.types import Message, Reward, Rollout, Task

ANSWERS = [f"answer {number}" for number in range(10)]


class AnsweringSidecar(FakeSidecar):
    def make_server(self, port: int) -> FakeVLLM:
        chat = ChatFormat(NorthTokenizer.load(self.model_dir), reasoning=False)

        def reply(request: Mapping[str, Any]) -> list[int]:
            answer = random.Random(request["sampling_params"]["seed"]).choice(ANSWERS)
            sample = chat.encode_conversation([Message("user", ""), Message("assistant", answer)], ())
            return [token for token, is_said in zip(sample.token_ids, sample.loss_mask, strict=True) if is_said]

        return FakeVLLM(reply, port=port)


class OddAnswer(RewardVerifier):
    async def verify(self, task: Task, rollout: Rollout, workdir: Path, sandboxes: SandboxProvider) -> Reward:
        return Reward(float(rollout.messages[-1].content[-1] in "13579"))
