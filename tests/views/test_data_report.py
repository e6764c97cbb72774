"""The page and the preview of an SFT mix: their numbers are those of the rows, and the recipe's shares come out."""

import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from north_lightning.chat import NorthTokenizer, train_tokenizer
from north_lightning.data import Conversation, SFTDataModule, SFTSource, write_samples
from north_lightning.errors import ConfigError
from north_lightning.types import Message
from north_lightning.views.data_preview import TRAINED, colour, preview_data
from north_lightning.views.data_report import report_data

CONFIGS = sorted((Path(__file__).parents[2] / "configs/north_mini").glob("sft_stage*.yaml"))
HARNESSES = ("swe_agent", "mini_swe_agent", "opencode", "terminus_2")


def sample(source: str, number: int, words: int) -> Conversation:
    text = " ".join(f"w{number + place}" for place in range(words))
    harness = source if source in HARNESSES else ""
    return Conversation((Message("user", f"ask {number}"), Message("assistant", text)), source=source, harness=harness)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["ask w0 w1 w2 w3 " * 5], [], 400, directory)
    return directory


def tiny(config: Path, folder: Path, tokenizer_dir: Path) -> SFTDataModule:
    """The shipped config over generated sources of very different sizes, in short rows."""
    settings = yaml.safe_load(config.read_text())["data"]["init_args"]
    sources = {}
    for rank, (name, source) in enumerate(settings["sources"].items()):
        samples = [sample(name, number, 4 + (number * 7 + rank) % 30) for number in range(60 + 15 * rank)]
        faulty = Conversation(
            (Message("user", "ask"), Message("assistant", " blank ")), source=name, task_id="faulty-1"
        )
        write_samples(folder / f"{name}.jsonl", [*samples, faulty, sample(name, 9, 3000)])
        sources[name] = SFTSource(**{**source, "files": [folder / f"{name}.jsonl"], "max_epochs": None})
    return SFTDataModule(tokenizer_dir, sources, row_tokens=2048)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_recipes_mix_is_reported_as_it_is_in_the_rows(config: Path, tmp_path: Path, tokenizer_dir: Path) -> None:
    data = tiny(config, tmp_path, tokenizer_dir)
    account = {
        "sources": {"raw": {"dropped": {"leak_repository": 3, "duplicate": 1}}, "more": {"dropped": {"duplicate": 4}}},
        "examples": {"leak_repository": [{"source": "raw", "task_id": "leaked-1", "detail": "django/django"}]},
    }
    (tmp_path / "filter.json").write_text(json.dumps(account))
    report_data(data, tmp_path / "report", rows_per_step=4, filter_account=tmp_path / "filter.json")
    summary = json.loads((tmp_path / "report/data.json").read_text())

    stream = data.make_stream(4)
    trained, tokens = Counter[str](), 0
    rows = [row for _ in range(-(-summary["num_rows"] // 4)) for row in stream.next_step()]
    for step in range(0, summary["num_rows"] // 4 * 4, 4):
        for row in rows[step : step + 4]:
            batch = data.store.pack(row)
            tokens += len(batch.token_ids)
            for name, count in zip(batch.sources, batch.trained_per_document.tolist(), strict=True):
                trained[name] += count
    shown = {row["name"]: row for row in summary["sources"]}
    for name, row in shown.items():
        assert row["achieved"] == pytest.approx(trained[name] / trained.total(), abs=0.02)
        assert row["achieved"] == pytest.approx(row["target"], abs=0.01)
        assert row["num_samples"] == row["num_read"] - 2
    assert summary["utilisation"] == pytest.approx(tokens / (summary["num_rows"] // 4 * 4 * 2048), abs=0.01)
    assert summary["num_too_long"] == len(shown)
    assert {row["reason"]: row["total"] for row in summary["dropped"]} == {
        "erroneous_whitespace": len(shown),
        "too_long": len(shown),
    }
    page = (tmp_path / "report/data.html").read_text()
    for name in shown:
        assert f"<td>{name}</td>" in page
    assert "faulty-1" in page
    assert "leaked-1" in page
    leaks = page.partition("Duplicates and leaks")[2].partition("</table>")[0]
    assert re.findall(r"<td>(\w+)</td><td class=\"bad\">(\d+)", leaks) == [("duplicate", "5"), ("leak_repository", "3")]
    assert not re.search(r"""(src|href)=["']https?:""", page)


@pytest.mark.parametrize(
    ("stage", "groups"),
    [
        ("sft_stage1", {"agentic tool use": 0.43, "single-turn code": 0.27, "other": 0.30}),
        ("sft_stage2", {"code": 0.61, "other agentic": 0.24, "other reasoning": 0.15}),
    ],
)
def test_the_shipped_mixes_are_those_of_the_recipe(stage: str, groups: dict[str, float]) -> None:
    path = next(path for path in CONFIGS if path.stem == stage)
    sources = yaml.safe_load(path.read_text())["data"]["init_args"]["sources"]
    shares = Counter[str]()
    for source in sources.values():
        shares[source["group"]] += source["share"]
    assert shares == pytest.approx(groups)
    agentic = sum(
        source["share"] for name, source in sources.items() if source["group"] == sources["swe_agent"]["group"]
    )
    agentic -= sources.get("competitive", {"share": 0})["share"] if stage == "sft_stage2" else 0
    assert sources["swe_agent"]["share"] / agentic == pytest.approx(0.5)
    assert (sources["mini_swe_agent"]["share"] + sources["opencode"]["share"]) / agentic == pytest.approx(0.06)
    assert sources["terminus_2"]["share"] / agentic < 0.2


def test_the_preview_colours_exactly_the_trained_tokens(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_samples(tmp_path / "a.jsonl", [sample("a", number, 5) for number in range(6)])
    data = SFTDataModule(tokenizer_dir, {"a": SFTSource([tmp_path / "a.jsonl"])}, 2048)
    preview_data(data)
    assert "6 documents" in capsys.readouterr().out
    tokenizer = NorthTokenizer.load(tokenizer_dir)
    batch = data.store.pack([0])
    text = colour(batch.token_ids.tolist(), batch.loss_mask.tolist(), tokenizer)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if span.style == TRAINED)
    assert green == tokenizer.decode(batch.token_ids[batch.loss_mask].tolist())
    assert green.startswith("<|END_THINKING|><|START_TEXT|>w0 w1")
    assert "ask" not in green


def test_terminal_control_characters_of_the_data_are_shown_and_not_obeyed(tokenizer_dir: Path) -> None:
    tokenizer = NorthTokenizer.load(tokenizer_dir)
    ids = tokenizer.encode_text("a\x1b[31mred\r")
    output = io.StringIO()
    Console(file=output, force_terminal=True, color_system=None).print(colour(ids, [False] * len(ids), tokenizer))
    assert "\\x1b[31mred\\r" in output.getvalue()
    assert "\x1b[31m" not in output.getvalue()


@pytest.mark.parametrize("content", ["[broken", "{}", '{"sources": {"a": {}}, "examples": {}}', "[]"])
def test_a_file_that_is_no_account_is_refused_before_the_work(
    tmp_path: Path, tokenizer_dir: Path, content: str
) -> None:
    (tmp_path / "filter.json").write_text(content)
    data = SFTDataModule(tokenizer_dir, {"a": SFTSource([tmp_path / "none.jsonl"])}, 100)
    with pytest.raises(ConfigError, match="filter_account: expected a file that `data filter` wrote"):
        report_data(data, tmp_path, filter_account=tmp_path / "filter.json")
