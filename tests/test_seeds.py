"""One seed decides everything that is drawn: two runs with the same are the same, with another nothing is left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import sft_config, write_run_inputs

from north_lightning import cli
from north_lightning.callbacks import RolloutProducerCallback
from north_lightning.data.dedup import Duplicate
from north_lightning.errors import ConfigError
from north_lightning.faults import FaultPlan
from north_lightning.harnesses import ReActTerminalHarness, VariedHarness
from north_lightning.model import NorthConfig, NorthModel, save_checkpoint
from north_lightning.seeds import run_seed, set_run_seed
from north_lightning.tasks import write_task
from north_lightning.tasks.terminal import terminal_task


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ``write_run_inputs``, with a checkpoint and six tasks."""
    folder = write_run_inputs(tmp_path_factory.mktemp("inputs"))
    torch.manual_seed(0)
    model = NorthModel(NorthConfig.load(folder / "model.json"))
    save_checkpoint(model, folder / "checkpoint", tokenizer_dir=folder / "tokenizer")
    for index in range(6):
        write_task(terminal_task(index, 0, "train"), folder / "tasks")
    return folder


def fit(config: dict[str, Any], run_dir: Path, seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir()
    (run_dir / "in.yaml").write_text(yaml.safe_dump(config | {"seed_everything": seed}))
    assert cli.main(["fit", "--config", str(run_dir / "in.yaml")]) == 0, capfd.readouterr().err


@pytest.mark.parametrize("start", ["config", "lora"])
def test_the_seed_decides_weights_and_order_of_an_sft_run(
    start: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights, losses = [], []
    for number, seed in enumerate((1, 1, 2)):
        run_dir = tmp_path / str(number)
        config = sft_config(inputs, run_dir, max_steps=2, callbacks=[{"class_path": "HFCheckpoint"}])
        model = config["model"]["init_args"]
        if start == "lora":
            model |= {"checkpoint": str(inputs / "checkpoint"), "lora": {"rank": 2}}
            del model["config"]
        fit(config, run_dir, seed, capfd)
        weights.append(load_file(run_dir / "checkpoint" / "model.safetensors"))
        history = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
        losses.append([line["train/loss"] for line in history])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def rl_config(inputs: Path, run_dir: Path, **producer: Any) -> dict[str, Any]:
    rollouts = {
        "harnesses": {"terminal": {"class_path": "north_lightning.harnesses.ReActTerminalHarness"}},
        "verifier": {"class_path": "seeded_plugins.OddAnswer"},
        "sandboxes": {"class_path": "north_lightning.sandbox.BubblewrapProvider"},
        "max_turn_tokens": 32,
        "max_context_tokens": 2000,
    }
    sidecar = {"class_path": "seeded_plugins.AnsweringSidecar", "init_args": {"max_model_len": 2000}}
    config = sft_config(
        inputs,
        run_dir,
        max_steps=2,
        logger=[
            {"class_path": "JSONLHistory"},
            {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(run_dir / "csv")}},
        ],
        callbacks=[
            {"class_path": "SidecarCallback", "init_args": {"sidecar": sidecar}},
            {"class_path": "WeightSyncCallback"},
            {
                "class_path": "RolloutProducerCallback",
                "init_args": {"task_sets": [str(inputs / "tasks")], "rollouts": rollouts, "group_size": 2, **producer},
            },
        ],
    )
    queue = {"class_path": "WindowedFIFOQueue", "init_args": {"groups_per_batch": 3, "max_batches_ahead": 0}}
    config["model"] = {
        "class_path": "CISPOModule",
        "init_args": {
            "checkpoint": str(inputs / "checkpoint"),
            "loss": {"class_path": "north_lightning.losses.CISPOLoss"},
        },
    }
    config["data"] = {
        "class_path": "RolloutDataModule",
        "init_args": {"queue": queue, "groups_per_batch": 3, "max_row_tokens": 4000, "num_batches": 2},
    }
    return config


def rollouts_of(run_dir: Path) -> dict[tuple[int, int], dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]
    return {(row["group_id"], row["index"]): row for row in rows if row["group_id"] < 6}


def test_the_seed_decides_tasks_prompts_samples_and_rewards_of_an_rl_run(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    for run_dir, seed in ((first, 1), (again, 1), (other, 2)):
        fit(rl_config(inputs, run_dir), run_dir, seed, capfd)
    drawn = ("task_id", "seed", "messages", "reward")
    one, two, three = ({key: [row[name] for name in drawn] for key, row in rollouts_of(run_dir).items()}
                       for run_dir in (first, again, other))  # fmt: skip
    assert one == two
    assert (first / "history.jsonl").is_file()  # a logger without a folder of its own writes into the run's
    assert list((first / "csv").rglob("metrics.csv"))
    for column, name in enumerate(drawn):
        assert [row[column] for row in one.values()] != [row[column] for row in three.values()], name
    assert not {row[1] for row in one.values()} & {row[1] for row in three.values()}


def test_a_part_can_be_set_apart_and_a_resumed_run_keeps_its_seed(inputs: Path) -> None:
    set_run_seed(5)
    of_run, apart = (RolloutProducerCallback([inputs / "tasks"], None, **own) for own in ({}, {"seed": 7}))
    assert (of_run.state_dict()["seed"], apart.state_dict()["seed"]) == (5, 7)
    with pytest.raises(ConfigError, match="seed_everything: expected the checkpoint's, 7, got 5"):
        of_run.load_state_dict(apart.state_dict())
    apart.load_state_dict(apart.state_dict())


def test_parts_made_from_a_config_derive_their_seed_from_the_run() -> None:
    for seed in (3, 4):
        set_run_seed(seed)
        made = (Duplicate(), VariedHarness(ReActTerminalHarness()), FaultPlan(Path("faults")))
        assert [part.seed for part in made] == [seed] * 3
    assert Duplicate(seed=9).seed == 9


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_a_generator_refuses_is_refused_at_once(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed: expected a number from 0 to 4294967295, got {seed}"):
        run_seed(seed)


def test_a_run_without_a_seed_is_refused(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.yaml").write_text(yaml.safe_dump(sft_config(inputs, tmp_path / "run") | {"seed_everything": False}))
    assert cli.main(["fit", "--config", str(tmp_path / "in.yaml")]) == 1
    assert "seed_everything: expected a number, got false" in capfd.readouterr().err
