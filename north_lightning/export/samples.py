"""Token ids to compare two models on: trajectories of a run, or a small conversation.

In: files of rollouts or of conversations, or the place of a checkpoint in a run's folder. Out: rows of token ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from north_lightning.chat import ChatFormat, NorthTokenizer
from north_lightning.data.records import decode, read_records
from north_lightning.data.sources import sample_from_json
from north_lightning.errors import DataError
from north_lightning.rollout.records import rollout_of
from north_lightning.types import Message, ToolSpec

NUM_ROWS, ROW_TOKENS = 16, 512
_CONVERSATION = (
    Message("user", "List the files of the directory, then say how many there are."),
    Message("assistant", "There are two files: a.txt and b.txt.", "Two names came back."),
)


def sample_rows(files: Sequence[Path] | None, checkpoint: Path, tokenizer: Path) -> list[list[int]]:
    """Up to 16 rows of up to 512 tokens.

    Args:
        files: of rollouts or conversations; None: those of the run whose folder ``checkpoint`` lies in, if any.
        checkpoint: of a run.
        tokenizer: folder of the model's tokenizer.

    Raises:
        DataError: a named file is missing, or none holds either.
    """
    chat = ChatFormat(NorthTokenizer.load(tokenizer), reasoning=True)
    named = files if files is not None else _files_of_run(checkpoint)
    rows = list(islice(_rows(chat, named), NUM_ROWS)) if named else []
    if files and not rows:
        raise DataError(f"samples: expected trajectories, found none in '{files[0]}'")
    return rows or [chat.encode_conversation(_CONVERSATION, ()).token_ids]


def _rows(chat: ChatFormat, files: Sequence[Path]) -> Iterator[list[int]]:
    try:
        for _, content in read_records(files):
            with suppress(DataError, KeyError):  # another kind of record, or a model's turn that has no form
                messages, tools = _conversation(decode(content))
                yield chat.encode_conversation(messages, tools).token_ids[:ROW_TOKENS]
    except DataError as error:
        raise DataError(f"samples: {error}") from error


def _conversation(record: Any) -> tuple[Sequence[Message], Sequence[ToolSpec]]:
    if "group_id" in record:  # a rollout's
        return rollout_of(record).messages, ()
    sample = sample_from_json(record)
    return sample.messages, sample.tools


def _files_of_run(checkpoint: Path) -> list[Path]:
    """Rollouts of the run, or the conversations that its config names."""
    for run in checkpoint.absolute().parents[:3]:
        if (run / "rollouts.jsonl").is_file():
            return [run / "rollouts.jsonl"]
        if (run / "config.yaml").is_file():
            data = yaml.safe_load((run / "config.yaml").read_text()).get("data") or {}
            sources = (data.get("init_args") or {}).get("sources") or {}
            files = [Path(file) for source in sources.values() for file in source.get("files", [])]
            return [file for file in files if file.is_file()]
    return []
