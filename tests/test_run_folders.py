"""Ways to lose work with a second command: each ends with the first one's files as they were, in place or beside it."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from small_runs import conversation, sft_config, write_run_inputs

from north_lightning import cli
from north_lightning.data import write_samples
from north_lightning.errors import ConfigError
from north_lightning.history import read_history
from north_lightning.run_folders import claim_run, newest_checkpoint

STEPS = 4


class Ended(NamedTuple):
    code: int
    err: str


Command = Callable[..., Ended]
Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in this process."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["north_lightning", *arguments])
        capfd.readouterr()
        torch.set_num_threads(1)
        try:
            code = cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, capfd.readouterr().err)

    return run


class Runs:
    """One place with the runs of a test: ``fit`` trains in its folder ``run``."""

    def __init__(self, place: Path, inputs: Path, command: Command) -> None:
        self.place, self.inputs, self._command = place, inputs, command
        self.run = place / "run"

    def fit(self, *arguments: str, edit: Callable[[dict[str, Any]], object] = lambda _: None) -> Ended:
        keep = {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 2, "save_top_k": -1}}
        config = sft_config(self.inputs, self.run, max_steps=STEPS)
        config["trainer"]["callbacks"] = [{"class_path": "HFCheckpoint"}, {"class_path": "RunSummary"}, keep]
        edit(config)
        path = self.place / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return self._command("fit", "--config", str(path), *arguments)


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has come to its end, to be copied."""
    place = tmp_path_factory.mktemp("finished")

    def run(*arguments: str) -> Ended:
        torch.set_num_threads(1)
        return Ended(cli.main(arguments), "")

    assert Runs(place, inputs, run).fit().code == 0
    return place / "run"


@pytest.fixture
def runs(tmp_path: Path, inputs: Path, command: Command, finished: Path) -> Runs:
    """With a finished run in its folder."""
    made = Runs(tmp_path, inputs, command)
    shutil.copytree(finished, made.run)
    config = made.run / "config.yaml"
    config.write_text(config.read_text().replace(str(finished), str(made.run)))
    return made


def contents(folder: Path, *but: str) -> Contents:
    """Every file below ``folder``, without those whose first part is in ``but``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.relative_to(folder).parts[0] not in (".lock", *but)
    }


def checkpoint(run: Path, step: int) -> Path:
    (path,) = (run / "checkpoints").glob(f"*step={step}.ckpt")
    return path


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def spoil(path: Path) -> None:
    """A byte in the middle, as a bad disk does."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


# ---- refused, with the choices -------------------------------------------------------------------------------------

LEFT_BY_A_RUN = (
    *("config.yaml", "finished.json", "history.jsonl", "summary.json", "rollouts.jsonl", "interrupted.ckpt"),
    *("checkpoint/config.json", "checkpoints/step=2.ckpt", "mine.ckpt", "resume/x.ckpt"),
)


@pytest.mark.parametrize("name", LEFT_BY_A_RUN)
def test_a_folder_with_anything_of_a_run_in_it_is_used(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match="is the work of an earlier run"):
        claim_run(tmp_path, [], overwrite=False)


def test_a_second_run_into_a_finished_one_is_refused_before_anything_is_written(runs: Runs) -> None:
    before = contents(runs.run)
    ended = runs.fit()
    assert ended.code == 1
    for choice in ("--resume auto", "--overwrite true", f"{runs.run}.1", "another --trainer.default_root_dir"):
        assert choice in ended.err
    assert len(ended.err[ended.err.index("error: ") :].splitlines()) <= 8
    assert contents(runs.run) == before


def elsewhere(runs: Runs, key: str) -> Callable[[dict[str, Any]], None]:
    """A new run folder whose checkpoints go where an earlier run's went."""
    place = runs.place / "kept"

    def edit(config: dict[str, Any]) -> None:
        config["trainer"]["default_root_dir"] = str(runs.place / "new")
        config["trainer"]["logger"]["init_args"]["save_dir"] = str(runs.place / "new")
        callback = {"HFCheckpoint": 0, "ModelCheckpoint": 2}[key]
        argument = "directory" if key == "HFCheckpoint" else "dirpath"
        config["trainer"]["callbacks"][callback].setdefault("init_args", {})[argument] = str(place)

    return edit


@pytest.mark.parametrize("key", ["HFCheckpoint", "ModelCheckpoint"])
def test_a_folder_of_checkpoints_that_another_run_has_filled_is_refused_or_moved(key: str, runs: Runs) -> None:
    shutil.copytree(runs.run / "checkpoint", runs.place / "kept")
    before = contents(runs.place / "kept")
    edit = elsewhere(runs, key)
    ended = runs.fit(edit=edit)
    assert ended.code == 1
    assert f"'{runs.place / 'kept'}' is the work of an earlier run" in ended.err
    assert contents(runs.place / "kept") == before
    assert runs.fit("--overwrite=true", edit=edit).code == 0
    assert contents(runs.place / "kept.1") == before


# ---- moved aside -----------------------------------------------------------------------------------------------------


def test_overwrite_moves_the_earlier_runs_aside_one_after_another(runs: Runs) -> None:
    first = contents(runs.run)
    assert runs.fit("--overwrite=true", "--seed_everything=1").code == 0
    second = contents(runs.run)
    assert runs.fit("--overwrite=true").code == 0
    assert contents(runs.place / "run.1") == first
    assert contents(runs.place / "run.2") == second


def test_overwrite_leaves_other_runs_in_the_folder_where_they_are(runs: Runs) -> None:
    shutil.copytree(runs.run, runs.run / "inner")
    inner = contents(runs.run / "inner")
    assert runs.fit("--overwrite=true").code == 0
    assert contents(runs.run / "inner") == inner


def test_overwrite_never_moves_the_folder_that_is_worked_in(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(runs.run)
    monkeypatch.chdir(runs.run)
    ended = runs.fit("--overwrite=true", "--trainer.default_root_dir=.")
    assert ended.code == 1
    assert "expected a folder of the run's own" in ended.err
    assert contents(runs.run) == before


def test_resume_and_overwrite_together_are_refused(runs: Runs) -> None:
    before = contents(runs.run)
    ended = runs.fit("--resume=auto", "--overwrite=true")
    assert ended.code == 1
    assert "resume and overwrite: expected one of them" in ended.err
    assert contents(runs.run) == before


# ---- gone on with ----------------------------------------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is(runs: Runs) -> None:
    before = contents(runs.run)
    ended = runs.fit("--resume=auto")
    assert ended.code == 0
    assert f"finished after {STEPS} steps: nothing to do" in ended.err
    assert contents(runs.run) == before


@pytest.mark.parametrize("fewer", [1, STEPS])
def test_a_finished_run_is_left_as_it_is_by_a_lower_limit_too(fewer: int, runs: Runs) -> None:
    before = contents(runs.run)
    assert runs.fit("--resume=auto", f"--trainer.max_steps={fewer}").code == 0
    assert contents(runs.run) == before


def test_a_finished_run_goes_on_to_a_higher_limit(runs: Runs) -> None:
    lines = read_history(runs.run / "history.jsonl")
    assert runs.fit("--resume=auto", "--trainer.max_steps=6").code == 0
    assert read_history(runs.run / "history.jsonl")[:STEPS] == lines
    assert json.loads((runs.run / "finished.json").read_text()) == {"steps": 6}


def test_a_finished_run_is_not_taken_for_that_of_other_settings(runs: Runs) -> None:
    before = contents(runs.run)
    ended = runs.fit("--resume=auto", "--model.max_grad_norm=0.5")
    assert ended.code == 1
    assert "finished with other settings (model.init_args.max_grad_norm)" in ended.err
    assert contents(runs.run) == before


def unfinish(run: Path) -> None:
    """As a kill in the last step leaves it."""
    (run / "finished.json").unlink()
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoint")
    checkpoint(run, STEPS).unlink()


@pytest.mark.parametrize("word", ["--resume=auto", "--resume=last", "--ckpt_path=last", "--resume=PATH"])
def test_a_stopped_run_goes_on_from_its_newest_checkpoint(word: str, runs: Runs) -> None:
    whole = contents(runs.run)
    unfinish(runs.run)
    assert runs.fit(word.replace("PATH", str(checkpoint(runs.run, 2)))).code == 0
    assert contents(runs.run)["checkpoint/model.safetensors"] == whole["checkpoint/model.safetensors"]
    assert [line["step"] for line in read_history(runs.run / "history.jsonl")] == list(range(STEPS))


def test_the_newest_checkpoint_may_be_interrupted_ckpt(runs: Runs) -> None:
    unfinish(runs.run)
    saved = torch.load(checkpoint(runs.run, 2), weights_only=True)
    torch.save(saved | {"global_step": 3}, runs.run / "interrupted.ckpt")
    assert newest_checkpoint([runs.run, runs.run / "checkpoints"]) == (runs.run / "interrupted.ckpt", 3)


def test_checkpoints_in_a_folder_of_their_own_are_found(runs: Runs) -> None:
    unfinish(runs.run)
    (runs.run / "checkpoints").rename(runs.place / "kept")

    def edit(config: dict[str, Any]) -> None:
        config["trainer"]["callbacks"][2]["init_args"]["dirpath"] = str(runs.place / "kept")

    ended = runs.fit("--resume=auto", edit=edit)
    assert ended.code == 0
    assert "step 2" in ended.err


@pytest.mark.parametrize("damage", [tear, spoil])
def test_a_damaged_checkpoint_is_left_out_and_the_one_before_it_is_taken(
    damage: Callable[[Path], None], runs: Runs
) -> None:
    whole = contents(runs.run)
    (runs.run / "finished.json").unlink()
    newest = checkpoint(runs.run, STEPS)
    damage(newest)
    ended = runs.fit("--resume=auto")
    assert ended.code == 0
    assert f"'{newest}' is torn and left out" in ended.err
    assert "step 2" in ended.err
    assert contents(runs.run)["checkpoint/model.safetensors"] == whole["checkpoint/model.safetensors"]


def test_a_torn_checkpoint_given_by_path_is_one_line(runs: Runs) -> None:
    unfinish(runs.run)
    before = contents(runs.run)
    tear(checkpoint(runs.run, 2))
    ended = runs.fit(f"--resume={checkpoint(runs.run, 2)}")
    assert ended.code == 1
    assert "expected a complete training checkpoint" in ended.err
    assert "Traceback" not in ended.err
    assert contents(runs.run, "checkpoints") == {
        name: data for name, data in before.items() if "checkpoints" not in name
    }


def test_a_run_without_a_checkpoint_begins_again_beside_what_it_had(runs: Runs) -> None:
    unfinish(runs.run)
    shutil.rmtree(runs.run / "checkpoints")
    before = contents(runs.run)
    ended = runs.fit("--resume=auto")
    assert ended.code == 0
    assert "begins at step 0" in ended.err
    assert contents(runs.place / "run.1") == before


def test_resume_auto_begins_in_a_new_folder(tmp_path: Path, inputs: Path, command: Command) -> None:
    runs = Runs(tmp_path, inputs, command)
    assert runs.fit("--resume=auto").code == 0
    assert (runs.run / "checkpoint" / "model.safetensors").is_file()


def test_going_back_to_an_earlier_checkpoint_is_refused_where_later_work_would_go(runs: Runs) -> None:
    (runs.run / "finished.json").unlink()
    before = contents(runs.run)
    back = checkpoint(runs.run, 2)
    ended = runs.fit(f"--ckpt_path={back}")
    assert ended.code == 1
    assert "is not the newest checkpoint of the run" in ended.err
    assert contents(runs.run) == before
    branch = runs.place / "branch"
    branches = [f"--ckpt_path={back}", f"--trainer.default_root_dir={branch}"]
    ended = runs.fit(*branches)  # whose history would still go into the run's
    assert ended.code == 1
    assert f"'{runs.run / 'history.jsonl'}' is the work of an earlier run" in ended.err
    assert runs.fit(*branches, f"--trainer.logger.save_dir={branch}").code == 0
    assert contents(runs.run) == before


def test_another_runs_checkpoint_is_refused_in_a_used_folder(runs: Runs) -> None:
    before = contents(runs.run)
    foreign = runs.place / "foreign.ckpt"
    shutil.copy(checkpoint(runs.run, STEPS), foreign)
    (runs.run / "finished.json").unlink()
    assert runs.fit(f"--resume={foreign}").code == 1
    assert contents(runs.run) == {name: data for name, data in before.items() if name != "finished.json"}


# ---- commands that run nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["--trainer.fast_dev_run=true", "--trainer.fast_dev_run=2", "--print_config"])
def test_a_trial_run_leaves_a_finished_one_as_it_is(argument: str, runs: Runs) -> None:
    before = contents(runs.place)
    ended = runs.fit(argument)
    assert ended.code == 0, ended.err
    assert contents(runs.place, "config.yaml") == {k: v for k, v in before.items() if k != "config.yaml"}


def test_a_trial_run_writes_no_release_elsewhere(runs: Runs) -> None:
    shutil.copytree(runs.run / "checkpoint", runs.place / "kept")
    before = contents(runs.place / "kept")
    ended = runs.fit("--trainer.fast_dev_run=true", edit=elsewhere(runs, "HFCheckpoint"))
    assert ended.code == 0, ended.err
    assert contents(runs.place / "kept") == before
    assert not (runs.place / "new").exists()


def test_validating_leaves_the_run_as_it_is(runs: Runs) -> None:
    before = contents(runs.run)
    path = runs.place / "config.yaml"
    path.write_text(yaml.safe_dump(sft_config(runs.inputs, runs.run)))
    runs._command("validate", "--config", str(path))
    assert contents(runs.run) == before


# ---- other commands --------------------------------------------------------------------------------------------------


def task_sets(place: Path) -> list[str]:
    one = "[{name: out, environment: terminal, split: train, count: 2}]"
    return ["tasks", "--output_dir", str(place), "--sets", one]


def tokenizer(place: Path, inputs: Path) -> list[str]:
    files, config = f"[{inputs / 'names.jsonl'}]", str(inputs / "model.json")
    return ["tokenizer", "--files", files, "--output_dir", str(place / "out"), "--model_config", config]


def filtered(place: Path, inputs: Path) -> list[str]:
    sources = f"{{names: {{files: [{inputs / 'names.jsonl'}]}}}}"
    return ["data", "filter", "--sources", sources, "--output_dir", str(place / "out")]


def block_list(place: Path, tmp_path: Path) -> list[str]:
    task = tmp_path / "benchmark" / "one"
    task.mkdir(parents=True, exist_ok=True)
    (task / "instruction.md").write_text("Do it, slowly and with care.")
    arguments = ["--name=b", "--source=s", "--date=2026-01-01", f"--task_dirs=[{task.parent}]"]
    return ["data", "blocklist", *arguments, "--output", str(place / "out" / "list.json")]


@pytest.mark.parametrize("which", ["tasks", "tokenizer", "data filter", "data blocklist"])
def test_a_command_refuses_to_replace_what_it_has_written_and_moves_it_aside_if_asked(
    which: str, tmp_path: Path, inputs: Path, command: Command
) -> None:
    make = {"tasks": lambda place, _: task_sets(place), "tokenizer": tokenizer, "data filter": filtered}
    place = tmp_path / "place"
    arguments = block_list(place, tmp_path) if which == "data blocklist" else make[which](place, inputs)
    ended = command(*arguments)
    assert ended.code == 0, ended.err
    (changed, *_) = (path for path in sorted((place / "out").rglob("*")) if path.is_file())
    changed.write_text(changed.read_text() + " ")  # somebody's work
    before = contents(place)
    ended = command(*arguments)
    assert ended.code == 1
    assert "--overwrite true" in ended.err
    assert contents(place) == before
    assert command(*arguments, "--overwrite=true").code == 0
    kept = {name.replace(".1", ""): data for name, data in contents(place).items() if ".1" in name}
    assert kept.items() <= before.items()
    assert kept[str(changed.relative_to(place))] == before[str(changed.relative_to(place))]


def test_a_report_keeps_the_earlier_one_beside_it(tmp_path: Path, inputs: Path, command: Command) -> None:
    config = sft_config(inputs, tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ["data", "report", "--config", str(path), "--output_dir", str(tmp_path / "out")]
    assert command(*arguments).code == 0
    before = contents(tmp_path / "out")
    assert command(*arguments).code == 0
    assert set(contents(tmp_path / "out")) == set(before)
    write_samples(inputs / "more.jsonl", [conversation("what is new", "this is", "more")])
    config["data"]["init_args"]["sources"]["names"]["files"].append(str(inputs / "more.jsonl"))
    path.write_text(yaml.safe_dump(config))
    assert command(*arguments).code == 0
    assert contents(tmp_path / "out")["data.json.1"] == before["data.json"]
