"""What earlier versions have left behind is read, or refused with the reason. ``fixtures/make.py`` wrote the files."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import quiet_trainer
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from north_lightning.errors import CheckpointError, DataError
from north_lightning.evaluation.attempts import read_attempts
from north_lightning.export.command import export_checkpoint
from north_lightning.model import load_checkpoint
from north_lightning.modules.resuming import KEY
from north_lightning.rollout.records import forget_unended

FORMAT1 = Path(__file__).parent / "fixtures" / "format1"

spec = importlib.util.spec_from_file_location("make", FORMAT1.parent / "make.py")
assert spec is not None
assert spec.loader is not None
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def test_a_run_goes_on_from_a_training_checkpoint_of_format_1(tmp_path: Path) -> None:
    module, data = make.make_run(FORMAT1)
    trainer = quiet_trainer(tmp_path, max_steps=3)
    trainer.fit(module, datamodule=data, ckpt_path=FORMAT1 / "file.ckpt", weights_only=True)
    assert trainer.global_step == 3
    before = torch.load(FORMAT1 / "file.ckpt", weights_only=True)["state_dict"]
    changes = [float((p.detach() - before[name]).abs().max()) for name, p in module.named_parameters()]
    assert 0 < max(changes) < 2e-3  # one step of AdamW at 1e-3 from there


@pytest.mark.parametrize("name", ["file.ckpt", "sharded.ckpt"])
def test_checkpoints_of_format_1_are_exported(name: str, tmp_path: Path) -> None:
    export_checkpoint(FORMAT1 / name, tmp_path / "out", tokenizer=FORMAT1 / "tokenizer")
    weights = dict(load_checkpoint(tmp_path / "out").named_parameters())
    if name == "file.ckpt":
        stored = torch.load(FORMAT1 / name, weights_only=True)["state_dict"]
    else:
        dcp_to_torch_save(FORMAT1 / name, tmp_path / "whole.pt")
        stored = torch.load(tmp_path / "whole.pt", weights_only=True)["model"]
    for weight, tensor in weights.items():
        torch.testing.assert_close(tensor.detach(), stored[f"model.{weight}"], msg=weight)


def test_rollouts_and_attempts_of_format_1_are_read(tmp_path: Path) -> None:
    (attempt,) = read_attempts(FORMAT1 / "attempts.jsonl")
    assert (attempt.task_id, attempt.reward) == ("task0", 1.0)
    shutil.copy(FORMAT1 / "rollouts.jsonl", tmp_path)
    forget_unended(tmp_path / "rollouts.jsonl", lambda group_id: "trained")
    assert (tmp_path / "rollouts.jsonl").read_text() == (FORMAT1 / "rollouts.jsonl").read_text()


@pytest.mark.parametrize("change", [lambda record: record.pop("format"), lambda record: record.update(format=2)])
def test_another_format_is_refused_with_the_reason(change: Callable[[dict], object], tmp_path: Path) -> None:
    content = torch.load(FORMAT1 / "file.ckpt", weights_only=True)
    change(content[KEY])
    torch.save(content, tmp_path / "file.ckpt")
    with pytest.raises(CheckpointError, match="format 1, got (one without a format|2)"):
        export_checkpoint(tmp_path / "file.ckpt", tmp_path / "out", tokenizer=FORMAT1 / "tokenizer")
    for name, read in (
        ("attempts.jsonl", read_attempts),
        ("rollouts.jsonl", lambda path: forget_unended(path, lambda group_id: "trained")),
    ):
        record = json.loads((FORMAT1 / name).read_text())
        change(record)
        (tmp_path / name).write_text(json.dumps(record) + "\n")
        with pytest.raises(DataError, match=f"{name}.*format 1"):
            read(tmp_path / name)
