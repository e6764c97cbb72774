"""What the tests of ``export`` share: inputs of runs, and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
from releases import IN_BLOCKS, SERVABLE, make_checkpoint
from small_runs import write_run_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations and a tokenizer."""
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def checkpoint(inputs: Path) -> Path:
    return make_checkpoint(inputs, inputs / "checkpoint", SERVABLE)


@pytest.fixture(scope="session")
def checkpoint_in_blocks(inputs: Path) -> Path:
    """Its experts are made of whole blocks."""
    return make_checkpoint(inputs, inputs / "blocks", IN_BLOCKS)


@pytest.fixture
def unserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check without a vLLM server, which takes ten seconds to start."""
    monkeypatch.setattr("north_lightning.export.agreement.why_not_served", lambda *_: "this test does without")
