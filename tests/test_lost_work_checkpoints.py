"""Ways to lose work by a checkpoint: other settings, other layouts, other bases, torn and foreign files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import sft_config, write_run_inputs

from north_lightning import cli
from north_lightning.model import NorthConfig, NorthModel, load_checkpoint, save_checkpoint

Config = dict[str, Any]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, and two checkpoints to start from; ``base`` with a license."""
    folder = write_run_inputs(tmp_path_factory.mktemp("inputs"))
    for seed, name in ((3, "base"), (4, "other")):
        torch.manual_seed(seed)
        model = NorthModel(NorthConfig.load(folder / "model.json"))
        save_checkpoint(model, folder / name, dtype=torch.bfloat16, tokenizer_dir=folder / "tokenizer")
    (folder / "base" / "LICENSE").write_text("Apache-2.0, as an example")
    (folder / "base" / "generation_config.json").write_text('{"temperature": 1.0}')
    return folder


def make_config(inputs: Path, run_dir: Path, **trainer: Any) -> Config:
    config = sft_config(inputs, run_dir, **{"max_steps": 2, **trainer})
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    config["trainer"]["callbacks"].append(saver | {"init_args": {"every_n_train_steps": 2, "filename": "saved"}})
    config["model"]["init_args"] = {
        "checkpoint": str(inputs / "base"),
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.9, 0.95]}},
        "lr_scheduler": {"class_path": "WarmupSchedule", "init_args": {"warmup_steps": 1}},
    }
    return config


def fit(config: Config, *arguments: str) -> int:
    """The exit code of the command."""
    file = Path(config["trainer"]["default_root_dir"]).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return cli.main(["fit", "--config", str(file), *arguments])


@pytest.fixture(scope="module")
def trained(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert fit(make_config(inputs, folder)) == 0
    return folder


@pytest.fixture(scope="module")
def adapted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of adapters."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    config = make_config(inputs, folder)
    config["model"]["init_args"]["lora"] = {"rank": 4, "alpha": 8.0}
    assert fit(config) == 0
    return folder


def saved(run: Path) -> Path:
    (path,) = run.rglob("saved.ckpt")
    return path


# ---- changed settings ------------------------------------------------------------------------------------------------


def set_key(*path: str, value: Any) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


MODEL, DATA = ("model", "init_args"), ("data", "init_args")
REFUSED: dict[str, tuple[Callable[[Config], None], str]] = {
    "another learning rate": (set_key(*MODEL, "optimizer", "init_args", "lr", value=2e-3), "optimizer.lr"),
    "other betas": (set_key(*MODEL, "optimizer", "init_args", "betas", value=[0.8, 0.95]), "optimizer.betas"),
    "another decay": (set_key(*MODEL, "optimizer", "init_args", "weight_decay", value=0.3), "optimizer.weight_decay"),
    "another optimizer": (
        set_key(*MODEL, "optimizer", value={"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-3}}),
        "optimizer.class_path",
    ),
    "another warm-up": (set_key(*MODEL, "lr_scheduler", "init_args", "warmup_steps", value=2), "warmup_steps"),
    "no schedule": (set_key(*MODEL, "lr_scheduler", value=None), "lr_scheduler.class_path"),
    "another seed": (set_key("seed_everything", value=7), "seed_everything"),
    "other shares": (
        lambda config: [
            set_key(*DATA, "sources", name, "share", value=share)(config)
            for name, share in (("names", 0.4), ("sums", 0.6))
        ][-1],
        "data.sources.names.share",
    ),
    "longer rows": (set_key(*DATA, "row_tokens", value=300), "data.row_tokens"),
    "another mean": (set_key(*MODEL, "loss_mean", value="conversations"), "model.loss_mean"),
    "a frozen router": (set_key(*MODEL, "freeze_router", value=True), "model.freeze_router"),
    "adapters": (set_key(*MODEL, "lora", value={"rank": 4}), "model.lora.rank"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("other betas", "no schedule", "longer rows") else pytest.mark.long)
        for name in REFUSED
    ],
)
def test_a_setting_that_a_resume_cannot_honor_is_refused_by_its_key(
    inputs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, key = REFUSED[name]
    config = make_config(inputs, tmp_path / "run")
    change(config)
    before = saved(trained).read_bytes()
    assert fit(config, "--trainer.max_steps=4", f"--ckpt_path={saved(trained)}") == 1
    error = capsys.readouterr().err
    assert key in error
    assert "export" in error
    assert len(error.splitlines()) <= 8
    assert "Traceback" not in error
    assert saved(trained).read_bytes() == before


def test_what_takes_effect_from_the_config_is_said_in_one_line(
    inputs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(inputs, tmp_path / "run", max_steps=3, precision="bf16-mixed")
    config["model"]["init_args"]["max_grad_norm"] = 0.5
    assert fit(config, f"--ckpt_path={saved(trained)}") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume:")]
    assert "step 2" in line
    assert "model.max_grad_norm 1.0 -> 0.5" in line
    assert "trainer.precision" in line
    assert "default_root_dir" not in line


def test_another_rope_base_in_the_base_checkpoint_is_refused(
    inputs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy_of(inputs / "base", tmp_path / "base")
    hf_config = json.loads((other / "config.json").read_text())
    hf_config |= {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    (other / "config.json").write_text(json.dumps(hf_config))
    config = make_config(inputs, tmp_path / "run")
    config["model"]["init_args"]["checkpoint"] = str(other)
    assert fit(config, f"--ckpt_path={saved(trained)}") == 1
    assert "model.config.rope_theta: the checkpoint has 50000" in capsys.readouterr().err


def test_a_permuted_tokenizer_of_equal_size_is_refused(
    inputs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copy_of(inputs / "tokenizer", tmp_path / "tokenizer")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = sorted(words, key=words.get)[-2:]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = make_config(inputs, tmp_path / "run")
    config["model"]["init_args"]["tokenizer"] = config["data"]["init_args"]["tokenizer"] = str(other)
    assert fit(config, f"--ckpt_path={saved(trained)}") == 1
    assert "model.tokenizer: the checkpoint has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (set_key(*MODEL, "lora", "alpha", value=16.0), "model.lora.alpha: the checkpoint has 8.0, the config 16.0"),
        (set_key(*MODEL, "lora", "rank", value=2), "model.lora.rank: the checkpoint has 4, the config 2"),
        (set_key(*MODEL, "lora", "targets", value=["attention"]), "model.lora.targets"),
        (set_key(*MODEL, "lora", value=None), "model.lora.rank: the checkpoint has 4, the config none"),
        (None, "model.lora.base"),
    ],
    ids=["alpha", "rank", "targets", "full weights", "another base"],
)
def test_adapters_are_resumed_as_they_were_or_refused(
    inputs: Path,
    adapted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Config], None] | None,
    key: str,
) -> None:
    config = make_config(inputs, tmp_path / "run")
    config["model"]["init_args"]["lora"] = {"rank": 4, "alpha": 8.0}
    (change or set_key(*MODEL, "checkpoint", value=str(inputs / "other")))(config)
    assert fit(config, f"--ckpt_path={saved(adapted)}") == 1
    assert key in capsys.readouterr().err


# ---- what a stage hands on -------------------------------------------------------------------------------------------


def test_a_stage_hands_on_license_generation_config_tokenizer_and_dtype(trained: Path, inputs: Path) -> None:
    released = trained / "checkpoint"
    for name in ("LICENSE", "generation_config.json", "tokenizer.json"):
        assert (released / name).read_bytes() == (inputs / "base" / name).read_bytes()
    assert json.loads((released / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in load_checkpoint(released).parameters()} == {torch.bfloat16}
    assert torch.load(saved(trained), weights_only=True)["state_dict"]["model.norm.weight"].dtype == torch.float32


def test_adapters_are_loaded_on_their_own_base_only(
    inputs: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(inputs, tmp_path / "run")
    config["model"]["init_args"] |= {
        "adapter": str(adapted / "checkpoint" / "adapter"),
        "checkpoint": str(inputs / "other"),
    }
    assert fit(config) == 1
    assert "these adapters belong to another base" in capsys.readouterr().err
    moved = copy_of(inputs / "base", tmp_path / "moved")  # the same weights under another name
    config["model"]["init_args"]["checkpoint"] = str(moved)
    assert fit(config) == 0


def copy_of(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target)
    return target


# ---- from a training checkpoint to a release -------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(folder).named_parameters())


@pytest.mark.parametrize("kind", ["trained", "adapted"])
def test_an_exported_checkpoint_is_what_the_run_has_released(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Path = request.getfixturevalue(kind)
    arguments = ["export", f"--checkpoint={saved(run)}", f"--directory={tmp_path / 'out'}"]
    assert cli.main(arguments) == 0
    names = sorted(path.name for path in (run / "checkpoint").iterdir())
    of_releases = {"SHA256SUMS", "release.json", "serve.sh"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names} | of_releases
    for name in names:
        if not (run / "checkpoint" / name).is_dir():
            assert (tmp_path / "out" / name).read_bytes() == (run / "checkpoint" / name).read_bytes(), name
    assert cli.main(arguments) == 1
    assert "does not exist yet" in capsys.readouterr().err


def test_export_can_choose_the_dtype_and_says_what_is_not_there_any_more(
    trained: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", f"--checkpoint={saved(trained)}", f"--directory={tmp_path / 'out'}", "--format=fp32"]
    assert cli.main(arguments) == 0
    weights = torch.load(saved(trained), weights_only=True)["state_dict"]
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, weights[f"model.{name}"])
    gone = [f"--checkpoint={saved(adapted)}", f"--directory={tmp_path / 'other'}", f"--base={tmp_path / 'nowhere'}"]
    assert cli.main(["export", *gone]) == 1
    assert "base: expected a folder, found none" in capsys.readouterr().err


# ---- other layouts, torn and foreign files ---------------------------------------------------------------------------

FORMAT1 = Path(__file__).parent / "fixtures" / "format1"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sharded", "set trainer.strategy: NorthStrategy"),
        ("torn", "torn"),
        pytest.param("released", "model.checkpoint", marks=pytest.mark.long),
        pytest.param("missing", "missing.ckpt", marks=pytest.mark.long),
        pytest.param("empty", "empty.ckpt", marks=pytest.mark.long),
    ],
)
def test_what_cannot_be_resumed_says_in_a_line_what_can(
    kind: str, expected: str, inputs: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = {"sharded": FORMAT1 / "sharded.ckpt", "released": trained / "checkpoint"}.get(
        kind, tmp_path / f"{kind}.ckpt"
    )
    if kind == "torn":
        path.write_bytes(saved(trained).read_bytes()[:-2000])
    elif kind == "empty":
        path.write_bytes(b"")
    assert fit(make_config(inputs, tmp_path / "run"), f"--ckpt_path={path}") == 1
    error = capsys.readouterr().err
    assert expected in error or "cannot be read" in error
    assert len(error.splitlines()) <= 8
    assert "Traceback" not in error


@pytest.mark.parametrize("settings", [{"precision": "16-mixed"}, {"precision": "bf16-true"}])
def test_a_precision_that_trains_nothing_is_refused_before_anything_is_written(
    settings: Config, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(make_config(inputs, tmp_path / "run", **settings)) == 1
    error = capsys.readouterr().err
    assert "bf16-mixed" in error
    assert len(error.splitlines()) <= 8
    assert not list((tmp_path / "run").glob("[!.]*"))


def test_adapters_resume_in_place_and_validation_reads_any_checkpoint(
    inputs: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(inputs, tmp_path / "run", max_steps=3)
    config["model"]["init_args"]["lora"] = {"rank": 4, "alpha": 8.0}
    assert fit(config, f"--ckpt_path={saved(adapted)}") == 0
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 5e-3  # nothing is trained here
    config["data"]["init_args"]["validation_files"] = [str(inputs / "names.jsonl")]
    file = tmp_path / "validate.yaml"
    file.write_text(yaml.safe_dump(config))
    assert cli.main(["validate", "--config", str(file), f"--ckpt_path={saved(adapted)}"]) == 0
