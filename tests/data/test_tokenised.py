"""Tokens kept in a folder: the same as without it, whoever made which part, and never stale."""

import random

import pytest
from test_sft_data import agentic, make, plain, tokenizer_dir  # noqa: F401 (fixtures)

from north_lightning.chat import train_tokenizer
from north_lightning.data import Conversation, SFTDataModule, SFTSource, write_samples
from north_lightning.data.decontamination import RepositoryLeak
from north_lightning.data.dedup import Duplicate
from north_lightning.data.filters import ErroneousWhitespace, RepetitionLoop, TooLong
from north_lightning.data.tokenised import Tokeniser
from north_lightning.errors import ConfigError, DataError
from north_lightning.types import Message


@pytest.fixture
def samples(tmp_path):
    mixed = [plain(i, 2 + i % 9) if i % 3 else agentic(i) for i in range(23)]
    mixed[5] = Conversation((Message("user", "q"), Message("assistant", "ends in a blank ")))
    mixed[11] = plain(11, 500)
    path = tmp_path / "mixed.jsonl"
    write_samples(path, mixed)
    return path


def content(file):
    store = file.store
    rows = [store.pack([number]) for number in range(len(store))]
    tokens = [(row.token_ids.tolist(), row.loss_mask.tolist(), row.sources) for row in rows]
    return tokens, store.harnesses, store.lengths.tolist(), store.trained_tokens.tolist(), file.account.dropped


def fill(tokenizer, path, folder, world_size, **settings):
    ranks = list(range(world_size))
    random.Random(0).shuffle(ranks)
    for rank in ranks:
        Tokeniser(tokenizer, True, 600, cache_dir=folder, **settings).fill_cache([path], rank, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_parts_of_any_number_of_processes_are_the_file(samples, tokenizer_dir, tmp_path, world_size):  # noqa: F811
    whole = Tokeniser(tokenizer_dir, True, 600).read(samples)
    assert whole.account.dropped == {"erroneous_whitespace": 1, "too_long": 1}
    fill(tokenizer_dir, samples, tmp_path / "cache", world_size)
    joined = Tokeniser(tokenizer_dir, True, 600, cache_dir=tmp_path / "cache").read(samples)
    assert content(joined) == content(whole)
    assert joined.records == whole.records == [i for i in range(23) if i not in (5, 11)]
    assert joined.account.num_read == 23


def test_a_run_with_the_folder_is_the_run_without_and_reads_conversations_once(make, tmp_path, monkeypatch):  # noqa: F811
    def steps(data):
        batches = list(data.train_dataloader())
        return [(b.token_ids.tolist(), b.loss_mask.tolist(), b.sources, b.num_trained_tokens) for b in batches]

    without = make((0.5, 0.5))
    expected = steps(without)
    first = make((0.5, 0.5), cache_dir=tmp_path / "cache")
    assert steps(first) == expected
    monkeypatch.delattr("north_lightning.data.tokenised.SampleReader")
    data = SFTDataModule(first.tokenizer, first.sources, 600, cache_dir=tmp_path / "cache")
    data.setup("fit")
    assert steps(data) == expected
    assert data.reports == without.reports


def test_everything_that_decides_the_tokens_names_them(samples, tokenizer_dir, tmp_path):  # noqa: F811
    other_tokenizer = tmp_path / "other"
    train_tokenizer(["other words and letters " * 5], [], 380, other_tokenizer)

    class Loop(RepetitionLoop):
        pass

    settings = {
        "as it is": (tokenizer_dir, True, 600, [RepetitionLoop()]),
        "tokenizer": (other_tokenizer, True, 600, [RepetitionLoop()]),
        "reasoning": (tokenizer_dir, False, 600, [RepetitionLoop()]),
        "length": (tokenizer_dir, True, 500, [RepetitionLoop()]),
        "filters": (tokenizer_dir, True, 600, [RepetitionLoop(), ErroneousWhitespace()]),
        "filter's setting": (tokenizer_dir, True, 600, [RepetitionLoop(max_calls=4)]),
        "filter's code": (tokenizer_dir, True, 600, [Loop()]),
    }
    entries = {name: Tokeniser(*one, cache_dir=tmp_path / "c")._entry(samples) for name, one in settings.items()}
    again = Tokeniser(*settings["as it is"], cache_dir=tmp_path / "c")
    assert again._entry(samples) == entries["as it is"]
    write_samples(samples, [plain(1)])
    entries["file"] = again._entry(samples)
    assert len(set(entries.values())) == len(entries)


def test_a_part_that_is_missing_or_half_written_is_not_read(samples, tokenizer_dir, tmp_path, monkeypatch):  # noqa: F811
    tokeniser = Tokeniser(tokenizer_dir, True, 600, cache_dir=tmp_path / "cache")
    tokeniser.fill_cache([samples], 0, 2)
    with pytest.raises(DataError, match=r"mixed.jsonl: expected its tokens .* another process failed"):
        tokeniser.read(samples)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", killed)
        with pytest.raises(KeyboardInterrupt):
            tokeniser.fill_cache([samples], 1, 2)
    with pytest.raises(DataError, match="another process failed"):
        tokeniser.read(samples)
    tokeniser.fill_cache([samples], 1, 2)
    assert len(tokeniser.read(samples).records) == 21


def test_filters_that_remember_are_refused_with_a_folder(samples, tokenizer_dir, tmp_path):  # noqa: F811
    Tokeniser(tokenizer_dir, True, 600, [Duplicate()])
    with pytest.raises(ConfigError, match=r"cache_dir: expected filters that judge every sample alone.*Duplicate"):
        Tokeniser(tokenizer_dir, True, 600, [Duplicate()], tmp_path)


def test_a_file_that_is_not_there_is_named(tokenizer_dir, tmp_path):  # noqa: F811
    data = SFTDataModule(tokenizer_dir, {"a": SFTSource([tmp_path / "none.jsonl"])}, 100, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="none.jsonl: expected a file of conversations"):
        data.setup("fit")


def test_what_a_filter_remembers_for_itself_does_not_rename_the_tokens(samples, tokenizer_dir, tmp_path):  # noqa: F811
    filters = [TooLong(500, tokenizer_dir), RepositoryLeak()]
    tokeniser = Tokeniser(tokenizer_dir, True, 600, filters, cache_dir=tmp_path / "cache")
    entry = tokeniser._entry(samples)
    tokeniser.fill_cache([samples])
    assert tokeniser.read(samples).account.dropped == {"too_long": 1}
    assert Tokeniser(tokenizer_dir, True, 600, filters, cache_dir=tmp_path / "cache")._entry(samples) == entry


def test_a_file_that_a_filter_is_set_to_read_names_the_tokens(samples, tokenizer_dir, tmp_path):  # noqa: F811
    listed = tmp_path / "list.json"
    entries = set()
    for content in ("a", "bc"):
        listed.write_text(content)
        filters = [RepositoryLeak([str(listed)])]
        entries.add(Tokeniser(tokenizer_dir, True, 600, filters, cache_dir=tmp_path / "cache")._entry(samples))
    assert len(entries) == 2


def test_a_filter_that_cannot_be_compared_is_refused_with_a_folder(tokenizer_dir, tmp_path):  # noqa: F811
    class Closure(RepetitionLoop):
        def __init__(self):
            self.judge = lambda: None

    with pytest.raises(ConfigError, match="cache_dir: expected filters whose settings can be compared, got Closure"):
        Tokeniser(tokenizer_dir, True, 600, [Closure()], cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["tokens.u32", "samples.json"])
def test_damaged_tokens_are_refused(samples, tokenizer_dir, tmp_path, name):  # noqa: F811
    tokeniser = Tokeniser(tokenizer_dir, True, 600, cache_dir=tmp_path / "cache")
    tokeniser.fill_cache([samples])
    (damaged,) = (tmp_path / "cache").rglob(name)
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(DataError, match="delete"):
        tokeniser.read(samples)


def test_a_pattern_of_files_is_kept_too(samples, tokenizer_dir, tmp_path):  # noqa: F811
    pattern = samples.with_name("mi*.jsonl")
    data = SFTDataModule(tokenizer_dir, {"a": SFTSource([pattern])}, 600, [pattern], cache_dir=tmp_path / "cache")
    data.setup("fit")
    assert data.reports["a"].num_samples == 21
