"""``python -m north_lightning tokenizer``: trains a small model's tokenizer on the conversations it will be trained on.

In: JSONL files of conversations and the model's config. Out: a tokenizer directory whose ids fit that config.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from north_lightning.chat import ChatFormat, conversation_texts, mine_phrases, train_tokenizer
from north_lightning.data.records import list_files
from north_lightning.data.sources import read_samples
from north_lightning.durable import replace_folder, unfinished_name
from north_lightning.errors import ConfigError
from north_lightning.run_folders import claim
from north_lightning.types import Fraction, Whole
from north_lightning.untrusted import read_json


def train_tokenizer_command(
    files: list[Path],
    output_dir: Path,
    model_config: Path,
    reasoning: bool = False,
    min_fraction: Fraction = 0.001,
    max_phrases: Whole = 400,
    overwrite: bool = False,
) -> None:
    """Train a tokenizer on conversations and check it against a model's config.

    Args:
        files: JSONL files of conversations.
        output_dir: Where tokenizer.json and its companions are written.
        model_config: The model's config.json: vocabulary size and special ids.
        reasoning: Whether the model will think before it acts.
        min_fraction: A phrase that stands in at least this share of the texts becomes one token.
        max_phrases: How many phrases at most.
        overwrite: Move an earlier tokenizer aside, to NAME.1, instead of refusing to replace it.
    """
    if not model_config.is_file():
        raise ConfigError(f"model_config: no file '{model_config}'")
    claim("output_dir", [output_dir], overwrite)
    config = read_json(model_config, ConfigError)
    if not isinstance(config.get("vocab_size"), int):
        raise ConfigError(f"model_config: expected a config.json with a vocab_size, got '{model_config}'")
    if not files:
        raise ConfigError("files: expected at least one, got none")
    conversations = [conversation for file in list_files(files) for conversation in read_samples(file)]
    texts = [text for one in conversations for text in conversation_texts(one.messages, one.tools, reasoning)]
    phrases = mine_phrases(texts, min_fraction=min_fraction, max_phrases=max_phrases)
    unfinished = unfinished_name(output_dir)
    tokenizer = train_tokenizer(texts, phrases, config["vocab_size"], unfinished)
    tokenizer.check(config, str(model_config))
    replace_folder(unfinished, output_dir)
    chat = ChatFormat(tokenizer, reasoning)
    lengths = [len(chat.encode_conversation(one.messages, one.tools).token_ids) for one in conversations]
    num_characters = sum(map(len, texts))
    Console(highlight=False).print(
        f"{output_dir}: {tokenizer.vocab_size} ids, {len(phrases)} phrases; {len(conversations)} conversations of "
        f"{sum(lengths) / len(lengths):.0f} tokens on average, {num_characters / sum(lengths):.1f} characters a token"
    )
