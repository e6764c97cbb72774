"""What the README shows is what runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from scripted_vllm import play
from small_runs import write_run_inputs

from north_lightning import cli
from north_lightning.chat import ChatFormat, NorthTokenizer
from north_lightning.model import NorthConfig, NorthModel, save_checkpoint
from north_lightning.tasks import load_task, solution_steps, write_task
from north_lightning.tasks.terminal import terminal_task
from north_lightning.types import AssistantAction, ToolCall
from north_lightning.views.report import markdown_table

ROOT = Path(__file__).parents[1]


def shown(kind: str) -> str:
    """The block of this language in the README's section on rewards."""
    section = (ROOT / "README.md").read_text().split("## Write a reward in ten lines")[1].split("\n## ")[0]
    (block,) = re.findall(rf"```{kind}\n(.*?)```", section, flags=re.S)
    return block


def small_run(folder: Path) -> dict:
    """What ``rl.yaml`` is changed in for two small steps with a scripted server: everything but the verifier."""
    inputs = write_run_inputs(folder / "inputs")
    torch.manual_seed(0)
    model = NorthModel(NorthConfig.from_hf(json.loads((inputs / "model.json").read_text())))
    save_checkpoint(model, folder / "start", tokenizer_dir=inputs / "tokenizer")
    task = load_task(write_task(terminal_task(0, 0, "train"), folder / "tasks"))
    calls = [ToolCall(str(i), name, arguments) for i, (name, arguments) in enumerate(solution_steps(task))]
    turns = [*(AssistantAction(tool_calls=(call,)) for call in calls), AssistantAction(content="Done.")]
    chat = ChatFormat(NorthTokenizer.load(inputs / "tokenizer"), reasoning=False)
    play([chat.encode_action(turn) for turn in turns])

    fit = yaml.safe_load((folder / "rl.yaml").read_text())
    callbacks = fit["trainer"]["callbacks"]
    callbacks[:] = [
        one for one in callbacks if one["class_path"] != "OnlineEvaluation"
    ]  # which has a server of its own
    fit["trainer"] |= {"default_root_dir": str(folder / "run"), "max_steps": 2, "logger": False}
    callbacks[0]["init_args"]["sidecar"]["class_path"] = "scripted_vllm.ScriptedSidecar"
    callbacks[2]["init_args"] |= {
        "task_sets": [str(folder / "tasks")],
        "group_size": 4,
        "max_concurrent_groups": 2,
        "environment_weights": None,
    }
    for settings in (callbacks[0]["init_args"]["sidecar"]["init_args"], callbacks[2]["init_args"]["rollouts"]):
        settings |= {key: 2000 for key in ("max_model_len", "max_context_tokens", "max_turn_tokens") if key in settings}
    fit["model"]["init_args"]["checkpoint"] = str(folder / "start")
    fit["model"]["init_args"]["lr_scheduler"]["init_args"]["warmup_steps"] = 1
    fit["data"]["init_args"] |= {"num_batches": 2}
    fit["data"]["init_args"]["queue"]["init_args"]["groups_per_batch"] = 1
    return fit


def test_the_readmes_reward_goes_from_an_empty_file_to_fit_with_one_changed_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program, line = shown("python"), shown("yaml")
    assert len(program.splitlines()) <= 10
    assert line.count("\n") == 1
    plugin = tmp_path / "plugins" / "verifiers" / "short.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(program)
    recipe = (ROOT / "configs" / "quickstart" / "rl.yaml").read_text()
    (old,) = re.findall(r"^ *verifier: .*\n", recipe, flags=re.M)
    (tmp_path / "rl.yaml").write_text(recipe.replace(old, line))
    monkeypatch.chdir(tmp_path)

    fit = small_run(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(fit))
    assert cli.main(["fit", "--config", "small.yaml"]) == 0, capfd.readouterr().err

    rollouts = [json.loads(row) for row in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) >= 8
    solved = [rollout for rollout in rollouts if rollout["reward"] > 0]
    assert 0 < len(solved) < len(rollouts)
    assert {len(rollout["turns"]) for rollout in rollouts if rollout not in solved} == {1}
    for rollout in solved:
        assert rollout["reward"] == pytest.approx(0.99 ** len(rollout["turns"]))


def test_the_table_of_results_is_what_report_printed() -> None:
    report = json.loads((ROOT / "tests" / "benchmarks" / "results" / "quickstart_cpu.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert markdown_table(report["heldout"]) in readme
    low, high = (100 * end for end in report["paired_gain"]["ci95"])
    gain = (
        f"{100 * report['paired_gain']['pass@1']:+.1f} points of pass@1, paired 95% interval [{low:+.1f}, {high:+.1f}]"
    )
    assert gain in " ".join(readme.split())
