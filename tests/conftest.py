"""What the whole suite shares: one small checkpoint, one real vLLM server serving it, and a limit on every test's time.

Property tests look at the same examples in every run: a change is judged by what it changed, not by luck. New examples
are searched for by hand, with ``pytest --hypothesis-profile=default``.

The server takes ten seconds and more to start and two processes to run, so there is one per test session. A test that
pushes weights uses ``weight_transport``, which puts the checkpoint's weights back, as version 0, when the test is over.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import pytest
from hypothesis import settings

from north_lightning import seeds
from north_lightning.sampling.client import VLLMSampler
from north_lightning.sampling.sidecar import Sidecar
from north_lightning.sampling.transport import SharedMemoryTransport

TEST_TIMEOUT_S = 600
SERVED_VOCAB_SIZE = 600
SERVED_EOS_TOKEN_ID = 7

settings.register_profile("same_examples", derandomize=True)
settings.load_profile("same_examples")


ALONE = ("callbacks", "faults", "parallel", "recipes", "rollout", "sampling", "sandbox")
"""Folders of tests about processes, their times and what they leave on the machine."""
ALONE_FILES = ("test_interruptions", "test_listeners", "test_threads")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the server is marked ``vllm``, so that ``-m "not vllm"`` runs without it; what needs the machine for
    itself is marked ``alone``: the other tests run two at a time (see the Makefile)."""
    here = Path(__file__).parent
    for item in items:
        if "vllm_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.vllm)
        place = item.path.relative_to(here).parts[0] if item.path.is_relative_to(here) else ""
        if place in ALONE or item.path.stem in ALONE_FILES or item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.alone)


@pytest.fixture(autouse=True)
def no_test_hangs() -> Iterator[None]:
    """A test that waits for something that never comes fails instead of hanging the suite."""

    def give_up(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"the test took more than {TEST_TIMEOUT_S} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, TEST_TIMEOUT_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(autouse=True)
def no_seed_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(seeds.VARIABLE, raising=False)


@pytest.fixture(scope="session")
def vllm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random North written by transformers: five layers, eight experts, a window of 16 keys."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("vllm", reason="the sampler's extra is not installed")
    directory = tmp_path_factory.mktemp("served") / "checkpoint"
    config = transformers.Cohere2MoeConfig(
        vocab_size=SERVED_VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        prefix_dense_intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        num_experts=8,
        num_experts_per_tok=2,
        num_shared_experts=0,
        norm_topk_prob=False,
        expert_selection_fn="sigmoid",
        sliding_window=15,
        layer_types=["full_attention", *["sliding_attention"] * 3, "full_attention"],
        first_k_dense_replace=1,
        prefix_dense_sliding_window_pattern=1,
        max_position_embeddings=4096,
        rope_theta=50000.0,
        rms_norm_eps=1e-6,
        logit_scale=1.0,
        initializer_range=0.1,  # large enough that every mechanism moves the log-probabilities
        pad_token_id=0,
        bos_token_id=5,
        eos_token_id=SERVED_EOS_TOKEN_ID,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    transformers.Cohere2MoeForCausalLM(config).save_pretrained(directory)
    torch.random.set_rng_state(state)
    return directory


@pytest.fixture(scope="session")
def vllm_server(vllm_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """The session's vLLM server, serving ``vllm_checkpoint`` as version 0."""
    sidecar = Sidecar(
        vllm_checkpoint,
        tmp_path_factory.mktemp("vllm") / "server.log",
        max_model_len=2048,
        vocab_size=SERVED_VOCAB_SIZE,
        eos_token_id=SERVED_EOS_TOKEN_ID,
    )
    with sidecar:
        yield sidecar


@pytest.fixture
def vllm_sampler(vllm_server: Sidecar) -> VLLMSampler:
    """A client of the session's server; its connections belong to the test's own event loop."""
    vllm_server.check_alive()
    return VLLMSampler(vllm_server.url, timeout_s=60)


@pytest.fixture
def weight_transport(vllm_server: Sidecar, vllm_checkpoint: Path) -> Iterator[SharedMemoryTransport]:
    """Pushes to the session's server; afterwards the checkpoint's weights are back, as version 0."""
    from safetensors.torch import load_file

    transport = SharedMemoryTransport(vllm_server.url)
    yield transport
    if transport.fenced or transport.last_push is not None:
        transport.push(load_file(vllm_checkpoint / "model.safetensors").items(), 0)
    transport.close()
