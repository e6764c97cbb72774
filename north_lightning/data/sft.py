"""Packed batches for supervised fine-tuning: files in, one row of documents per micro-batch out.

Everything is tokenised once, when a stage starts: by every process for itself and in memory, or, with ``cache_dir``, by
all processes together and for later runs too. Then every process takes its rows. No model here, and no template:
``chat`` renders.

Normalisation. ``batch.num_trained_tokens`` counts the trainable tokens of the *whole optimizer step*: of every
micro-batch that is accumulated and of every rank; ``batch.num_documents`` its conversations. The exact loss of a step
is the sum of all token losses over the first, or the sum of all conversations' means over the second. Lightning divides
each micro-batch's loss by ``accumulate_grad_batches``, and gradients are averaged over the ranks that have different
rows (``rows_at_once``), so a training step returns
``loss_sum / num_trained_tokens * accumulate_grad_batches * rows_at_once``. Ranks that share a row get the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule

from north_lightning.data.batches import move_batch, rows_at_once
from north_lightning.data.loader import SFTLoader, ValidationLoader
from north_lightning.data.mixing import Order
from north_lightning.data.packing import BestFitPacker
from north_lightning.data.records import list_files
from north_lightning.data.sources import SampleReader
from north_lightning.data.store import TokenStore
from north_lightning.data.stream import StepStream
from north_lightning.data.tokenised import Account, Tokeniser
from north_lightning.errors import ConfigError, DataError
from north_lightning.interfaces import ConversationFilter
from north_lightning.seeds import run_seed
from north_lightning.types import Count, PackedBatch, Positive, Whole

_log = logging.getLogger(__name__)


@dataclass
class SFTSource:
    """One ingredient of the mix."""

    files: list[Path]
    """JSONL files of conversations, or patterns with ``*``."""
    share: Positive | None = None
    """Share of the trainable tokens; for all sources or for none (then every sample is used once per pass)."""
    max_epochs: Positive | None = None
    """How often one pass may go through the source; the pass ends where that is used up. Needs shares."""
    max_samples: Count | None = None
    """Use so many of its samples, chosen by the seed."""
    group: str = ""
    """What the recipe calls it (agentic, code): reports add up the sources of a group."""


@dataclass
class SourceReport(Account):
    """What became of a source's files."""

    num_samples: int = 0  # used
    num_tokens: int = 0
    num_trained_tokens: int = 0


class SFTDataModule(LightningDataModule):
    """Conversations by source, mixed by trainable tokens and packed into rows.

    A Lightning epoch is one pass (see ``stream``), rounded up to full optimizer steps with rows of the next pass. Rows
    per optimizer step are ``accumulate_grad_batches`` x ranks with different rows; resuming with another split of the
    same product continues the same stream.

    Args:
        tokenizer: directory of the tokenizer.
        sources: the mix, by name; the name labels every document of its files.
        row_tokens: the most tokens of a row, the context length of the stage.
        validation_files: JSONL files of held-out conversations, labelled by their own ``source``.
        reasoning: whether assistant turns begin with thinking.
        seed: decides the order of samples and rows; the run's ``seed_everything`` by default.
        filters: what drops samples, in order; None for ``filters.default_filters()``.
        buffer_samples: samples of each source that are held to choose from.
        order: of the samples of a source: random, or from short to long.
        num_workers: processes that make batches ahead of the training; 0 makes them when they are needed.
        cache_dir: folder for tokens, on a file system that all processes share: each tokenises its part of the records,
            once for all runs with the same files, tokenizer and filters, and reads the rest from there. What is no
            longer used is yours to delete. None: all processes tokenise everything and keep it in memory.
    """

    def __init__(
        self,
        tokenizer: Path,
        sources: dict[str, SFTSource],
        row_tokens: Count,
        validation_files: list[Path] | None = None,
        reasoning: bool = True,
        seed: int | None = None,
        filters: list[ConversationFilter] | None = None,
        buffer_samples: Count = 256,
        order: Order = "random",
        num_workers: Whole = 0,
        cache_dir: Path | None = None,
    ) -> None:
        super().__init__()
        given = [name for name, source in sources.items() if source.share is not None]
        if not sources or len(given) not in (0, len(sources)):
            missing = sorted(set(sources) - set(given))
            raise ConfigError(f"sources: expected a share for every source or for none; missing for {missing or 'all'}")
        for name, source in sources.items():
            for key in ("share", "max_epochs", "max_samples"):
                value = getattr(source, key)
                if value is not None and not 0 < value < float("inf"):
                    raise ConfigError(f"sources.{name}.{key}: expected more than 0, got {value}")
            if source.max_epochs is not None and not given:
                raise ConfigError(f"sources.{name}.max_epochs: expected shares beside it; without, a pass is one epoch")
        self.tokenizer = Path(tokenizer)
        self.sources = sources
        self.row_tokens = row_tokens
        self.validation_files = validation_files or []
        self.reasoning = reasoning
        self.seed = seed
        self.filters = filters
        self.buffer_samples = buffer_samples
        self.order = order
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.store = TokenStore()
        self.reports: dict[str, SourceReport] = {}
        self._numbers: dict[str, np.ndarray] = {}
        self._validation: TokenStore | None = None
        self._loader: SFTLoader | None = None
        self._resume_from: Mapping[str, Any] | None = None

    def check_run(self, trainer: object, module: object, data: object) -> None:
        """Refuse shares that do not sum to 1, and files that are not there, before any is tokenized."""
        given = [source.share for source in self.sources.values() if source.share is not None]
        if given and abs(sum(given) - 1) > 1e-3:
            raise ConfigError(f"data.sources: expected shares that sum to 1, got {sum(given):g}")
        owners: dict[str, str] = {}
        for name, source in self.sources.items():
            if not source.files:
                raise ConfigError(f"data.sources.{name}.files: expected at least one file, got none")
            for file in list_files(source.files):
                if file in owners:
                    raise ConfigError(
                        f"data.sources.{name}.files: expected each file once, got '{file}', which sources."
                        f"{owners[file]} has already"
                    )
                owners[file] = name
                if Path(file).is_file():  # a remote one is read once, in its turn
                    next(iter(SampleReader([file])), None)
        for file in list_files(self.validation_files):
            if file in owners:
                _log.warning("data.validation_files: %s is trained on too: no held-out loss comes of it", file)

    @property
    def shares(self) -> dict[str, float] | None:
        """The sources' shares of the trainable tokens, summing to 1; None where none are given."""
        given = {name: source.share for name, source in self.sources.items() if source.share is not None}
        return {name: share / sum(given.values()) for name, share in given.items()} or None

    def setup(self, stage: str) -> None:
        reads_sources = stage == "fit" and not self._numbers
        reads_validation = stage in ("fit", "validate") and self._validation is None
        files = [path for source in self.sources.values() for path in source.files] if reads_sources else []
        self._fill_cache(files + self.validation_files * reads_validation)
        if reads_sources:
            for name, source in self.sources.items():
                self._numbers[name] = self._read_source(name, source)
        if reads_validation:
            self._validation = TokenStore()
            for path in list_files(self.validation_files):
                self._add_file(Path(path), None, self._validation, SourceReport())

    def make_stream(self, rows_per_step: int) -> StepStream:
        """The steps of a training run, from the first."""
        return StepStream(
            self.store.lengths,
            self.store.trained_tokens,
            self._numbers,
            self.shares,
            self.row_tokens,
            run_seed(self.seed),
            rows_per_step,
            self.buffer_samples,
            self.order,
            {name: source.max_epochs for name, source in self.sources.items() if source.max_epochs is not None},
        )

    def train_dataloader(self) -> SFTLoader:
        assert self._numbers, "Lightning calls setup first"
        trainer = self.trainer
        accumulate = 1 if trainer is None else trainer.accumulate_grad_batches
        world_size, rank = rows_at_once(trainer)
        stream = self.make_stream(accumulate * world_size)
        repeat = trainer is not None and trainer.overfit_batches > 0  # type: ignore[attr-defined]
        self._loader = SFTLoader(self.store, stream, accumulate, world_size, rank, self.num_workers, repeat)
        if self._resume_from is not None:
            self._loader.load_state_dict(self._resume_from)
            self._resume_from = None
        return self._loader

    def val_dataloader(self) -> ValidationLoader:
        """Rows of held-out samples; the counts are each row's own, ranks take turns.

        All get equally many, because a model in parts is computed by all ranks together: where rows run out, the first
        one again, with nothing of it trained.
        """
        assert self._validation is not None, "Lightning calls setup first"
        packer = BestFitPacker(self.row_tokens)
        rows = list(packer.pack(enumerate(self._validation.lengths.tolist())))
        world_size, rank = rows_at_once(self.trainer)
        batches = [self._validation.pack(row) for row in rows[rank::world_size]]
        if len(batches) < -(-len(rows) // world_size):
            spare = self._validation.pack(rows[0], num_trained_tokens=0)
            batches.append(replace(spare, loss_mask=torch.zeros_like(spare.loss_mask)))
        return ValidationLoader(batches)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return move_batch(batch, device) if isinstance(batch, PackedBatch) else batch

    def state_dict(self) -> dict[str, Any]:
        """The loader's. Lightning saves that too, but does not restore it from a checkpoint at the end of an epoch."""
        return {} if self._loader is None else {"loader": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume_from = state_dict.get("loader")

    def _read_source(self, name: str, source: SFTSource) -> np.ndarray:
        """Numbers of the samples in the store that the source may use."""
        first, report = len(self.store), SourceReport()
        for path in list_files(source.files):
            self._add_file(Path(path), name, self.store, report)
        numbers = np.arange(first, len(self.store))
        if source.max_samples is not None and source.max_samples < len(numbers):
            chosen = np.random.default_rng(run_seed(self.seed)).permutation(len(numbers))[: source.max_samples]
            report.dropped["max_samples"] = len(numbers) - len(chosen)
            numbers = np.sort(numbers[chosen])
        if not len(numbers):
            reasons = {f"{name}/{reason}": count for reason, count in report.dropped.items()}
            too_long = f"; data.row_tokens: expected more than {self.row_tokens}" if report.dropped["too_long"] else ""
            raise DataError(
                f"data.sources.{name}: expected at least one usable sample, found none; dropped: {reasons}{too_long}"
            )
        report.num_samples = len(numbers)
        report.num_tokens = int(self.store.lengths[numbers].sum())
        report.num_trained_tokens = int(self.store.trained_tokens[numbers].sum())
        self.reports[name] = report
        return numbers

    def _add_file(self, path: Path, source: str | None, store: TokenStore, report: SourceReport) -> None:
        """Add the usable samples of a file to ``store``, and what is not used to ``report``."""
        file = self._tokeniser.read(path, quiet=self.trainer is not None and self.trainer.global_rank != 0)
        for number in range(len(file.store)):
            store.take(file.store, number, source)
        report.add(file.account)
        if file.account.dropped:
            _log.warning("%s: dropped %s of %d samples", path, dict(file.account.dropped), file.account.num_read)

    def _fill_cache(self, files: list[Path]) -> None:
        if self.trainer is None:
            self._tokeniser.fill_cache(list(map(Path, list_files(files))))
        elif self.cache_dir is not None:
            try:
                found = list(map(Path, list_files(files)))
                self._tokeniser.fill_cache(found, self.trainer.global_rank, self.trainer.world_size)
            finally:  # if it failed here, the others find a part missing
                self.trainer.strategy.barrier("tokens")

    @cached_property
    def _tokeniser(self) -> Tokeniser:
        return Tokeniser(self.tokenizer, self.reasoning, self.row_tokens, self.filters, self.cache_dir)
