"""A validation that a kill interrupts is made up when the run goes on, and everyone who looks at its metric sees it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flag_runs import EPOCH, Flag, run, write_inputs
from lightning.pytorch import callbacks as c

from north_lightning.callbacks import OwedValidation


class Killed(BaseException):
    """No callback saves anything after it, as after a kill."""


class KillInValidation(c.Callback):
    def __init__(self, after: int) -> None:
        self.left = after

    def on_validation_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def fit(inputs: Path, folder: Path, trainer: Any, *more: Any, ckpt: Path | None = None) -> tuple[Any, dict[str, Any]]:
    best = c.ModelCheckpoint(folder / "best", monitor="val/loss", save_top_k=-1)
    latest = c.ModelCheckpoint(folder / "latest", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    early = c.EarlyStopping("val/loss", patience=99, min_delta=9.0)
    seen = run("sft", inputs, folder, Flag(trainer, callbacks=[OwedValidation(), best, latest, early, *more]), ckpt)
    assert not seen.error
    facts = {
        "history": [{name: value for name, value in line.items() if name != "time_s"} for line in seen.history],
        "best": {Path(path).name: float(score) for path, score in best.best_k_models.items()},
        "waited": early.wait_count,
    }
    return seen, facts


PLANS: dict[str, tuple[dict[str, Any], int, int]] = {
    "within an epoch": ({"val_check_interval": 2, "max_steps": 5}, 2, 0),
    "the second": ({"val_check_interval": 2, "max_steps": 5}, 4, 1),
    "at the end of an epoch": ({"max_steps": 8}, EPOCH, 0),
    "at the end of the last epoch": ({"max_steps": -1, "max_epochs": 2}, 2 * EPOCH, 1),
    "after the last step": ({"val_check_interval": 2, "max_steps": 4}, 4, 1),
    "every second epoch": ({"limit_train_batches": 2, "check_val_every_n_epoch": 2, "max_steps": 6}, 4, 0),
    "by all batches": (
        {"check_val_every_n_epoch": None, "val_check_interval": 4, "limit_train_batches": 3, "max_steps": 6}, 4, 0
    ),
    "accumulated": ({"accumulate_grad_batches": 2, "val_check_interval": 4, "max_steps": 3}, 2, 0),
}  # fmt: skip
"""Settings; the step whose validation is interrupted; how many have been before."""


IN_DEFAULT_RUN = ("within an epoch", "after the last step")


@pytest.mark.parametrize(
    ("plan", "num_batches"),
    [
        pytest.param(plan, number, marks=[] if plan in IN_DEFAULT_RUN and number == 0 else [pytest.mark.long])
        for plan in PLANS
        for number in (0, 1)
    ],
)
def test_an_interrupted_validation_is_made_up(plan: str, num_batches: int, inputs: Path, tmp_path: Path) -> None:
    settings, step, before = PLANS[plan]
    settings = {"limit_val_batches": 2, **settings}
    whole, expected = fit(inputs, tmp_path / "whole", settings)
    assert step in whole.validated
    with pytest.raises(Killed):
        fit(inputs, tmp_path / "run", settings, KillInValidation(2 * before + num_batches))
    saved = tmp_path / "run" / "latest" / f"step={step}.ckpt"
    assert max(torch.load(path, weights_only=True)["global_step"] for path in saved.parent.iterdir()) == step
    seen, facts = fit(inputs, tmp_path / "run", settings, ckpt=saved)
    assert seen.validated[0] == step
    assert seen.steps in (0, whole.steps)
    assert json.dumps(facts) == json.dumps(expected)
    assert all(torch.equal(seen.weights[name], tensor) for name, tensor in whole.weights.items())
