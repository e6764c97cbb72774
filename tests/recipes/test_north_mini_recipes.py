"""Every recipe of ``configs/north_mini`` runs one step: the same file, in a folder where the model is narrow.

What is changed of a recipe is in ``EDITS``: the machine (one CPU process; two for ``rl``, which share a row), and how
much of it there is (row lengths, rollouts). The model keeps its depth's pattern, its routing and every setting; its
widths are small.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launch import as_torchrun_would, run_processes
from safetensors.torch import load_file
from small_runs import write_run_inputs

from north_lightning import cli
from north_lightning.history import read_history
from north_lightning.model import NorthConfig, NorthModel, save_checkpoint
from north_lightning.tasks import write_task
from north_lightning.tasks.software import software_task
from north_lightning.tasks.terminal import terminal_task

RECIPES = Path(__file__).parents[2] / "configs" / "north_mini"
NARROW = {
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 16,
    "prefix_dense_intermediate_size": 64,
    "num_experts": 16,
    "sliding_window": 15,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything the recipes name, small."""
    folder = tmp_path_factory.mktemp("workplace")
    inputs = write_run_inputs(folder / "inputs")
    vocabulary = json.loads((inputs / "model.json").read_text())
    shape = json.loads((RECIPES / "model.json").read_text()) | NARROW
    shape |= {key: vocabulary[key] for key in ("vocab_size", "eos_token_id")}
    torch.manual_seed(0)
    released = folder / "checkpoints" / "North-Mini-Code-1.0"
    save_checkpoint(NorthModel(NorthConfig.from_hf(shape)), released, tokenizer_dir=inputs / "tokenizer")
    for stage in ("sft_stage1", "sft_stage2"):
        shutil.copytree(released, folder / "runs" / "north_mini" / stage / "checkpoint")
    data = folder / "data" / "north_mini"
    for recipe in ("sft_stage1", "sft_stage2", "lora_1gpu"):
        for source in yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["data"]["init_args"]["sources"].values():
            for file in source["files"]:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(inputs / "names.jsonl", folder / file)
    for index in range(2):
        write_task(terminal_task(index, 0, "train"), data / "tasks" / "terminal")
        write_task(software_task(index, 0, "train"), data / "tasks" / "swe")
        write_task(terminal_task(index, 0, "heldout"), data / "tasks" / "heldout")
    return folder


def one_cpu(fit: dict[str, Any]) -> None:
    fit["trainer"] |= {"accelerator": "cpu", "devices": 1}
    if "strategy" in fit["trainer"]:
        fit["trainer"]["strategy"]["init_args"] |= {"context": 1}


def short_rows(fit: dict[str, Any]) -> None:
    one_cpu(fit)
    fit["data"]["init_args"]["row_tokens"] //= 256


def few_rollouts(fit: dict[str, Any]) -> None:
    fit["trainer"] |= {"accelerator": "cpu", "devices": 2}
    data, callbacks = fit["data"]["init_args"], fit["trainer"]["callbacks"]
    data["queue"]["init_args"]["groups_per_batch"] = 2
    sidecar, _, producer, evaluation = (callback["init_args"] for callback in callbacks[:4])
    producer["group_size"] = 2
    evaluation["num_tasks"] = 2
    for part in (sidecar, evaluation):
        part["sidecar"]["class_path"] = "fake_vllm.RoutedSidecar"
        part["sidecar"]["init_args"]["kv_cache_gib"] = 1  # on CPU it has to fit in the machine's memory
    for part in (producer, evaluation):
        part["task_sets"] = [path.removesuffix(".jsonl") for path in part["task_sets"]]


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "sft_stage1": short_rows,
    "sft_stage2": short_rows,
    "lora_1gpu": short_rows,
    "rl": few_rollouts,
}


def test_the_synthesis_recipe_samples_from_our_own_sidecar_and_keeps_nothing_that_fails(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    config = yaml.safe_load((RECIPES / "synthesise.yaml").read_text())
    settings = config["model"]["init_args"]
    del settings["server"]
    settings |= {
        "checkpoint": "checkpoints/North-Mini-Code-1.0",
        "sidecar": {"class_path": "fake_vllm.RoutedSidecar", "init_args": {"max_model_len": 131072}},
        "output_dir": str(tmp_path),
        "num_samples": 2,
    }
    settings["rollouts"]["harnesses"]["terminal"] = {"class_path": "north_lightning.harnesses.ReActTerminalHarness"}
    config["trainer"]["default_root_dir"] = str(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["predict", "--config", str(tmp_path / "recipe.yaml")]) == 0, capfd.readouterr().err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["attempted"], summary["verified"], summary["kept"]) == (8, 0, 0)
    assert (tmp_path / "samples.jsonl").read_text() == ""


def run_as_torchrun_would(folder: Path, arguments: list[str]) -> int:
    as_torchrun_would()
    os.chdir(folder)
    return cli.main(arguments)


def test_every_recipe_is_here() -> None:
    others = ("data_", "synthesise")  # which train nothing
    assert EDITS.keys() == {path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith(others)}


@pytest.mark.parametrize("name", EDITS)
def test_a_recipe_takes_a_step_and_releases_a_model(
    name: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    fit = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    EDITS[name](fit)
    fit["trainer"] |= {"default_root_dir": str(tmp_path / "run"), "max_steps": 1, "logger": False}
    fit["model"]["init_args"]["lr_scheduler"]["init_args"]["warmup_steps"] = 0  # or the only step had no learning rate
    run_dir = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fit))
    arguments = ["fit", "--config", str(tmp_path / "recipe.yaml")]
    if fit["trainer"]["devices"] == 1:
        assert cli.main(arguments) == 0, capfd.readouterr().err
    else:
        assert run_processes(2, run_as_torchrun_would, workplace, arguments) == [0, 0], capfd.readouterr().err

    before = load_file(workplace / fit["model"]["init_args"]["checkpoint"] / "model.safetensors")
    after = load_file(run_dir / "checkpoint" / "model.safetensors")
    assert after.keys() == before.keys()
    has_moved = any(not torch.equal(after[key].float(), before[key].float()) for key in before)
    assert has_moved == (name != "rl")  # random actions score 0 all alike: no advantage, no gradient
    if name == "rl":
        rollouts = [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]
        assert len(rollouts) >= 4
        assert {rollout["stop_reason"] for rollout in rollouts} == {"invalid_action"}
        (point,) = read_history(run_dir / "eval" / "points.jsonl")  # of held-out tasks, before the first step
        assert [point[name] for name in ("step", "eval/policy_version", "eval/num_attempts")] == [0, 0, 2]
    if name == "lora_1gpu":
        assert (run_dir / "checkpoint" / "adapter" / "adapter_config.json").is_file()
