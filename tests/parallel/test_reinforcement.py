"""Reinforcement learning on two processes is that of one: same loss, norms, weights, metrics, pushes and errors."""

from pathlib import Path
from typing import Any

import pytest
import reinforcing
import torch
from launch import run_processes
from small_runs import write_run_inputs

from north_lightning.history import read_history
from north_lightning.model import NorthConfig, NorthModel, load_checkpoint, save_checkpoint

LAYOUTS = [name for name, strategy in reinforcing.STRATEGIES.items() if strategy is not None]
PER_PROCESS = ("speed/", "experts/", "weights/push_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reinforcing")


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Path:
    write_run_inputs(folder)
    torch.manual_seed(0)
    save_checkpoint(NorthModel(NorthConfig.load(folder / "model.json")), folder / "start")
    return folder


@pytest.fixture(scope="module")
def one(inputs: Path, folder: Path) -> dict[str, Any]:
    return reinforcing.one_process(inputs, folder)


@pytest.fixture(scope="module")
def two(inputs: Path, folder: Path) -> list[dict[str, Any]]:
    """Of each process."""
    return run_processes(2, reinforcing.everything, inputs, folder)


def assert_same_history(actual: Path, expected: list[dict[str, Any]]) -> None:
    lines = read_history(actual / "history.jsonl")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, wanted in zip(lines, expected, strict=True):
        keys = [key for key in wanted if key != "time_s" and not key.startswith(PER_PROCESS)]
        assert {key: line[key] for key in keys} == pytest.approx({key: wanted[key] for key in keys}, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_norms_and_all_metrics_of_rollouts_are_those_of_one_process(
    two: list[dict[str, Any]], one: dict[str, Any], folder: Path, layout: str
) -> None:
    expected = read_history(folder / "one process" / "history.jsonl")
    norms = [line["train/grad_norm"] for line in expected]
    assert min(norms) == 0.0 < 0.2 < sorted(norms)[1]  # one batch has no signal
    assert {"rollout/pass@1", "rollout/terminal/pass@1", "train/mismatch_kl", "policy_lag/max"} <= expected[0].keys()
    assert_same_history(folder / layout, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_after_training_and_in_every_push_are_those_of_one_process(
    two: list[dict[str, Any]], one: dict[str, Any], folder: Path, layout: str
) -> None:
    first, second = (of_rank[layout] for of_rank in two)
    assert first["pushed"].keys() == one["pushed"].keys() == {1, 2}
    for version, tensors in one["pushed"].items():
        assert first["pushed"][version].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert first["pushed"][version][name] == pytest.approx(tensor, abs=1e-5), (version, name)
    trained, expected = (load_checkpoint(folder / name / "checkpoint") for name in (layout, "one process"))
    for (name, ours), theirs in zip(trained.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=name)
    assert first["published_at"] == second["published_at"] == one["published_at"] == {0: 0, 1: 2, 2: 4}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_process_0_has_a_queue_a_sidecar_and_a_transport(two: list[dict[str, Any]], layout: str) -> None:
    first, second = (of_rank[layout] for of_rank in two)
    assert first["trained"] == reinforcing.LAST * reinforcing.GROUPS_PER_BATCH
    assert first["started"] == 1
    assert (second["calls"], second["started"], second["pushed"]) == (0, 0, {})


def test_a_run_saved_on_one_layout_resumes_on_another_with_its_queue_and_versions(
    two: list[dict[str, Any]], one: dict[str, Any], folder: Path
) -> None:
    first, second = (of_rank["resumed"] for of_rank in two)
    assert first["trained"] == reinforcing.LAST * reinforcing.GROUPS_PER_BATCH
    assert first["published_at"] == second["published_at"] == {0: 0, 1: 2, 2: 3, 3: 4}  # the second on resuming
    resumed = read_history(folder / "resumed" / "history.jsonl")
    uninterrupted = read_history(folder / "one process" / "history.jsonl")[reinforcing.SAVED_AT :]
    assert [line["step"] for line in resumed] == [line["step"] for line in uninterrupted]
    for line, expected in zip(resumed, uninterrupted, strict=True):
        for key in ("train/loss", "train/grad_norm", "train/lr", "rollout/trained_tokens", "rollout/pass@1"):
            assert line[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), key


def test_every_process_takes_part_in_the_push_to_a_server_that_was_started_again(two: list[dict[str, Any]]) -> None:
    first, second = (of_rank["restarted"] for of_rank in two)
    assert first["started"] == 2
    assert first["published_at"] == second["published_at"] == {0: 0, 1: 2, 2: 3, 3: 4}
    assert first["pushed"].keys() == {1, 2, 3}
    assert all(tensors.keys() == first["pushed"][1].keys() for tensors in first["pushed"].values())


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("never_filled", "InfrastructureError", "rollout queue: expected 2 groups within 0 s"),
        ("dead_producer", "InfrastructureError", "the rollout process was killed by SIGKILL"),
        ("no_push", "WeightPushError", "not confirmed"),
        ("too_old", "TrainingError", "expected tokens at most 2 optimizer steps old, got 3"),
        ("no_sidecar", "SidecarError", "ended with exit code 1"),
    ],
)
def test_what_goes_wrong_on_process_0_ends_every_process_with_the_same_error(
    two: list[dict[str, Any]], fault: str, kind: str, message: str
) -> None:
    errors = [of_rank["raised"][fault] for of_rank in two]
    assert errors[0] == errors[1]
    assert errors[0][0] == kind
    assert message in errors[0][1]


def test_an_error_that_cannot_travel_arrives_as_one_of_its_kind(two: list[dict[str, Any]]) -> None:
    assert two[0]["raised"]["odd_error"] == ("Unpicklable", "this and that")
    assert two[1]["raised"]["odd_error"] == ("InfrastructureError", "Unpicklable: this and that")


def test_an_interrupt_of_process_0_ends_every_process_after_the_step_with_a_checkpoint(
    two: list[dict[str, Any]], folder: Path
) -> None:
    assert [of_rank["raised"]["interrupted"][0] for of_rank in two] == ["SIGTERMException"] * 2
    saved = torch.load(folder / "faults" / "interrupted.ckpt" / "trainer.pt", weights_only=True)
    assert saved["global_step"] == 3
    assert saved["RolloutDataModule"]["queue"]["num_trained"] == 3 * reinforcing.GROUPS_PER_BATCH
