"""``python -m north_lightning data filter``: raw trajectories to samples fit to train on, and an account of the rest.

In: sources, each with its files and format. Out: ``<output_dir>/<source>.jsonl`` of canonical samples, and
``filter.json``: what was read (and in which formats), broken, not understood, changed, kept, dropped and retold, for
which reasons, with examples. It streams: nothing
but fingerprints is held in memory. Shares and packing are for ``mixing`` and ``packing``.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from north_lightning.data.block_lists import SHIPPED, load_block_list
from north_lightning.data.decontamination import all_leaks
from north_lightning.data.dedup import Duplicate
from north_lightning.data.filters import SampleFilter, default_filters
from north_lightning.data.formats import Trajectories
from north_lightning.data.records import list_files
from north_lightning.data.sources import SampleReader, write_samples
from north_lightning.durable import replace_text
from north_lightning.errors import ConfigError, RetellingError
from north_lightning.interfaces import ConversationFilter, ConversationImporter, ConversationVariation
from north_lightning.run_folders import claim
from north_lightning.seeds import derive_seed
from north_lightning.types import Conversation, Fraction, Whole

NUM_BROKEN_SHOWN = 20


@dataclass
class RawSource:
    """Files of conversations."""

    files: list[str]
    """Paths, URLs or patterns with ``*``: .jsonl, .json, .traj, .eval or .parquet."""
    importer: ConversationImporter | None = None
    """What reads the records; by default ``Trajectories``, which finds out their format."""
    max_broken: Whole = 0
    """So many records may be unreadable; one more is an error."""


def filter_data(
    sources: dict[str, RawSource],
    output_dir: Path,
    filters: list[ConversationFilter] | None = None,
    block_lists: list[str] = list(SHIPPED),  # noqa: B006 (read only)
    min_similarity: Fraction | None = 0.9,
    variations: list[ConversationVariation] | None = None,
    seed: int = 0,
    strict: bool = False,
    overwrite: bool = False,
) -> None:
    """Read sources, drop what is faulty, leaked or seen before, and write the rest.

    Args:
        sources: What to read, by name.
        output_dir: Where <source>.jsonl and filter.json are written.
        filters: What drops samples, in order; by default every filter that needs no setting.
        block_lists: Benchmarks to keep out: shipped lists (swe_bench, swe_bench_pro) or files from `data blocklist`.
        min_similarity: From which similarity on a conversation is a duplicate, of any source; null keeps duplicates.
        variations: Each kept sample is retold by the first of these that knows it and can.
        seed: Seed of the variations and of the hashes that find duplicates.
        strict: Count a record as broken that has a key which is not understood; without, filter.json lists such keys.
        overwrite: Move an earlier result aside, to NAME.1, instead of refusing to replace it.
    """
    if not sources:
        raise ConfigError("sources: expected at least one, got none")
    written = {(output_dir / f"{name}.jsonl").resolve() for name in sources}
    for name, source in sources.items():  # before hours of work
        if clash := written & {Path(file).resolve() for file in list_files(source.files)}:
            raise ConfigError(f"output_dir: expected a folder without the files of {name}, got {min(clash)} to replace")
    for name in block_lists:
        load_block_list(name)
    claim("output_dir", [*sorted(written), output_dir / "filter.json"], overwrite)
    checks = default_filters() if filters is None else list(filters)
    checks += all_leaks(block_lists) if block_lists else []
    checks += [] if min_similarity is None else [Duplicate(min_similarity, seed=seed)]
    account: dict[str, Any] = {"sources": {}, "examples": {}}
    for name, source in sources.items():
        importer = source.importer or Trajectories()
        importer.strict = strict
        reader = SampleReader(source.files, importer, source.max_broken)
        fit = SampleFilter(checks)
        labelled = (sample if sample.source else replace(sample, source=name) for sample in reader)
        told: Counter[str] = Counter()
        retold = (
            _retell(sample, variations or [], derive_seed(seed, name, number), told)
            for number, sample in enumerate(fit(labelled))
        )
        write_samples(output_dir / f"{name}.jsonl", retold)
        account["sources"][name] = {
            "read": reader.num_read,
            "broken": len(reader.broken),
            "broken_records": reader.broken[:NUM_BROKEN_SHOWN],
            **importer.account(),
            "kept": fit.kept,
            "dropped": dict(fit.dropped),
            "retold": dict(told),
        }
        for reason, examples in fit.examples.items():
            account["examples"].setdefault(reason, []).extend(examples)
    content = json.dumps(account, indent=1, ensure_ascii=False) + "\n"
    replace_text(output_dir / "filter.json", content)
    _print(account, output_dir)


def _retell(
    sample: Conversation, variations: list[ConversationVariation], seed: int, told: Counter[str]
) -> Conversation:
    """The sample, retold if a variation can; ``told`` counts who did, and for which reason one could not."""
    for variation in variations:
        name = type(variation).__name__
        try:
            one = variation.vary(sample, seed)
        except RetellingError as error:
            told[f"not by {name}: {error.reason}"] += 1
            continue
        if one is not None:
            told[f"by {name}"] += 1
            return one
    return sample


def _print(account: dict[str, Any], output_dir: Path) -> None:
    table = Table(
        "source",
        "format",
        "read",
        "broken",
        "kept",
        "dropped",
        "retold",
        title=f"{output_dir}/filter.json",
        title_justify="left",
    )
    for name, counts in account["sources"].items():
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(counts["dropped"].items()))
        told = ", ".join(f"{what} {count}" for what, count in sorted(counts["retold"].items()))
        numbers = (str(counts[key]) for key in ("read", "broken", "kept"))
        formats = ", ".join(counts.get("formats", {})) or "own"
        table.add_row(name, formats, *numbers, reasons or "nothing", told or "nothing")
    console = Console(highlight=False)
    console.print(table)
    for name, counts in account["sources"].items():
        if unread := counts.get("not_understood"):
            shown = ", ".join(f"{key} {count}" for key, count in list(unread.items())[:8])
            console.print(f"{name}: {len(unread)} keys were not understood: {shown}", soft_wrap=True)
