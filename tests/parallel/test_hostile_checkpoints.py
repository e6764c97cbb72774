"""Checkpoints of strangers, torn ones and ones of another kind: nothing is run, and one line says what is wrong."""

import io
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from north_lightning.errors import CheckpointError
from north_lightning.parallel.checkpoints import ShardedCheckpoints
from north_lightning.parallel.single_file import DurableCheckpointIO, read_checkpoint
from north_lightning.run_folders import SHARDED_REST as REST


class RunsCode:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardedCheckpoints]:
    rendezvous = tmp_path_factory.mktemp("gloo") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    checkpoints = ShardedCheckpoints()
    yield checkpoints
    checkpoints.close()
    dist.destroy_process_group()


@pytest.fixture
def folder(checkpoints: ShardedCheckpoints, tmp_path: Path) -> Path:
    folder = tmp_path / "x.ckpt"
    checkpoints.save({"value": torch.ones(1000), "lr": 0.5}, {"global_step": 3}, folder)
    checkpoints.wait()
    return folder


def refused(checkpoints: ShardedCheckpoints, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load({"value": torch.zeros(1000), "lr": 0.0}, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_sharded_checkpoint_is_read_with_its_numbers(checkpoints: ShardedCheckpoints, folder: Path) -> None:
    state = {"value": torch.zeros(1000), "lr": 0.0}
    checkpoints.load(state, folder)
    assert (float(state["value"].sum()), state["lr"]) == (1000.0, 0.5)
    assert read_checkpoint(folder, is_sharded=True)["global_step"] == 3


def test_a_table_of_contents_runs_no_code(checkpoints: ShardedCheckpoints, folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (folder / ".metadata").write_bytes(pickle.dumps(RunsCode(mark)))
    assert "posix.mkdir" in refused(checkpoints, folder)
    assert not mark.exists()


def test_a_number_in_a_shard_runs_no_code(checkpoints: ShardedCheckpoints, folder: Path, tmp_path: Path) -> None:
    """Learning rates and the like are pickles within the shards; one of equal length takes the place of it."""
    mark, (shard,) = tmp_path / "m", folder.glob("*.distcp")
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == "lr")
    buffer = io.BytesIO()
    torch.save(RunsCode(mark), buffer)
    content = shard.read_bytes()
    place.offset, place.length = len(content), len(buffer.getvalue())
    shard.write_bytes(content + buffer.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    refused(checkpoints, folder)
    assert not mark.exists()


def test_a_table_of_contents_names_no_file_elsewhere(
    checkpoints: ShardedCheckpoints, folder: Path, tmp_path: Path
) -> None:
    (shard,) = folder.glob("*.distcp")
    shutil.move(shard, tmp_path / "elsewhere")
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    for place in metadata.storage_data.values():
        place.relative_path = "../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "outside of the folder" in refused(checkpoints, folder)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "gone"])
def test_a_torn_sharded_checkpoint_is_one_line(
    checkpoints: ShardedCheckpoints, folder: Path, name: str, damage: str
) -> None:
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": bytes(len(content))}[damage])
    assert str(folder) in refused(checkpoints, folder)


# ---- single files, and the other kind --------------------------------------------------------------------------------


def test_a_file_of_another_kind_or_torn_is_one_line_and_runs_nothing(tmp_path: Path) -> None:
    mark, whole = tmp_path / "mark", tmp_path / "whole.ckpt"
    DurableCheckpointIO().save_checkpoint({"global_step": 1, "state_dict": {"a": torch.ones(5000)}}, whole)
    assert read_checkpoint(whole)["global_step"] == 1
    content = whole.read_bytes()
    torch.save(RunsCode(mark), tmp_path / "code.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(content[:-500])
    (tmp_path / "short.ckpt").write_bytes(content[:100])
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(RunsCode(mark)))
    (tmp_path / "text.ckpt").write_text("not a checkpoint\n")
    (tmp_path / "folder.ckpt").mkdir()
    names = ("code", "list", "other", "cut", "short", "empty", "pickle", "text", "folder", "missing")
    for name in names:
        with pytest.raises(CheckpointError) as caught:
            DurableCheckpointIO().load_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
        assert f"{name}.ckpt" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_each_kind_says_where_the_other_one_goes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trainer\.strategy: NorthStrategy.*or begin from its weights.*export"):
        DurableCheckpointIO().load_checkpoint(folder)
    (tmp_path / "one.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"expected a folder.*leave trainer\.strategy out.*export"):
        read_checkpoint(tmp_path / "one.ckpt", is_sharded=True)
    assert (folder / REST).is_file()
