"""Reading, writing and refusing ``cohere2_moe`` configs, against transformers' own config class."""

import json
from dataclasses import replace

import pytest
from transformers import Cohere2MoeConfig
from transformers_reference import TINY

from north_lightning.errors import CheckpointError, ConfigError
from north_lightning.model import NorthConfig

RELEASED = {
    "architectures": ["Cohere2MoeForCausalLM"],
    "model_type": "cohere2_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 49,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 768,
    "prefix_dense_intermediate_size": 3072,
    "prefix_dense_sliding_window_pattern": 1,
    "first_k_dense_replace": 1,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_shared_experts": 0,
    "expert_selection_fn": "sigmoid",
    "norm_topk_prob": False,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "rope_theta": 50000,
    "rms_norm_eps": 1e-06,
    "layer_norm_eps": 1e-05,
    "logit_scale": 1.0,
    "vocab_size": 262144,
    "max_position_embeddings": 500000,
    "bos_token_id": 5,
    "pad_token_id": 0,
    "eos_token_id": 255001,
    "torch_dtype": "bfloat16",
}


def transformers_config(**changes) -> Cohere2MoeConfig:
    return Cohere2MoeConfig(**{**TINY, **changes})


def saved(config: Cohere2MoeConfig) -> dict:
    return json.loads(config.to_json_string(use_diff=True))


def test_the_released_config_is_read_as_the_model_card_says():
    config = NorthConfig.from_hf(RELEASED)
    assert [i for i in range(49) if not config.is_sliding(i)] == list(range(0, 49, 4))
    assert [i for i in range(49) if config.is_dense(i)] == [0]
    assert [i for i in range(49) if not config.uses_rope(i)] == list(range(4, 49, 4))
    assert config.num_window_keys == 4097
    assert config.with_transformers_window().num_window_keys == 4096
    assert config.rope_theta == 50000.0
    assert config.rms_norm_eps == 1e-6
    assert not config.norm_topk_prob


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 2, "prefix_dense_sliding_window_pattern": 2},
        {"rms_norm_eps": None, "norm_topk_prob": True, "logit_scale": 0.0625},
        {"layer_types": ["full_attention"] * 5, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 2},
        {"num_key_value_heads": None, "prefix_dense_intermediate_size": None, "eos_token_id": [3, 4]},
        {"rope_theta": 10000.0, "sliding_window_pattern": 2},
    ],
)
def test_a_config_survives_transformers_ours_transformers(changes):
    theirs = transformers_config(**changes)
    ours = NorthConfig.from_hf(saved(theirs))
    assert list(ours.layer_types) == theirs.layer_types
    assert list(ours.mlp_layer_types) == theirs.mlp_layer_types
    back = Cohere2MoeConfig(**ours.to_hf())
    expected, actual = theirs.to_dict(), back.to_dict()
    if changes.get("prefix_dense_intermediate_size", 40) is None:
        expected["prefix_dense_intermediate_size"] = theirs.intermediate_size  # what it means to both
    different = {key for key in expected | actual if expected.get(key) != actual.get(key)}
    assert different <= {"architectures", "first_k_dense_replace", "dtype"}
    assert NorthConfig.from_hf(ours.to_hf()) == ours


def test_first_k_dense_replace_and_layer_lists_say_the_same():
    with_counts = NorthConfig.from_hf(RELEASED)
    lists = {"layer_types": list(with_counts.layer_types), "mlp_layer_types": list(with_counts.mlp_layer_types)}
    without_count = {key: value for key, value in RELEASED.items() if key != "first_k_dense_replace"}
    assert NorthConfig.from_hf(without_count | lists) == with_counts
    with pytest.raises(ConfigError, match="layer_types"):
        NorthConfig.from_hf(without_count | {"mlp_layer_types": lists["mlp_layer_types"]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_shared_experts", 2),
        ("expert_selection_fn", "softmax"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("tie_word_embeddings", False),
        ("model_type", "cohere2"),
        ("quantization_config", {"quant_method": "fp8"}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 50000}),
        ("hidden_size", 0),
        ("hidden_size", "2048"),
        ("num_key_value_heads", 5),
        ("head_dim", 127),
        ("num_experts_per_tok", 129),
        ("logit_scale", float("nan")),
        ("rms_norm_eps", -1.0),
        ("sliding_window", None),
        ("first_k_dense_replace", 50),
        ("layer_types", ["full_attention"] * 48),
        ("layer_types", ["chunked_attention"] * 49),
        ("mlp_layer_types", ["sparse"] * 48 + ["dense"]),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(key, value):
    changes = {key: value}
    if key == "mlp_layer_types":
        changes["layer_types"] = ["full_attention"] * 49
    with pytest.raises(ConfigError, match=key):
        NorthConfig.from_hf(RELEASED | changes)


def test_a_missing_key_means_what_it_means_to_transformers():
    """The family routes by softmax unless told otherwise: a config without the key is not North's."""
    without = {key: value for key, value in RELEASED.items() if key != "expert_selection_fn"}
    with pytest.raises(ConfigError, match="expert_selection_fn"):
        NorthConfig.from_hf(without)
    without = {key: value for key, value in RELEASED.items() if key not in ("logit_scale", "norm_topk_prob")}
    config = NorthConfig.from_hf(without)
    assert config.logit_scale == 0.0625
    assert config.norm_topk_prob


def test_two_rope_bases_that_disagree_are_refused():
    with pytest.raises(ConfigError, match="rope_theta"):
        NorthConfig.from_hf(RELEASED | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})


def test_load_names_what_is_wrong_with_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        NorthConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected JSON"):
        NorthConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="object"):
        NorthConfig.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    assert NorthConfig.load(tmp_path) == NorthConfig.load(tmp_path / "config.json") == NorthConfig.from_hf(RELEASED)


def test_the_window_convention_is_not_written_to_checkpoints():
    """It says how this trainer counts, not what the weights are."""
    config = replace(NorthConfig.from_hf(RELEASED), sliding_window_includes_current=True)
    assert "sliding_window_includes_current" not in config.to_hf()
    assert NorthConfig.from_hf(config.to_hf(), sliding_window_includes_current=True) == config
