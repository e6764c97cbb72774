"""``python -m north_lightning data preview``: a packed row in the terminal, coloured by what is trained.

In: the data of a training config. Out: the documents of one row as the model will see them, control tokens included.
What the model learns to produce is green; everything else is grey.
"""

from __future__ import annotations

from itertools import groupby, pairwise

from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from rich.text import Text

from north_lightning.chat import NorthTokenizer
from north_lightning.data.sft import SFTDataModule
from north_lightning.errors import printable
from north_lightning.types import Count, PackedBatch, Whole

TRAINED, CONTEXT = "bold green", "bright_black"


def preview_data(
    data: SFTDataModule, row: Whole = 0, rows_per_step: Count = 1, max_tokens: Count | None = 2000
) -> None:
    """Print one row of the training.

    Args:
        data: As in the training config.
        row: Its number, counted from the first step's first row.
        rows_per_step: Rows of an optimizer step: micro-batches x ranks.
        max_tokens: Of every document, at most so many tokens are shown; null shows all.
    """
    data.check_run(None, None, data)
    data.setup("fit")
    stream = data.make_stream(rows_per_step)
    for _ in range(row // rows_per_step + 1):
        step = stream.next_step()
    batch = data.store.pack(step[row % rows_per_step])
    print_row(batch, NorthTokenizer.load(data.tokenizer), data.row_tokens, Console(highlight=False), max_tokens)


def print_row(
    batch: PackedBatch, tokenizer: NorthTokenizer, row_tokens: int, console: Console, max_tokens: int | None = None
) -> None:
    """Every document under a line that names its source and counts its tokens."""
    num_tokens, num_trained = len(batch.token_ids), int(batch.loss_mask.sum())
    legend = Text.assemble(("trained", TRAINED), " and ", ("context", CONTEXT))
    console.print(
        f"{len(batch.sources)} documents, {num_tokens} tokens of {row_tokens} ({num_tokens / row_tokens:.1%}), "
        f"{num_trained} trained:",
        legend,
    )
    for source, (start, end) in zip(batch.sources, pairwise(batch.cu_seqlens.tolist()), strict=True):
        token_ids, mask = batch.token_ids[start:end].tolist(), batch.loss_mask[start:end].tolist()
        title = f"{escape(printable(source))}: {len(token_ids)} tokens, {sum(mask)} trained"
        console.print(Rule(title, align="left", style=CONTEXT))
        console.print(colour(token_ids[:max_tokens], mask[:max_tokens], tokenizer))
        if max_tokens is not None and len(token_ids) > max_tokens:
            console.print(f"... {len(token_ids) - max_tokens} more tokens")


def colour(token_ids: list[int], loss_mask: list[bool], tokenizer: NorthTokenizer) -> Text:
    """The decoded text; terminal control characters in it are shown, not obeyed."""
    text = Text()
    for trained, run in groupby(zip(token_ids, loss_mask, strict=True), key=lambda pair: pair[1]):
        decoded = tokenizer.decode([token_id for token_id, _ in run])
        text.append(printable(decoded), TRAINED if trained else CONTEXT)
    return text
