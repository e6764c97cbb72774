"""Checkpoints in and out, against files that transformers writes and reads."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_north_config import RELEASED
from transformers import Cohere2MoeForCausalLM
from transformers_reference import make_reference, our_logits, ours_from, random_documents, reference_logits

from north_lightning.errors import CheckpointError, ConfigError
from north_lightning.model import NorthConfig, NorthModel, load_checkpoint, named_hf_tensors, save_checkpoint


@pytest.fixture
def saved(tmp_path):
    """A checkpoint as transformers writes it, in several shards."""
    make_reference().save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    return tmp_path / "theirs"


def tensors_of(directory) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("max_shard_bytes", [30_000, 10**9])
def test_transformers_ours_gives_the_same_tensors_under_the_same_names(saved, tmp_path, max_shard_bytes):
    save_checkpoint(load_checkpoint(saved), tmp_path / "ours", max_shard_bytes=max_shard_bytes)
    assert_same_tensors(tensors_of(tmp_path / "ours"), tensors_of(saved))


def test_ours_transformers_ours_gives_the_same_tensors_and_logits(tmp_path):
    torch.manual_seed(1)
    model = NorthModel(NorthConfig.from_hf(ours_from(make_reference()).config.to_hf()))
    save_checkpoint(model, tmp_path / "ours", max_shard_bytes=50_000)
    reference, report = Cohere2MoeForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert reference.dtype == torch.float32
    documents = random_documents([10])  # within the window: both conventions agree
    with torch.no_grad():
        expected = reference_logits(reference, documents)
        torch.testing.assert_close(our_logits(model, documents), expected, atol=1e-5, rtol=1e-5)
    reference.save_pretrained(tmp_path / "theirs")
    again = load_checkpoint(tmp_path / "theirs")
    assert again.config == model.config
    assert_same_tensors(dict(again.state_dict()), dict(model.state_dict()))


def test_shards_stay_below_the_limit_and_the_index_adds_up(saved, tmp_path):
    model = load_checkpoint(saved)
    save_checkpoint(model, tmp_path / "ours", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(saved).keys()
    shards = set(index["weight_map"].values())
    assert shards == {path.name for path in (tmp_path / "ours").glob("*.safetensors")}
    for shard in shards:
        tensors = load_file(tmp_path / "ours" / shard)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
        assert all(index["weight_map"][name] == shard for name in tensors)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert index["metadata"] == {"total_parameters": num_parameters, "total_size": 4 * num_parameters}


def test_the_released_shape_has_its_published_parameters_and_tensors():
    with torch.device("meta"):
        model = NorthModel(NorthConfig.from_hf(RELEASED))
    assert sum(parameter.numel() for parameter in model.parameters()) == 30_484_303_872
    names = [name for name, _ in named_hf_tensors(model)]
    assert len(names) == len(set(names)) == 18_730


def test_named_tensors_are_views_of_the_parameters():
    model = ours_from(make_reference())
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for name, tensor in named_hf_tensors(model):
        assert tensor.untyped_storage().data_ptr() in storages, name
        assert not tensor.requires_grad, name


def test_dtype_on_disk_and_in_memory_can_be_chosen(saved, tmp_path):
    model = load_checkpoint(saved)
    save_checkpoint(model, tmp_path / "half", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "half").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_checkpoint(tmp_path / "half").embedding_weight.dtype == torch.bfloat16
    full = load_checkpoint(tmp_path / "half", dtype=torch.float32)
    expected = model.embedding_weight.to(torch.bfloat16).float()
    assert torch.equal(full.embedding_weight, expected)


def test_tokenizer_files_travel_along(saved, tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    files = {"tokenizer.json": "{}", "tokenizer_config.json": "{}", "chat_template.jinja": "x", "training.log": "no"}
    for name, content in files.items():
        (source / name).write_text(content)
    model = load_checkpoint(saved)
    save_checkpoint(model, tmp_path / "ours", tokenizer_dir=source)
    expected = {*files, "config.json", "model.safetensors"} - {"training.log"}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == expected
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        save_checkpoint(model, tmp_path / "other", tokenizer_dir=saved)
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_replaces_a_checkpoint_and_nothing_else(saved, tmp_path):
    model = load_checkpoint(saved)
    with torch.no_grad():
        model.embedding.weight.zero_()
    save_checkpoint(model, saved)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert not tensors_of(saved)["model.embed_tokens.weight"].any()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(CheckpointError, match="will not replace"):
        save_checkpoint(model, tmp_path / "notes")
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"


def test_a_failed_save_leaves_the_old_checkpoint_and_no_debris(saved, tmp_path, monkeypatch):
    model, before = load_checkpoint(saved), tensors_of(saved)

    def disk_full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("north_lightning.model.checkpoint.write_config", disk_full)
    with pytest.raises(CheckpointError, match="could not write .*No space"):
        save_checkpoint(model, saved)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    assert_same_tensors(tensors_of(saved), before)


# ---- what is refused -----------------------------------------------------------------------------------------------


def edit_shard_with(directory, name, change):
    """Rewrite the shard that holds ``name`` after ``change(tensors)``."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    path = directory / index["weight_map"][name]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_directory_without_weights_is_refused(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copy(saved / "config.json", tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_checkpoint(tmp_path / "empty")


def test_a_missing_shard_is_named(saved):
    shard = sorted(saved.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_checkpoint(saved)


def test_a_truncated_shard_is_named(saved):
    shard = sorted(saved.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        load_checkpoint(saved)


def test_a_shard_without_a_tensor_of_the_index_is_named(saved):
    edit_shard_with(saved, "model.norm.weight", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_checkpoint(saved)


def test_another_shape_names_tensor_expected_and_got(saved):
    name = "model.layers.2.mlp.experts.7.down_proj.weight"
    edit_shard_with(saved, name, lambda tensors: tensors.update({name: torch.zeros(32, 15)}))
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.7\.down_proj.*\[32, 16\].*\[32, 15\]"):
        load_checkpoint(saved)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    make_reference().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.9.mystery"] = tensors.pop("model.layers.3.mlp.experts.0.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.experts\.0\.up_proj.*missing.*layers\.9\.mystery"):
        load_checkpoint(tmp_path)


def test_an_untied_head_is_refused_and_a_tied_one_accepted(tmp_path):
    make_reference().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    load_checkpoint(tmp_path)
    tensors["lm_head.weight"][3, 3] += 1.0
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_broken_index_is_named(saved, content):
    (saved / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load_checkpoint(saved)


def test_a_config_of_another_model_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"num_shared_experts": 1}))
    with pytest.raises(ConfigError, match="num_shared_experts"):
        load_checkpoint(saved)


def overwrite_and_end_at(directory, value, number):
    """Replace a checkpoint by one of ``value`` in a forked process that ends before its ``number``-th operation that
    renames or removes something; its exit code: 9, or 0 if it got through."""
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)
        model = load_checkpoint(directory)
        with torch.no_grad():
            model.embedding.weight.fill_(value)
        operations = iter(range(1, 1000))

        def end(event, _arguments):
            if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree") and next(operations) == number:
                os._exit(9)

        sys.addaudithook(end)
        try:
            save_checkpoint(model, directory)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_kill_at_any_operation_on_files_leaves_the_old_or_the_new_checkpoint(saved):
    before = float(load_checkpoint(saved).embedding_weight[0, 0])
    for number in range(1, 40):
        code = overwrite_and_end_at(saved, float(number), number)
        found = float(load_checkpoint(saved).embedding_weight[0, 0])
        assert found in (before, number)
        before = found
        if code == 0:
            break
    assert code == 0
    assert number > 4
    assert before == number
