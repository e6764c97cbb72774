"""One small tokenizer for all chat tests."""

import random

import pytest
from chat_corpus import TOOLS, conversation

from north_lightning.chat import NorthTokenizer, conversation_texts, mine_phrases, train_tokenizer


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    rng = random.Random(0)
    return [text for _ in range(500) for text in conversation_texts(conversation(rng), TOOLS)]


@pytest.fixture(scope="session")
def phrases(corpus: list[str]) -> list[str]:
    return mine_phrases(corpus, min_fraction=0.005)


@pytest.fixture(scope="session")
def tokenizer(corpus, phrases, tmp_path_factory) -> NorthTokenizer:
    return train_tokenizer(corpus, phrases, 1400, tmp_path_factory.mktemp("tokenizer"))
