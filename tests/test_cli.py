"""The command line: every shipped config parses, mistakes are explained, a SIGTERM loses nothing."""

import copy
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import sft_config, write_run_inputs

from north_lightning import cli
from north_lightning.history import read_history

ROOT = Path(__file__).parent.parent
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["north_lightning", *arguments])
        capfd.readouterr()
        try:
            code = cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return run


def write(config: dict[str, Any], path: Path) -> str:
    path.write_text(yaml.safe_dump(config))
    return str(path)


# ---- help and configs ------------------------------------------------------------------------------------------------


def test_the_overview_lists_every_command_with_a_line(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = run_cli("--help")
    assert code == 0
    for name in [*cli.TRAINING, *cli.UTILITIES]:
        assert any(re.match(rf"  {name}  +\S+ \S+", line) for line in out.splitlines())


@pytest.mark.parametrize("command", cli.UTILITIES)
def test_every_utility_explains_itself_and_takes_a_config(
    command: str, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = run_cli(*command.split(), "--help")
    assert code == 0, err
    assert "--config" in out


def shipped_configs() -> list[Path]:
    return sorted((ROOT / "configs").rglob("*.yaml"))


def command_of(config: Path) -> str:
    """The recipe's command for a config of a stage, ``fit``, or the command that a config is named after."""
    recipe = yaml.safe_load((ROOT / "configs/quickstart/recipe.yaml").read_text())
    for stage in recipe["stages"]:
        command, *arguments = stage["command"].split()
        if str(config.relative_to(ROOT)) in arguments:
            return command
    if config.stem == "synthesise":
        return "predict"
    if config.parent.name == "tasks":
        return "tasks build"
    if config.parent.name == "eval":
        return "test"
    if config.parent.name == "north_mini" and not config.stem.startswith("data_"):
        return "fit"
    return config.stem.replace("_", " ")


@pytest.mark.parametrize("config", shipped_configs(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_says_what_it_is_for_and_parses(
    config: Path, run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    first = config.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert "CPU" in first or "GPU" in first
    code, out, err = run_cli(*command_of(config).split(), "--config", str(config), "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)


@pytest.mark.parametrize("command", cli.TAKES_TRAINING_CONFIG)
@pytest.mark.parametrize("config", ["north_mini/sft_stage1", "quickstart/sft_stage2"])
def test_commands_about_data_take_the_config_that_is_trained_with(
    command: str, config: str, run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / f"configs/{config}.yaml"
    code, out, err = run_cli(*command.split(), "--config", str(path), "--print_config")
    assert code == 0, err
    sources = yaml.safe_load(path.read_text())["data"]["init_args"]["sources"]
    assert yaml.safe_load(out)["data"]["init_args"]["sources"].keys() == sources.keys()
    assert "beam" in run_cli(*command.split(), "--config", str(path), "--data.beam", "1")[2]


# ---- mistakes --------------------------------------------------------------------------------------------------------


def in_model(config: dict[str, Any]) -> dict[str, Any]:
    return config["model"]["init_args"]


MISTAKES: dict[str, tuple[Edit, str]] = {
    "model": (lambda c: in_model(c).update(max_gradnorm=1), "did you mean 'max_grad_norm'?"),
    "trainer": (lambda c: c["trainer"].update(max_step=1), "did you mean 'trainer.max_steps'?"),
    "top level": (lambda c: c.update(modell=3), "did you mean 'model'?"),
    "data": (lambda c: c["data"]["init_args"].update(row_token=9), "did you mean 'row_tokens'?"),
    "class": (lambda c: c["model"].update(class_path="SFTModul"), "did you mean 'SFTModule'?"),
    "class path": (
        lambda c: c["model"].update(class_path="north_lightning.modules.SFTModul"),
        "did you mean 'SFTModule'?",
    ),
    "callback": (
        lambda c: c["trainer"]["callbacks"].append({"class_path": "StopAtLoss", "init_args": {"los": 1.0}}),
        "did you mean 'loss'?",
    ),
    "optimizer": (
        lambda c: in_model(c).update(
            optimizer={"class_path": "torch.optim.AdamW", "init_args": {"betaz": [0.9, 0.95]}}
        ),
        "did you mean 'betas'?",
    ),
    "back end": (lambda c: in_model(c).update(compute={"attention": "flesh"}), "flesh"),
    "type": (lambda c: in_model(c).update(max_grad_norm="much"), "expected float, got much"),
    "empty block, model": (lambda c: in_model(c).update(max_gradnorm={}), "did you mean 'max_grad_norm'?"),
    "empty block, trainer": (lambda c: c["trainer"].update(max_step={}), "did you mean 'trainer.max_steps'?"),
    "empty block, top level": (lambda c: c.update(modell={}), "did you mean 'model'?"),
    "empty block, callback": (
        lambda c: c["trainer"]["callbacks"].append({"class_path": "StopAtLoss", "init_args": {"loss": 1.0, "los": {}}}),
        "did you mean 'loss'?",
    ),
    "empty block, source": (
        lambda c: c["data"]["init_args"]["sources"]["names"].update(file={}),
        "did you mean 'files'?",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_config_is_explained_in_a_few_lines(
    mistake: str, inputs: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    edit, expected = MISTAKES[mistake]
    config = copy.deepcopy(sft_config(inputs, tmp_path / "run"))
    edit(config)
    code, _, err = run_cli("fit", "--config", write(config, tmp_path / "config.yaml"))
    assert code == 2
    assert expected in err
    assert len(err.splitlines()) <= 8
    assert "Traceback" not in err


UTILITY_MISTAKES: dict[str, tuple[Edit, str]] = {
    "top level": (lambda c: c.update(stage=3), "did you mean 'stages'?"),
    "empty block": (lambda c: c.update(stage={}), "did you mean 'stages'?"),
    "empty block in an empty block": (lambda c: c.update(stage={"name": {}}), "did you mean 'stages'?"),
    "empty block in a list": (lambda c: c["stages"][0].update(comand={}), "did you mean 'command'?"),
}


@pytest.mark.parametrize("mistake", UTILITY_MISTAKES)
def test_a_mistake_in_the_config_of_a_utility_is_explained_too(
    mistake: str, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    edit, expected = UTILITY_MISTAKES[mistake]
    config = {"run_dir": str(tmp_path / "run"), "stages": [{"name": "one", "command": "--help"}]}
    edit(config)
    code, _, err = run_cli("recipe", "--config", write(config, tmp_path / "config.yaml"))
    assert code == 2
    assert expected in err
    assert not (tmp_path / "run").exists()


def test_an_empty_block_under_a_known_key_is_accepted(
    inputs: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    config = sft_config(inputs, tmp_path / "run")
    config["trainer"]["callbacks"] = [{"class_path": "HFCheckpoint", "init_args": {}}]
    config["data"]["init_args"]["sources"] = {}
    code, out, err = run_cli("fit", "--config", write(config, tmp_path / "config.yaml"), "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["data"]["init_args"]["sources"] == {}


def test_an_abbreviated_argument_is_a_mistake(
    inputs: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    config = write(sft_config(inputs, tmp_path / "run"), tmp_path / "config.yaml")
    code, _, err = run_cli("fit", "--config", config, "--trainer.max_step=3")
    assert code == 2
    assert "did you mean 'trainer.max_steps'?" in err


def test_an_unknown_command_gets_a_suggestion(run_cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run_cli("fti")
    assert code == 2
    assert "Did you mean 'fit'?" in err


ERRORS: dict[str, tuple[Edit, str]] = {
    "missing checkpoint": (
        lambda c: (in_model(c).pop("config"), in_model(c).update(checkpoint="no/such/folder")),
        "no/such/folder",
    ),
    "missing model config": (lambda c: in_model(c).update(config="no/such.json"), "no/such.json"),
    "missing tokenizer": (lambda c: in_model(c).update(tokenizer="no/such/tokenizer"), "no/such/tokenizer"),
    "clipping in two places": (lambda c: c["trainer"].update(gradient_clip_val=1.0), "model.max_grad_norm"),
    "missing data": (
        lambda c: c["data"]["init_args"]["sources"]["names"].update(files=["no/such.jsonl"]),
        "no/such.jsonl",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_ours_is_one_message_without_a_traceback(
    name: str, inputs: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    edit, expected = ERRORS[name]
    config = copy.deepcopy(sft_config(inputs, tmp_path / "run"))
    edit(config)
    code, _, err = run_cli("fit", "--config", write(config, tmp_path / "config.yaml"))
    assert code == 1
    message = err[err.index("error: ") :]
    assert expected in message
    assert "Traceback" not in err


# ---- plug-ins --------------------------------------------------------------------------------------------------------


def test_a_plugin_on_the_plugin_path_is_chosen_by_class_path(
    inputs: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my_plugins"
    folder.mkdir()
    (folder / "counting_plugin.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Shout(Callback):\n"
        "    def __init__(self, word: str) -> None:\n"
        "        self.word = word\n"
        "    def on_train_start(self, trainer, pl_module) -> None:\n"
        "        print(self.word.upper())\n"
    )
    monkeypatch.setenv("NORTH_PLUGINS", str(folder))
    monkeypatch.setattr(sys, "path", list(sys.path))
    config = sft_config(inputs, tmp_path / "run", max_steps=1)
    config["trainer"]["callbacks"].append({"class_path": "counting_plugin.Shout", "init_args": {"word": "hello"}})
    code, out, err = run_cli("fit", "--config", write(config, tmp_path / "config.yaml"))
    assert code == 0, err
    assert "HELLO" in out


def test_a_plugin_folder_that_does_not_exist_is_an_error(
    run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NORTH_PLUGINS", "/no/such/plugins")
    code, _, err = run_cli("doctor")
    assert code == 1
    assert "/no/such/plugins" in err


# ---- a whole run, interrupted ----------------------------------------------------------------------------------------


def start(*arguments: str, plugins: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "north_lightning", "fit", *arguments, "--num_threads=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"NORTH_PLUGINS": str(plugins)} if plugins else {})
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def wait_for_steps(process: subprocess.Popen[str], history: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while not (history.exists() and len(read_history(history)) >= count):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_second_interrupt_ends_the_run_at_once(inputs: Path, tmp_path: Path) -> None:
    """The first one is waited out by a step that never ends: a plug-in's."""
    run_dir = tmp_path / "run"
    config = sft_config(inputs, run_dir, max_steps=100_000)
    config["trainer"]["callbacks"].append({"class_path": "stuck_callback.Stuck"})
    (tmp_path / "stuck_callback.py").write_text(STUCK)
    process = start("--config", write(config, tmp_path / "run.yaml"), plugins=tmp_path)
    wait_for_steps(process, run_dir / "history.jsonl", 2)
    time.sleep(1)  # the step that never ends has begun
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert not (run_dir / "interrupted.ckpt").exists()


STUCK = """
import time
from lightning.pytorch import Callback

class Stuck(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            for _ in range(600):
                time.sleep(0.1)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resumed_run_equals_an_uninterrupted_one(
    number: int, code: int, inputs: Path, tmp_path: Path
) -> None:
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    config = write(sft_config(inputs, interrupted, max_steps=100_000), tmp_path / "interrupted.yaml")
    process = start("--config", config)
    history = interrupted / "history.jsonl"
    wait_for_steps(process, history, 3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    (line,) = [line for line in output.splitlines() if "resume with --resume auto" in line]
    assert line.endswith(f": python -m north_lightning fit --config {config} --num_threads=1 --resume auto")

    saved = torch.load(interrupted / "interrupted.ckpt", weights_only=True)
    steps = saved["global_step"] + 3
    resumed = start(
        "--config", config, f"--ckpt_path={interrupted / 'interrupted.ckpt'}", f"--trainer.max_steps={steps}"
    )
    straight = start("--config", write(sft_config(inputs, whole, max_steps=steps), tmp_path / "whole.yaml"))
    for process in (resumed, straight):
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    ours, expected = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (interrupted, whole))
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())
    assert [line["step"] for line in read_history(history)] == list(range(steps))
    assert [line["train/loss"] for line in read_history(history)] == [
        line["train/loss"] for line in read_history(whole / "history.jsonl")
    ]


@pytest.mark.parametrize(
    ("folder", "count", "expected"), [("/dev/null/x", 1, "/dev/null/x"), ("/dev/null/x", 0, "at least 1, got 0")]
)
def test_a_path_that_cannot_be_and_an_empty_task_set_are_one_line(
    folder: str, count: int, expected: str, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    one = f"[{{name: a, environment: swe, split: train, count: {count}}}]"
    code, _, err = run_cli("tasks", "--output_dir", folder, "--sets", one)
    assert code == 1
    assert err.startswith("error: ")
    assert expected in err
    assert "Traceback" not in err
