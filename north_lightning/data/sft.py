"""Packed batches for supervised fine-tuning: files in, one row of documents per micro-batch out.

Everything is tokenised once when a stage starts and kept in memory; every rank does the same and takes its rows. The
parts (``read_samples``, ``SampleFilter``, ``DeficitMixer``, ``BestFitPacker``) work on streams, so data larger than
memory needs another composition, not other parts. No model here, and no template: ``chat`` renders.

Normalisation. ``batch.num_trained_tokens`` counts the trainable tokens of the *whole optimizer step*: of every
micro-batch that is accumulated and of every rank. The exact loss of a step is the sum of all token losses over that
number. Lightning divides each micro-batch's loss by ``accumulate_grad_batches``, and gradients are averaged over the
ranks that have different rows (``rows_at_once``), so a training step returns
``loss_sum / num_trained_tokens * accumulate_grad_batches * rows_at_once``. Ranks that share a row get the same one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from rich.progress import track

from north_lightning.chat import ChatFormat, NorthTokenizer
from north_lightning.data.batches import move_batch, pack_samples, rows_at_once
from north_lightning.data.filters import SampleFilter
from north_lightning.data.packing import BestFitPacker
from north_lightning.data.sources import read_samples
from north_lightning.data.stream import RowStream
from north_lightning.errors import ConfigError, DataError
from north_lightning.interfaces import ConversationFilter
from north_lightning.types import PackedBatch, TokenizedSample

_log = logging.getLogger(__name__)


@dataclass
class SFTSource:
    """One ingredient of the mix."""

    files: list[Path]
    """JSONL files of conversations."""
    share: float | None = None
    """Share of the trainable tokens; for all sources or for none (then every sample is used once per pass)."""


@dataclass
class SFTDataReport:
    """What became of the files; ``SFTDataModule.report`` after ``setup``."""

    num_samples: dict[str, int] = field(default_factory=dict)  # used, by source
    dropped: dict[str, int] = field(default_factory=dict)  # by "source/reason"
    num_tokens: int = 0
    num_trained_tokens: int = 0
    target_shares: dict[str, float] = field(default_factory=dict)
    achieved_shares: dict[str, float] = field(default_factory=dict)  # of trainable tokens, over the first pass
    rows_per_pass: int = 0
    utilisation: float = 0.0  # of the rows' tokens


class SFTDataModule(LightningDataModule):
    """Conversations by source, mixed by trainable tokens and packed into rows.

    A Lightning epoch is one pass (see ``stream``), rounded up to full optimizer steps with rows of the next pass. Rows
    per optimizer step are ``accumulate_grad_batches`` x ranks; resuming with another split of the same product
    continues the same stream.

    Args:
        tokenizer: directory of the tokenizer.
        sources: the mix, by name; the name labels every document of its files.
        row_tokens: the most tokens of a row, the context length of the stage.
        validation_files: JSONL files of held-out conversations, labelled by their own ``source``.
        reasoning: whether assistant turns begin with thinking.
        seed: decides the order of samples and rows.
        filters: what drops samples, in order; None for ``filters.default_filters()``.
        buffer_samples: documents the packer chooses from.
    """

    def __init__(
        self,
        tokenizer: Path,
        sources: dict[str, SFTSource],
        row_tokens: int,
        validation_files: list[Path] | None = None,
        reasoning: bool = True,
        seed: int = 0,
        filters: list[ConversationFilter] | None = None,
        buffer_samples: int = 4096,
    ) -> None:
        super().__init__()
        given = [name for name, source in sources.items() if source.share is not None]
        if not sources or len(given) not in (0, len(sources)):
            missing = sorted(set(sources) - set(given))
            raise ConfigError(f"sources: expected a share for every source or for none; missing for {missing or 'all'}")
        self.tokenizer = Path(tokenizer)
        self.sources = sources
        self.row_tokens = row_tokens
        self.validation_files = validation_files or []
        self.reasoning = reasoning
        self.seed = seed
        self.filters = filters
        self.buffer_samples = buffer_samples
        self.report = SFTDataReport()
        self._samples: list[TokenizedSample] = []
        self._validation: list[TokenizedSample] = []
        self._stream: RowStream | None = None
        self._loader: SFTLoader | None = None
        self._resume_from: Mapping[str, Any] | None = None

    def setup(self, stage: str) -> None:
        if stage == "fit" and self._stream is None:
            self._setup_training()
        if stage in ("fit", "validate") and not self._validation:
            for path in self.validation_files:
                self._validation += self._tokenise(path, None, Counter())

    def train_dataloader(self) -> SFTLoader:
        assert self._stream is not None, "Lightning calls setup first"
        trainer = self.trainer
        accumulate = 1 if trainer is None else trainer.accumulate_grad_batches
        self._loader = SFTLoader(self._samples, self._stream, accumulate, *rows_at_once(trainer))
        if self._resume_from is not None:
            self._loader.load_state_dict(self._resume_from)
            self._resume_from = None
        return self._loader

    def val_dataloader(self) -> ValidationLoader:
        """Rows of held-out samples; ``num_trained_tokens`` is each row's own, ranks take turns.

        All get equally many, because a model in parts is computed by all ranks together: where rows run out, the first
        one again, with nothing of it trained.
        """
        packer = BestFitPacker(self.row_tokens, self.buffer_samples)
        rows = list(packer.pack((i, len(sample.token_ids)) for i, sample in enumerate(self._validation)))
        world_size, rank = rows_at_once(self.trainer)
        picked = [[self._validation[i] for i in row] for row in rows[rank::world_size]]
        batches = [pack_samples(samples, _count_trained(samples)) for samples in picked]
        if len(batches) < -(-len(rows) // world_size):
            spare = pack_samples([self._validation[i] for i in rows[0]], 0)
            batches.append(replace(spare, loss_mask=torch.zeros_like(spare.loss_mask)))
        return ValidationLoader(batches)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return move_batch(batch, device) if isinstance(batch, PackedBatch) else batch

    def state_dict(self) -> dict[str, Any]:
        """The loader's. Lightning saves that too, but does not restore it from a checkpoint at the end of an epoch."""
        return {} if self._loader is None else {"loader": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume_from = state_dict.get("loader")

    def _setup_training(self) -> None:
        dropped: Counter[str] = Counter()
        numbers: dict[str, range] = {}
        for name, source in self.sources.items():
            first = len(self._samples)
            for path in source.files:
                self._samples += self._tokenise(path, name, dropped)
            numbers[name] = range(first, len(self._samples))
            if not numbers[name]:
                raise DataError(f"source {name}: expected usable samples, found none; dropped: {dict(dropped)}")
        trained = [sum(sample.loss_mask) for sample in self._samples]
        shares = {name: source.share for name, source in self.sources.items() if source.share is not None}
        lengths = [len(sample.token_ids) for sample in self._samples]
        self._stream = RowStream(
            lengths, trained, numbers, shares or None, self.row_tokens, self.seed, self.buffer_samples
        )
        total = sum(shares.values())
        self.report = SFTDataReport(
            num_samples={name: len(indices) for name, indices in numbers.items()},
            dropped=dict(dropped),
            num_tokens=sum(lengths),
            num_trained_tokens=sum(trained),
            target_shares={name: share / total for name, share in shares.items()},
            achieved_shares=self._stream.pass_shares,
            rows_per_pass=self._stream.rows_per_pass,
            utilisation=self._stream.utilisation,
        )
        _log.info("SFT data: %s", self.report)

    def _tokenise(self, path: Path, source: str | None, dropped: Counter[str]) -> list[TokenizedSample]:
        """Usable samples of a file; what is not used is counted in ``dropped`` as ``source/reason``."""
        chat = ChatFormat(NorthTokenizer.load(self.tokenizer), self.reasoning)
        fit = SampleFilter(self.filters)
        kept = []
        conversations = list(read_samples(path))
        quiet = self.trainer is not None and self.trainer.global_rank != 0
        for conversation in track(list(fit(conversations)), f"Tokenising {Path(path).name}", disable=quiet):
            label = conversation.source if source is None else source
            try:
                sample = chat.encode_conversation(conversation.messages, conversation.tools, label)
            except DataError as error:
                fit.dropped["not_renderable"] += 1
                _log.warning("%s: a sample cannot be rendered: %s", path, error)
                continue
            if len(sample.token_ids) > self.row_tokens:
                fit.dropped["too_long"] += 1
            elif not any(sample.loss_mask):
                fit.dropped["nothing_to_train"] += 1
            else:
                assert not sample.loss_mask[0], "a conversation begins with a control token that nothing predicts"
                kept.append(sample)
        dropped.update({f"{source or path}/{reason}": count for reason, count in fit.dropped.items()})
        if fit.dropped:
            _log.warning("%s: dropped %s of %d samples", path, dict(fit.dropped), len(conversations))
        return kept


def _count_trained(samples: Sequence[TokenizedSample]) -> int:
    return sum(sum(sample.loss_mask) for sample in samples)


class ValidationLoader:
    """A fixed list of rows. Not a list, because Lightning would take every row for a loader."""

    def __init__(self, rows: Sequence[PackedBatch]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[PackedBatch]:
        return iter(self._rows)


class SFTLoader:
    """One epoch of micro-batches for one rank; sized, and exact on resume.

    Sized, because Lightning fetches one batch ahead of an unsized loader and would lose it on resume. Micro-batch ``m``
    of step ``s`` on rank ``r`` is row ``(s * accumulate + m) * world_size + r`` of the stream.

    Args:
        samples: what the stream's numbers mean.
        stream: rows of sample numbers.
        accumulate: micro-batches per optimizer step.
        world_size: number of ranks that get different rows.
        rank: this one among them.
    """

    def __init__(
        self,
        samples: Sequence[TokenizedSample],
        stream: RowStream,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
    ) -> None:
        self._samples, self._stream = samples, stream
        self._rows_per_step = accumulate * world_size
        self._world_size, self._rank = world_size, rank
        self._length = -(-stream.rows_per_pass // self._rows_per_step) * accumulate
        self._row = 0  # of the stream, the next to be given to any rank
        self._batch = 0  # micro-batches given in this epoch
        self._resumed = False

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[PackedBatch]:
        if not self._resumed or self._batch >= self._length:
            self._batch = 0
        self._resumed = False
        while self._batch < self._length:
            batch = self._make_batch()
            self._row += self._world_size
            self._batch += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position and what the stream is made of."""
        rows_of_epoch = self._batch * self._world_size
        return {"row": self._row, "rows_of_epoch": rows_of_epoch, "stream": self._stream.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the last batch given; ``DataError`` where that cannot be the same stream."""
        if state["stream"] != self._stream.fingerprint:
            raise DataError(
                "resume: expected the data, row_tokens, shares and seed of the checkpoint, got others; restore them, "
                "or start a new stage from the checkpoint's weights"
            )
        if state["row"] % self._rows_per_step:
            raise DataError(
                f"resume: expected a checkpoint between optimizer steps of {self._rows_per_step} rows, got one after "
                f"{state['row']} rows; its accumulated gradients are lost, use another checkpoint"
            )
        self._row = int(state["row"])
        self._batch = int(state["rows_of_epoch"]) // self._world_size
        self._resumed = True

    def _make_batch(self) -> PackedBatch:
        first = self._row - self._row % self._rows_per_step
        trained = sum(self._stream.count_trained(row) for row in range(first, first + self._rows_per_step))
        row = self._stream[self._row + self._rank]
        return pack_samples([self._samples[number] for number in row], trained)
