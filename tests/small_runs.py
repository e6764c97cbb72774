"""Everything a run needs, small: a model's config, a tokenizer, conversations; and a trainer that is quiet."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from north_lightning.chat import train_tokenizer
from north_lightning.data import Conversation, write_samples
from north_lightning.types import Message

VOCAB_SIZE = 400

MODEL = {
    "model_type": "cohere2_moe",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 16,
    "prefix_dense_intermediate_size": 64,
    "prefix_dense_sliding_window_pattern": 1,
    "first_k_dense_replace": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 0,
    "expert_selection_fn": "sigmoid",
    "norm_topk_prob": False,
    "sliding_window": 15,
    "sliding_window_pattern": 2,
    "rope_theta": 50000,
    "rms_norm_eps": 1e-6,
    "logit_scale": 1.0,
    "max_position_embeddings": 2048,
    "bos_token_id": 5,
    "pad_token_id": 0,
}


def write_run_inputs(folder: Path) -> Path:
    """``model.json``, ``tokenizer/``, ``names.jsonl`` and ``sums.jsonl`` in ``folder``."""
    names = [conversation(f"call {name} by name", f"hello {name}", "names") for name in words(40)]
    sums = [conversation(f"add {i} and {i + 1}", f"that is {2 * i + 1}", "sums") for i in range(40)]
    texts = [message.content for sample in [*names, *sums] for message in sample.messages]
    tokenizer = train_tokenizer(texts, [], VOCAB_SIZE, folder / "tokenizer")
    (folder / "model.json").write_text(json.dumps(MODEL | {"eos_token_id": tokenizer.eos_id}))
    write_samples(folder / "names.jsonl", names)
    write_samples(folder / "sums.jsonl", sums)
    return folder


def conversation(question: str, answer: str, source: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", answer)), source=source)


def words(count: int) -> list[str]:
    return [f"{'bcdfgklm'[i % 8]}{'aeiou'[i % 5]}{'nrst'[i % 4]}{i}" for i in range(count)]


def sft_config(inputs: Path, run_dir: Path, **trainer: Any) -> dict[str, Any]:
    """A complete ``fit`` config for ``SFTModule``."""
    return {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": str(run_dir),
            "accelerator": "cpu",
            "max_steps": 4,
            "log_every_n_steps": 1,
            "logger": {"class_path": "JSONLHistory", "init_args": {"save_dir": str(run_dir)}},
            "callbacks": [{"class_path": "HFCheckpoint"}, {"class_path": "RunSummary"}, {"class_path": "Throughput"}],
            **trainer,
        },
        "model": {
            "class_path": "SFTModule",
            "init_args": {"config": str(inputs / "model.json"), "tokenizer": str(inputs / "tokenizer")},
        },
        "data": {
            "class_path": "SFTDataModule",
            "init_args": {
                "tokenizer": str(inputs / "tokenizer"),
                "row_tokens": 256,
                "sources": {
                    "names": {"files": [str(inputs / "names.jsonl")], "share": 0.5},
                    "sums": {"files": [str(inputs / "sums.jsonl")], "share": 0.5},
                },
            },
        },
    }


def quiet_trainer(run_dir: Path, **settings: Any) -> Trainer:
    """Plain Lightning on one CPU process, with nothing but what ``settings`` add."""
    defaults: dict[str, Any] = {
        "default_root_dir": run_dir,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(**{**defaults, **settings})
