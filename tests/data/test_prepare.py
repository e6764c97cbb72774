"""``data filter`` and ``data blocklist``, as a user runs them."""

import json
import random
from dataclasses import replace

import pytest
import yaml
from data_fuzz import Benchmark, prose, sound_conversation

from north_lightning import cli
from north_lightning.data import read_samples, write_samples
from north_lightning.data.filters import NothingToTrain
from north_lightning.data.prepare import RawSource, filter_data
from north_lightning.errors import ConfigError, DataError, RetellingError
from north_lightning.interfaces import ConversationVariation
from north_lightning.types import Conversation, Message


def distinct(rng: random.Random, count: int) -> list[Conversation]:
    return [Conversation((Message("user", prose(rng, 40, 60)), Message("assistant", "Fine."))) for _ in range(count)]


def test_the_command_keeps_what_is_fit_and_accounts_for_the_rest(tmp_path, capsys):
    rng = random.Random(0)
    sound = distinct(rng, 6)
    leak = Conversation((Message("user", prose(rng, 40, 60)), Message("assistant", "Fine.")), repo="django/django")
    silent = Conversation((Message("user", prose(rng, 40, 60)), Message("assistant")))
    write_samples(tmp_path / "a.jsonl", [*sound[:4], leak, silent, sound[0]])
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{broken\n")
    write_samples(tmp_path / "b.jsonl", [*sound[4:], sound[1]])
    config = {
        "output_dir": str(tmp_path / "out"),
        "sources": {
            "first": {"files": [str(tmp_path / "a.jsonl")], "max_broken": 1},
            "second": {"files": [str(tmp_path / "b*.jsonl")]},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["data", "filter", "--config", str(tmp_path / "config.yaml")]) == 0
    assert "leak_repository 1" in " ".join(capsys.readouterr().out.split())
    assert [one.messages for one in read_samples(tmp_path / "out" / "first.jsonl")] == [s.messages for s in sound[:4]]
    assert {one.source for one in read_samples(tmp_path / "out" / "second.jsonl")} == {"second"}
    account = json.loads((tmp_path / "out" / "filter.json").read_text())
    first = account["sources"]["first"]
    assert (first["read"], first["broken"], first["kept"]) == (7, 1, 4)
    assert first["dropped"] == {"leak_repository": 1, "nothing_to_train": 1, "duplicate": 1}
    assert first["broken_records"][0].partition(": ")[0].endswith("a.jsonl:8")
    assert account["sources"]["second"]["dropped"] == {"duplicate": 1}
    (example,) = account["examples"]["leak_repository"]
    assert example == {"source": "first", "task_id": "", "detail": "repo: django/django is django/django of swe_bench"}


def test_a_broken_line_stops_the_command_unless_the_budget_allows_it(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": 3}]}\n')
    arguments = [
        "--output_dir",
        str(tmp_path / "out"),
        "--sources",
        json.dumps({"a": {"files": [str(tmp_path / "a.jsonl")]}}),
    ]
    assert cli.main(["data", "filter", *arguments]) == 1
    assert (
        "a.jsonl:1: $.messages[0].content: expected a string or a list of text parts, got 3" in capsys.readouterr().err
    )
    assert not (tmp_path / "out" / "a.jsonl").exists()


def test_formats_and_keys_that_nobody_reads_are_said_and_refused_where_that_is_asked(tmp_path, capsys):
    rng = random.Random(0)
    turns = [{"role": "user", "content": prose(rng, 40, 60)}, {"role": "assistant", "content": "Fine.", "weight": 0}]
    turns += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Done.", "mood": "good"}]
    shared = [{"from": "human", "value": prose(rng, 40, 60)}, {"from": "gpt", "value": "Fine.\n"}]
    lines = [{"messages": turns, "images": ["a.png"]}, {"conversations": shared, "reward": "0.0"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = json.dumps({"a": {"files": [str(tmp_path / "a.jsonl")]}})
    arguments = ["data", "filter", "--output_dir", str(tmp_path / "out"), "--sources", sources]
    assert cli.main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a: 2 keys were not understood: $.messages[].mood 1, $.images 1" in said
    account = json.loads((tmp_path / "out" / "filter.json").read_text())["sources"]["a"]
    assert account["formats"] == {"messages": 1, "sharegpt": 1}
    assert account["not_understood"] == {"$.images": 1, "$.messages[].mood": 1}
    assert account["changed"] == {"assistant texts cut at the ends": 1}
    assert account["dropped"] == {"failed_verification": 1}
    (sample,) = read_samples(tmp_path / "out" / "a.jsonl")
    assert [message.trained for message in sample.messages] == [True, False, True, True]
    assert cli.main([*arguments, "--overwrite", "true", "--strict", "true"]) == 1
    assert "a.jsonl:1: $: expected only keys that are understood, got $.images, $.mess" in capsys.readouterr().err


class Shout(ConversationVariation):
    def vary(self, sample: Conversation, seed: int) -> Conversation | None:
        return Conversation((Message("user", f"HEY {seed}"), *sample.messages[1:]))


class CannotShout(ConversationVariation):
    def vary(self, sample: Conversation, seed: int) -> Conversation | None:
        raise RetellingError("hoarse", "no voice")


def test_samples_that_a_variation_cannot_retell_go_to_the_next_and_the_reason_is_counted(tmp_path):
    write_samples(tmp_path / "a.jsonl", distinct(random.Random(0), 3))
    source = {"a": RawSource([str(tmp_path / "a.jsonl")])}
    filter_data(source, tmp_path / "out", variations=[CannotShout(), Shout()])
    account = json.loads((tmp_path / "out" / "filter.json").read_text())
    assert account["sources"]["a"]["retold"] == {"not by CannotShout: hoarse": 3, "by Shout": 3}
    filter_data(source, tmp_path / "plain", variations=[CannotShout()])
    assert list(read_samples(tmp_path / "plain" / "a.jsonl")) != []


def test_filters_variations_and_dedup_are_what_the_call_says(tmp_path):
    samples = [Conversation((Message("user", "x"), Message("assistant", " a ")))] * 2
    write_samples(tmp_path / "a.jsonl", samples)
    source = {"a": RawSource([str(tmp_path / "a.jsonl")])}
    told = []
    for seed in (7, 7, 8):
        filter_data(source, tmp_path / "out", [NothingToTrain()], [], None, [Shout()], seed=seed, overwrite=True)
        told.append([sample.messages[0].content for sample in read_samples(tmp_path / "out" / "a.jsonl")])
    assert told[0] == told[1]
    assert len({*told[0], *told[2]}) == 4  # no sample is told as another one, nor with another seed
    with pytest.raises(ConfigError, match="sources: expected at least one"):
        filter_data({}, tmp_path / "out")
    with pytest.raises(DataError, match=r"none\*.jsonl: expected a file of conversations"):
        filter_data({"a": RawSource([str(tmp_path / "none*.jsonl")])}, tmp_path / "out")


def test_a_benchmark_kept_out_by_its_own_list(tmp_path):
    benchmark = Benchmark(tmp_path)
    rng = random.Random(0)
    leaks = [benchmark.plant(sound_conversation(rng), rng)[1] for _ in range(20)]
    write_samples(tmp_path / "a.jsonl", leaks)
    filter_data(
        {"a": RawSource([str(tmp_path / "a.jsonl")])}, tmp_path / "out", [], [str(benchmark.block_list), "swe_bench"]
    )
    assert list(read_samples(tmp_path / "out" / "a.jsonl")) == []


def test_the_blocklist_command_says_what_it_found(tmp_path, capsys):
    Benchmark(tmp_path, num_instances=4)
    arguments = ["--name", "b", "--source", "s", "--output", str(tmp_path / "b.json"), "--date", "2026-01-02"]
    instances = json.dumps([str(tmp_path / "instances.jsonl")])
    assert cli.main(["data", "blocklist", *arguments, "--instances", instances]) == 0
    assert "4 repositories, 4 commits, 4 hunks, 4 statements, 0 instructions" in capsys.readouterr().out
    assert json.loads((tmp_path / "b.json").read_text())["date"] == "2026-01-02"


def test_the_files_that_are_read_are_not_replaced_and_all_are_looked_for_first(tmp_path):
    write_samples(tmp_path / "a.jsonl", distinct(random.Random(0), 2))
    raw = RawSource([str(tmp_path / "*.jsonl")])
    with pytest.raises(ConfigError, match=r"output_dir: .*a\.jsonl to replace"):
        filter_data({"a": raw}, tmp_path)
    with pytest.raises(DataError, match="none.jsonl"):
        filter_data({"b": raw, "c": RawSource([str(tmp_path / "none.jsonl")])}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_with_half_characters_are_written(tmp_path):
    sample, failed = distinct(random.Random(0), 2)
    samples = [replace(sample, task_id="a\ud800"), replace(failed, task_id="b\ud800", verified=False)]
    write_samples(tmp_path / "a.jsonl", samples)
    assert list(read_samples(tmp_path / "a.jsonl")) == samples
    filter_data({"a": RawSource([str(tmp_path / "a.jsonl")])}, tmp_path / "out", block_lists=[])
    account = json.loads((tmp_path / "out" / "filter.json").read_text())
    assert account["examples"]["failed_verification"][0]["task_id"] == "b\ud800"


def test_a_similarity_in_percent_is_refused(tmp_path):
    write_samples(tmp_path / "a.jsonl", distinct(random.Random(0), 2))
    with pytest.raises(ConfigError, match="min_similarity: expected a number from 0 to 1, got 90"):
        filter_data({"a": RawSource([str(tmp_path / "a.jsonl")])}, tmp_path / "out", min_similarity=90)
