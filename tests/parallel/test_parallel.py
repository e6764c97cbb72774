"""Any layout of processes computes what one process computes, and what one saves any other resumes.

Three launches in all, of two, one and four processes; see ``work`` for what they do and ``training`` for the reference.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import training
import work
from launch import run_processes
from small_runs import write_run_inputs
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from north_lightning.errors import ConfigError
from north_lightning.export.command import export_checkpoint
from north_lightning.history import read_history
from north_lightning.model import NorthConfig, NorthModel, load_checkpoint, named_hf_tensors, save_checkpoint
from north_lightning.parallel import ParallelSizes

LAYOUTS = [(count, name) for count, layouts in work.LAYOUTS.items() for name in layouts]
RESUMED = [(count, strategy) for count, strategies in work.RESUMED.items() for strategy in strategies]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Path:
    write_run_inputs(folder)
    torch.manual_seed(0)
    save_checkpoint(NorthModel(NorthConfig.load(folder / "model.json")), folder / "start")
    return folder


@pytest.fixture(scope="module")
def launched(inputs: Path, folder: Path) -> dict[int, list[dict[str, Any]]]:
    """What the processes of each launch returned, by rank."""
    return {count: run_processes(count, work.everything, inputs, folder) for count in (2, 1, 4)}


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Any]:
    return training.train_by_hand()


@pytest.fixture(scope="module")
def one_process(inputs: Path, folder: Path) -> Path:
    """The run that the others resume, in plain Lightning without a strategy."""
    work.fit(inputs, folder / "plain", None, work.LAST)
    return folder / "plain"


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(named_hf_tensors(load_checkpoint(checkpoint)))


def assert_all_close(actual: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(torch.as_tensor(actual[name]), tensor.detach(), rtol=0, atol=tolerance, msg=name)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "layout"), LAYOUTS)
def test_three_packed_steps_equal_one_process_that_takes_each_document_alone(
    launched: dict[int, Any], by_hand: dict[str, Any], count: int, layout: str
) -> None:
    for result in (of_rank["trained"][layout] for of_rank in launched[count]):
        assert result["losses"] == pytest.approx(by_hand["losses"], abs=1e-5)
        assert result["norms"] == pytest.approx(by_hand["norms"], rel=1e-5)
        assert_all_close(result["weights"], by_hand["weights"], 1e-5)


@pytest.mark.parametrize(("count", "layout"), LAYOUTS)
def test_any_split_of_a_step_into_ranks_and_micro_batches_has_the_same_gradient(
    launched: dict[int, Any], by_hand: dict[str, Any], count: int, layout: str
) -> None:
    """1, 2 or 4 rows at once, 4, 2 or 1 micro-batches."""
    assert all(gradient.abs().max() > 1e-3 for gradient in by_hand["gradients"].values())
    assert_all_close(launched[count][0]["trained"][layout]["gradients"], by_hand["gradients"], 1e-6)


def test_clipping_is_part_of_the_comparison(by_hand: dict[str, Any]) -> None:
    assert min(by_hand["norms"]) > 2 * training.MAX_NORM


def test_activations_in_bfloat16_stay_near(launched: dict[int, Any], by_hand: dict[str, Any]) -> None:
    result = launched[2][0]["bfloat16"]
    assert result["losses"] == pytest.approx(by_hand["losses"], rel=2e-2)
    assert result["losses"] != pytest.approx(by_hand["losses"], abs=1e-5)
    assert all(weight.dtype == "float32" for weight in result["weights"].values())


# ---- weights in and out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 4])
def test_a_checkpoint_is_read_in_parts_and_written_whole(
    launched: dict[int, Any], inputs: Path, folder: Path, count: int
) -> None:
    expected = tensors(inputs / "start")
    assert_all_close(tensors(folder / f"{count}-processes" / "read"), expected, 0.0)
    held = [of_rank["filled"]["held"] for of_rank in launched[count]]
    total = sum(tensor.numel() for tensor in expected.values())
    assert sum(held) == total * launched[count][0]["filled"]["copies"]
    assert max(held) < 1.1 * sum(held) / count  # evenly


def test_the_released_shape_is_cut_evenly_without_memory_for_any_of_it(launched: dict[int, Any]) -> None:
    held = [of_rank["released"] for of_rank in launched[4]]
    assert sum(held) == 30_484_303_872
    assert max(held) < 1.001 * sum(held) / 4


def test_random_weights_do_not_depend_on_the_layout(launched: dict[int, Any], folder: Path) -> None:
    two, four = (tensors(folder / f"{count}-processes" / "drawn") for count in (2, 4))
    assert_all_close(two, four, 0.0)
    assert two["model.embed_tokens.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(two["model.norm.weight"], torch.ones(32))


# ---- through Lightning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "strategy"), RESUMED)
def test_a_saved_state_resumes_on_any_layout_with_the_same_next_steps(
    launched: dict[int, Any], one_process: Path, folder: Path, count: int, strategy: dict[str, int]
) -> None:
    resumed = read_history(folder / work.run_name(count, strategy) / "history.jsonl")
    uninterrupted = read_history(folder / "whole" / "history.jsonl")[work.SAVED_AT :]
    assert [line["step"] for line in resumed] == [line["step"] for line in uninterrupted]
    same_layout = count == 2 and strategy == work.SAVED
    for key in ("train/loss", "train/grad_norm", "train/lr"):
        expected = [line[key] for line in uninterrupted]
        assert [line[key] for line in resumed] == (expected if same_layout else pytest.approx(expected, rel=1e-6))
    weights = tensors(folder / work.run_name(count, strategy) / "checkpoint")
    assert_all_close(weights, tensors(one_process / "checkpoint"), 1e-5)


def test_a_sharded_checkpoint_is_exported_as_torch_reads_it(launched: dict[int, Any], folder: Path) -> None:
    export_checkpoint(folder / "saved.ckpt", folder / "exported")
    dcp_to_torch_save(folder / "saved.ckpt", folder / "whole.pt")
    weights = torch.load(folder / "whole.pt", weights_only=True)["model"]
    exported = dict(load_checkpoint(folder / "exported").named_parameters())
    assert_all_close(exported, {name.removeprefix("model."): tensor for name, tensor in weights.items()}, 0.0)


def test_logged_numbers_are_those_of_all_processes(launched: dict[int, Any], one_process: Path, folder: Path) -> None:
    for line, expected in zip(
        read_history(folder / "whole" / "history.jsonl"), read_history(one_process / "history.jsonl"), strict=True
    ):
        keys = [key for key in expected if key.startswith(("train/", "val/"))]
        assert {key: line[key] for key in keys} == pytest.approx({key: expected[key] for key in keys}, rel=1e-5)
        assert ("experts/layer1/entropy" in line) == ("experts/layer1/entropy" in expected)


def test_reinforcement_learning_equals_one_process(launched: dict[int, Any], inputs: Path, folder: Path) -> None:
    work.reinforce(inputs, folder / "rl-plain", None)
    assert_all_close(tensors(folder / "rl-context" / "checkpoint"), tensors(folder / "rl-plain" / "checkpoint"), 1e-5)
    for line, expected in zip(
        read_history(folder / "rl-context" / "history.jsonl"),
        read_history(folder / "rl-plain" / "history.jsonl"),
        strict=True,
    ):
        keys = [key for key in expected if key.startswith("train/")]
        assert {key: line[key] for key in keys} == pytest.approx({key: expected[key] for key in keys}, rel=1e-4)


def test_the_command_line_trains_on_two_processes(
    launched: dict[int, Any], inputs: Path, one_process: Path, folder: Path
) -> None:
    assert [of_rank["cli"] for of_rank in launched[2]] == [0, 0]
    trained, start = tensors(folder / "cli" / "checkpoint"), tensors(inputs / "start")
    assert trained.keys() == start.keys()
    assert not any(torch.equal(trained[name], start[name]) for name in start)
    assert [line["step"] for line in read_history(folder / "cli" / "history.jsonl")] == [0, 1]


# ---- checkpoints and sizes -------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_state_of_the_moment_it_was_asked_for(launched: dict[int, Any]) -> None:
    assert launched[2][0]["misuse"]["loaded"] == ([1.0], {"step": 1})


def test_a_checkpoint_that_does_not_fit_or_is_not_there_is_refused(launched: dict[int, Any]) -> None:
    messages = launched[2][1]["misuse"]["messages"]
    assert "another" in messages["other name"]
    assert "nowhere" in messages["nothing there"]


def test_a_full_disk_of_one_process_is_an_error_of_all_and_the_checkpoint_before_it_loads(
    launched: dict[int, Any],
) -> None:
    for result in launched[2]:
        for limited in (0, 1):
            assert "could not write" in result["misuse"]["messages"][f"no room on {limited}"]
        assert result["misuse"]["loaded_after"] == [[1.0], [1.0]]


def test_a_checkpoint_is_removed_once_the_next_is_complete(launched: dict[int, Any]) -> None:
    assert launched[2][0]["misuse"]["left"] == ["next.ckpt"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"expert": 3, "shard": 2}, "strategy.expert: expected a divisor"), ({"tensor": 0}, "strategy.tensor: expected")],
)
def test_sizes_that_cannot_work_are_named(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelSizes(**sizes)
