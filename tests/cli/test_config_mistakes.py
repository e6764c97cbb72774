"""Mistakes in configs: a few lines with the key and the remedy, before anything is started or written."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import sft_config, write_run_inputs

from north_lightning import cli

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_inputs(tmp_path_factory.mktemp("inputs"))


SFT: dict[str, tuple[Edit, str]] = {
    "data for RL": (
        lambda c: c.update(
            data={
                "class_path": "RolloutDataModule",
                "init_args": {
                    "queue": {
                        "class_path": "north_lightning.rollout.WindowedFIFOQueue",
                        "init_args": {"groups_per_batch": 2, "max_batches_ahead": 1},
                    },
                    "groups_per_batch": 2,
                    "max_row_tokens": 100,
                    "num_batches": 4,
                },
            }
        ),
        "data.class_path: expected SFTDataModule",
    ),
    "a callback for RL": (
        lambda c: c["trainer"]["callbacks"].append({"class_path": "SamplerMetrics"}),
        "SamplerMetrics works with model.class_path CISPOModule",
    ),
}


@pytest.mark.parametrize("name", SFT)
def test_sft(
    name: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, expected = SFT[name]
    config = copy.deepcopy(sft_config(inputs, tmp_path / "run"))
    edit(config)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["north_lightning"])
    try:
        code = cli.main(["fit", "--config", str(path)])
    except SystemExit as end:
        code = int(end.code or 0)
    _, err = capfd.readouterr()
    assert code in (1, 2)
    assert expected in err
    assert len(err.splitlines()) <= 8
    assert not (tmp_path / "run").exists()
