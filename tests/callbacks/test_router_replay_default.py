"""Router replay is on where the server can return the experts it visits, and is refused early where it cannot."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import quiet_trainer, write_run_inputs

from north_lightning.callbacks import SidecarCallback
from north_lightning.errors import ConfigError
from north_lightning.faults import FakeSidecar
from north_lightning.losses import CISPOLoss
from north_lightning.modules import CISPOModule
from north_lightning.sampling.sidecar import Sidecar

FLAG = "--enable-return-routed-experts"


class AbleSidecar(FakeSidecar):
    can_return_routed_experts = True

    def start(self) -> None:
        pass


class UnableSidecar(AbleSidecar):
    can_return_routed_experts = False


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "config.json").write_text("{}")
    return folder


def make_module(inputs: Path, **settings: object) -> CISPOModule:
    module = CISPOModule(
        CISPOLoss(),
        config=inputs / "model.json",
        tokenizer=inputs / "tokenizer",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        **settings,
    )
    module.checkpoint, module.model = inputs, SimpleNamespace(config=SimpleNamespace(vocab_size=400))
    return module


@pytest.mark.parametrize(
    ("sidecar", "asked", "replays"),
    [
        (AbleSidecar, None, True),
        (AbleSidecar, True, True),
        (AbleSidecar, False, False),
        (UnableSidecar, None, False),
        (UnableSidecar, False, False),
    ],
)
def test_replay_is_as_asked_and_else_as_the_server_can(inputs, tmp_path, sidecar, asked, replays):
    module = make_module(inputs, router_replay=asked)
    callback = SidecarCallback(sidecar, environments=({}, {"A": "1"}))
    trainer = quiet_trainer(tmp_path)
    trainer.datamodule = None
    callback.check_run(trainer, module, None)
    try:
        callback.on_fit_start(trainer, module)
        assert module.router_replay is replays
        assert [one.return_routed_experts for one in callback._sidecars] == [replays, replays]
    finally:
        callback.teardown(trainer, module, "fit")


def test_replay_that_the_server_cannot_give_is_refused_before_it_starts(inputs, tmp_path):
    with pytest.raises(ConfigError, match=r"model.router_replay: expected false .* got true"):
        SidecarCallback(UnableSidecar).check_run(quiet_trainer(tmp_path), make_module(inputs, router_replay=True), None)


@pytest.mark.parametrize(
    ("is_cpu", "extra"), [(True, ()), (False, ()), (False, ("--no-enable-return-routed-experts",))]
)
def test_the_server_is_asked_for_experts_only_where_it_can_return_them(monkeypatch, tmp_path, is_cpu, extra):
    monkeypatch.setattr("north_lightning.sampling.sidecar._is_cpu_build", lambda: is_cpu)
    sidecar = Sidecar(tmp_path, tmp_path / "log", extra_args=extra)
    assert sidecar.can_return_routed_experts == (not is_cpu and not extra)
    assert FLAG not in sidecar._command()
    sidecar.return_routed_experts = True
    assert FLAG in sidecar._command()
