"""doctor: what is missing is named with its remedy."""

import pytest

from north_lightning import doctor
from north_lightning.errors import ConfigError, InfrastructureError


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else real(name))


def test_a_machine_that_has_everything_passes(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.doctor()
    assert "MISSING" not in capsys.readouterr().out


def test_a_cuda_torchvision_beside_a_cpu_torch_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.13.0+cpu", torchvision="0.28.0")
    with pytest.raises(ConfigError, match="pip uninstall -y torchvision"):
        doctor.refuse_cuda_torchvision()


@pytest.mark.parametrize(
    ("torch", "torchvision"), [("2.13.0+cpu", "0.28.0+cpu"), ("2.13.0", "0.28.0"), ("2.13.0", None)]
)
def test_matching_builds_are_not_refused(monkeypatch: pytest.MonkeyPatch, torch: str, torchvision: str | None) -> None:
    pretend(monkeypatch, torch=torch, torchvision=torchvision)
    doctor.refuse_cuda_torchvision()


def test_what_is_missing_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InfrastructureError, match="tmux, bubblewrap"):
        doctor.doctor()
    assert "sudo apt-get install -y bubblewrap" in capsys.readouterr().out


def test_a_temporary_directory_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    with pytest.raises(InfrastructureError, match="temporary directory"):
        doctor.doctor()
    assert "set TMPDIR" in capsys.readouterr().out
