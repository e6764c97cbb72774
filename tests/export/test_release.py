"""What ``export`` writes: every tensor where it belongs, in the dtype asked for, checked, and whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from full_disk import no_room
from releases import SERVABLE, make_checkpoint, tensors_of
from safetensors.torch import load_file, save_file

from north_lightning import cli
from north_lightning.errors import CheckpointError, DataError
from north_lightning.export import command
from north_lightning.export.command import export_checkpoint
from north_lightning.export.samples import sample_rows
from north_lightning.model import NorthConfig, load_checkpoint
from north_lightning.model.checkpoint import hf_shapes


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MAX_SHARD_BYTES", 60_000)


def assert_nothing_left(out: Path) -> None:
    assert [path.name for path in out.parent.iterdir() if "out" in path.name] == []


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unserved", "small_shards")
def test_a_release_is_everything_that_serving_needs(checkpoint: Path, inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_checkpoint(checkpoint, out, format="bf16")
    expected = tensors_of(checkpoint)
    written = tensors_of(out)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    shards = set(index["weight_map"].values())
    assert len(shards) > 3
    for shard in shards:
        held = load_file(out / shard)
        assert {name for name, place in index["weight_map"].items() if place == shard} == held.keys()
        assert sum(tensor.nbytes for tensor in held.values()) <= 60_000
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 5,
        "pad_token_id": 0,
        "eos_token_id": NorthConfig.load(checkpoint).eos_token_id,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.95,
    }
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert listed | {"SHA256SUMS"} == {path.name for path in out.iterdir()}
    assert os.access(out / "serve.sh", os.X_OK)
    report = json.loads((out / "release.json").read_text())
    assert report["format"] == "bf16"
    assert (report["check"]["kl"], report["check"]["top1"], report["check"]["logprob_difference"]) == (0.0, 1.0, 0.0)


@pytest.mark.usefixtures("unserved")
def test_two_exports_are_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        export_checkpoint(checkpoint, tmp_path / name / "out", format="fp8")
    for path in (tmp_path / "first" / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / "out" / path.name).read_bytes(), path.name


def test_a_dry_run_writes_nothing_and_says_how_much_it_would_be(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        cli.main(["export", f"--checkpoint={checkpoint}", f"--directory={out}", "--format=fp8", "--dry-run=true"]) == 0
    )
    shapes = hf_shapes(NorthConfig.load(checkpoint))
    num_experts = sum(".experts." in name for name in shapes)
    assert f"{len(shapes) + num_experts:,} tensors (fp8) in 1 files" in capsys.readouterr().out
    assert_nothing_left(out)


# ---- the check -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unserved")
@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize(
    "part", ["model.embed_tokens.weight", "model.layers.1.mlp.experts.3.down_proj.weight", "model.norm.weight"]
)
def test_one_wrong_bit_on_the_disk_fails_the_command(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, part: str
) -> None:
    write = command.write_shards

    def write_wrongly(shards: object, pieces: object, directory: Path) -> dict[str, str]:
        digests = write(shards, pieces, directory)  # type: ignore[arg-type]
        path = directory / "model.safetensors"
        content = bytearray(path.read_bytes())
        size = int.from_bytes(content[:8], "little")
        content[8 + size + json.loads(content[8 : 8 + size])[part]["data_offsets"][0]] ^= 1
        path.write_bytes(content)
        return digests

    monkeypatch.setattr(command, "write_shards", write_wrongly)
    out = tmp_path / "out"
    arguments = ["export", f"--checkpoint={checkpoint}", f"--directory={out}", f"--format={format}"]
    assert cli.main(arguments) == 1
    assert_nothing_left(out)


@pytest.mark.usefixtures("unserved")
def test_a_release_that_says_other_things_fails_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["export", f"--checkpoint={checkpoint}", f"--directory={out}", "--format=fp8"]
    assert cli.main([*arguments, "--max_kl=1e-9"]) == 1
    error = capsys.readouterr().err
    assert "expected a KL of at most 1e-09 nats per token, got" in error
    assert "max_kl" in error
    assert_nothing_left(out)


@pytest.mark.usefixtures("unserved")
def test_weights_that_are_not_finite_are_no_release(inputs: Path, tmp_path: Path) -> None:
    broken = make_checkpoint(inputs, tmp_path / "broken", SERVABLE)
    tensors = tensors_of(broken)
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 3] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        (CheckpointError, DataError), match=r"layers\.2\.self_attn\.o_proj\.weight: expected finite numbers"
    ):
        export_checkpoint(broken, tmp_path / "out", format="bf16")
    assert_nothing_left(tmp_path / "out")


def test_the_samples_are_those_of_the_run_unless_others_are_named(
    checkpoint: Path, inputs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "checkpoint").mkdir(parents=True)
    tokenizer = inputs / "tokenizer"
    (builtin,) = sample_rows(None, run / "checkpoint", tokenizer)
    (run / "config.yaml").write_text(
        f"data: {{init_args: {{sources: {{a: {{files: ['{inputs / 'names.jsonl'}']}}}}}}}}"
    )
    of_sft = sample_rows(None, run / "checkpoint", tokenizer)
    shutil.copy(Path(__file__).parents[1] / "fixtures" / "format1" / "rollouts.jsonl", run / "rollouts.jsonl")
    assert len(of_sft) == 16
    assert of_sft == sample_rows([inputs / "names.jsonl"], checkpoint, tokenizer) != [builtin]
    (tmp_path / "foreign.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match=r"samples: expected trajectories, found none in .*foreign\.jsonl"):
        sample_rows([tmp_path / "foreign.jsonl"], checkpoint, tokenizer)
    with pytest.raises(DataError, match=r"samples: .*none\.jsonl"):
        sample_rows([tmp_path / "none.jsonl"], checkpoint, tokenizer)


# ---- whole or absent -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unserved", "small_shards")
def test_a_disk_that_fills_up_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    for limit in (10_000, 50_000):
        with no_room(limit):
            assert cli.main(["export", f"--checkpoint={checkpoint}", f"--directory={tmp_path / 'out'}"]) == 1
        assert_nothing_left(tmp_path / "out")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert cli.main(["export", f"--checkpoint={checkpoint}", f"--directory={tmp_path / 'out'}"]) == 1
    assert "directory: expected 0.00 GB of free disk, got 0.00 GB" in capsys.readouterr().err
    assert_nothing_left(tmp_path / "out")


def test_a_release_is_where_a_stage_begins(checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "out", format="fp32", check=False)
    model = load_checkpoint(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "release.json").read_text())["check"] is None
