"""A recipe runs its stages in order, records them, and goes on where it stopped."""

import json

import pytest

from north_lightning.errors import ConfigError
from north_lightning.recipe import Stage, StageFailedError, run_recipe

HELP, BAD = "--help", "no-such-command"


def test_finished_stages_are_recorded_and_skipped(tmp_path, capfd):
    run_recipe(tmp_path, [Stage("first", HELP)])
    record = json.loads((tmp_path / "stages.json").read_text())
    assert record["first"]["seconds"] > 0
    capfd.readouterr()
    run_recipe(tmp_path, [Stage("first", HELP)])
    assert "finished earlier" in capfd.readouterr().out


def test_a_failed_stage_is_named_and_the_ones_before_it_stay_recorded(tmp_path):
    stages = [Stage("first", HELP), Stage("second", BAD), Stage("third", HELP)]
    with pytest.raises(StageFailedError, match="stage 'second' failed with exit code 2"):
        run_recipe(tmp_path, stages)
    record = json.loads((tmp_path / "stages.json").read_text())
    assert [name for name, stage in record.items() if "seconds" in stage] == ["first"]


def test_a_stage_whose_command_changed_runs_again(tmp_path):
    run_recipe(tmp_path, [Stage("first", HELP)])
    with pytest.raises(StageFailedError):
        run_recipe(tmp_path, [Stage("first", BAD)])


def test_an_edited_config_runs_its_stage_and_all_after_it_again(tmp_path, capfd):
    config = tmp_path / "config.yaml"
    config.write_text("a: 1\n")
    stages = [Stage("first", HELP), Stage("second", f"fit --help --config {config}"), Stage("third", HELP)]
    run_recipe(tmp_path, stages)
    config.write_text("a: 2\n")
    capfd.readouterr()
    run_recipe(tmp_path, stages)
    assert capfd.readouterr().out.count("finished earlier") == 1


def test_two_stages_of_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="names must differ"):
        run_recipe(tmp_path, [Stage("first", HELP), Stage("first", BAD)])
