"""A release's card and the figures say what the run's files say, and are the same twice."""

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from north_lightning.cli import main
from north_lightning.errors import ConfigError, DataError
from north_lightning.views.card import write_card
from north_lightning.views.charts import COLOURS
from north_lightning.views.figures import write_figures
from north_lightning.views.report import write_report

WORDS = {"name": "tiny", "license": "apache-2.0", "intended_use": "Shows the recipe.", "limits": ["It is small."]}


@pytest.fixture
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    names = ("num_hidden_layers", "hidden_size", "num_experts", "num_experts_per_tok", "max_position_embeddings")
    config = {"architectures": ["Cohere2MoeForCausalLM"], "vocab_size": 1024} | dict.fromkeys(names, 8)
    (folder / "config.json").write_text(json.dumps(config))
    check = {"tokens": 1234, "kl": 0.00321, "top1": 0.987, "served_logprob_difference": None, "not_served": "no vLLM"}
    (folder / "release.json").write_text(json.dumps({"format": "fp8", "step": None, "check": check}))
    weights = {"a.weight": torch.zeros(3, 4), "a.weight_scale": torch.zeros(3, 1), "b.weight": torch.zeros(5)}
    save_file(weights, folder / "model.safetensors")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_card_and_the_figures_are_made_by_two_commands_and_are_the_same_twice(run_dir: Path, release: Path) -> None:
    write_report(run_dir)
    made = []
    for _ in range(2):
        assert main(["figures", "--run_dir", str(run_dir)]) == 0
        (release / "card.yaml").write_text(yaml.safe_dump(WORDS))
        place = ["--run_dir", str(run_dir), "--release", str(release), "--dataset", "me/tasks"]
        assert main(["card", "--config", str(release / "card.yaml"), *place]) == 0
        made.append(files_of(run_dir / "figures") | files_of(release))
    assert made[0] == made[1]
    names = {f"{name}.{form}" for name in ("benchmarks", "training") for form in ("svg", "png")}
    assert names == set(files_of(run_dir / "figures")) == set(files_of(release / "figures"))


def test_everything_that_the_card_says_is_in_a_file_of_the_run(run_dir: Path, release: Path) -> None:
    write_report(run_dir)
    write_card(release, run_dir, dataset="me/tasks", **WORDS)
    card = (release / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["license"], head["datasets"], head["pipeline_tag"]) == ("apache-2.0", ["me/tasks"], "text-generation")
    assert "| parameters | 17 |" in card  # 3 x 4 + 5, without the scale
    assert "on 1234 tokens of the run: KL divergence\n0.0032 nats per token, the same best token at 98.7%" in card
    assert "not served for this check: no vLLM." in card
    sft = "cross entropy | rows of 2,048 tokens | terminal 25%, swe 75% | 20 | 0.001 | 1.5"
    assert f"| sft_stage1 | random weights | {sft} |" in card
    rl = "16 groups of 8 attempts; weights pushed every 4 steps | terminal 35%, swe 65%"
    assert f"| rl | sft_stage2 | CISPOLoss | {rl} | 20 | 0.001 | 1.5 |" in card
    heldout = json.loads((run_dir / "report.json").read_text())["heldout"]
    low, high = heldout["rl"]["pass@1"]["ci95"]
    assert f"{100 * heldout['rl']['pass@1']['value']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]" in card
    assert "RL over SFT: +25.0 points of pass@1, paired 95% interval [+20.0, +30.0]." in card
    assert "- It is small.\n" in card
    assert "One training run was evaluated" in card
    assert "tasks of these kinds: wrong_key." in card
    for name, digest in re.findall(r"^\| (\S+) \| `(\w{64})` \|$", card, flags=re.M):
        folder, _, rest = name.partition("/")
        root = release if folder == release.name else run_dir
        assert sha256((root / rest).read_bytes()).hexdigest() == digest
    (row,) = yaml.safe_load((release / ".eval_results" / "results.yaml").read_text())
    assert row["value"] == round(100 * heldout["rl"]["pass@1"]["value"], 2)


@pytest.mark.parametrize(
    ("missing", "command"), [("report.json", "report"), ("rl/config.yaml", "fit"), ("sft_stage1/summary.json", "fit")]
)
def test_a_card_without_one_of_its_files_names_the_command_that_writes_it(
    run_dir: Path, release: Path, missing: str, command: str
) -> None:
    write_report(run_dir)
    (run_dir / missing).unlink()
    with pytest.raises(DataError, match=rf"{missing}: not found; `python -m north_lightning {command}` writes it"):
        write_card(release, run_dir, **WORDS)
    assert not (release / "README.md").exists()


def test_a_checkpoint_that_was_not_evaluated_and_an_odd_license_are_refused(run_dir: Path, release: Path) -> None:
    write_report(run_dir)
    with pytest.raises(ConfigError, match="checkpoint: expected one of sft_stage1, sft_stage2, rl, got 'best'"):
        write_card(release, run_dir, checkpoint="best", **WORDS)
    with pytest.raises(ConfigError, match="license: expected an identifier of the hub"):
        write_card(release, run_dir, **WORDS | {"license": "Apache 2"})


def test_a_figure_without_its_source_is_left_out_with_the_command(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    (run_dir / "rl" / "history.jsonl").unlink()
    write_figures(run_dir)
    told = capsys.readouterr().out
    assert re.search(r"training: left out: .*history.jsonl not found; `python -m north_lightning fit`", told)
    assert "preferences: left out" in told
    assert set(files_of(run_dir / "figures")) == {"benchmarks.svg", "benchmarks.png"}


DEFICIENCIES = {  # Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


@pytest.mark.parametrize("name", DEFICIENCIES)
def test_the_colors_of_a_chart_are_told_apart_by_color_blind_eyes(name: str) -> None:
    seen = [_lab(torch.tensor(DEFICIENCIES[name], dtype=torch.float64) @ _linear(colour)) for colour in COLOURS]
    apart = [torch.dist(one, other).item() for place, one in enumerate(seen) for other in seen[:place]]
    assert min(apart) > 20  # CIE 1976; 2.3 is just noticeable


def _linear(colour: str) -> torch.Tensor:
    rgb = torch.tensor([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)], dtype=torch.float64)
    return torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _lab(linear: torch.Tensor) -> torch.Tensor:
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = torch.tensor(to_xyz, dtype=torch.float64) @ linear.clamp(0, 1)
    ratio = xyz / torch.tensor([0.95047, 1.0, 1.08883], dtype=torch.float64)
    x, y, z = torch.where(ratio > (6 / 29) ** 3, ratio ** (1 / 3), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])
