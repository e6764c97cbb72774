"""One small tokenizer for all rollout tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from rollout_fakes import load_chat, make_tokenizer

from north_lightning.chat import ChatFormat


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def chat(tokenizer_dir: Path) -> ChatFormat:
    return load_chat(tokenizer_dir)
