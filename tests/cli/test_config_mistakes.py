"""Mistakes in configs: a few lines with the key and the remedy, before anything is started or written."""

import json
from pathlib import Path
from typing import Any

import pytest
from mistaken_runs import as_yaml, base_config, edit, run, write_inputs

from north_lightning.parser import check_values
from north_lightning.sampling.sidecar import Sidecar

MAX_LINES = 8
ADAMW = "torch.optim.AdamW"

# What the command is about, edits of its config (path, value, ...), and what the answer must say.
MISTAKES: list[tuple[str, tuple[Any, ...], str]] = [
    # values
    ("sft", ("trainer.max_steps", 0), "trainer.max_steps: got 0, which trains nothing: expected at least 1"),
    ("sft", ("trainer.max_steps", "many"), "trainer.max_steps: expected int, got many"),
    ("sft", ("trainer.accumulate_grad_batches", 0), "trainer.accumulate_grad_batches: got 0, expected at least 1"),
    ("sft", ("trainer.devices", "two"), "`devices`"),
    ("sft", ("trainer.default_root_dir", "/proc/x"), "trainer.default_root_dir: expected a folder that can be written"),
    ("sft", ("trainer.default_root_dir", "/etc/passwd"), "('/etc/passwd' is not one)"),
    ("sft", ("trainer.precision", "fp16"), "trainer.precision: expected one of"),
    ("sft", ("trainer.gradient_clip_val", 1.0), "set model.max_grad_norm instead"),
    ("sft", ("data.row_tokens", 0), "data.row_tokens: expected at least 1, got 0"),
    ("sft", ("data.row_tokens", True), "data.row_tokens: expected int, got True"),
    ("sft", ("data.row_tokens", 4096), "at most the model's max_position_embeddings, 2048, got 4096"),
    ("sft", ("data.num_workers", -1), "data.num_workers: expected at least 0, got -1"),
    ("sft", ("model.max_grad_norm", float("nan")), "model.max_grad_norm: expected a finite number, got nan"),
    ("sft", ("model.max_grad_norm", float("inf")), "model.max_grad_norm: expected a finite number, got inf"),
    ("sft", ("model.max_grad_norm", None), "model.max_grad_norm: expected a value, got null"),
    ("sft", ("model.freeze_router", 1), "model.freeze_router: expected bool, got 1"),
    ("sft", ("model.loss_mean", "token"), "model.loss_mean: expected one of 'tokens', 'conversations', got token"),
    ("sft", ("model.lora", {"rank": 0}), "model.lora.rank: expected at least 1, got 0"),
    ("sft", ("model.lora", {"rnk": 8}), "did you mean 'rank'?"),
    ("sft", ("model.adapter", "nowhere"), "model.adapter: expected a folder with an adapter_config.json"),
    ("sft", ("model.compute", {"attention": "flash"}), "model.compute.attention: expected one of 'auto'"),
    # files
    ("sft", ("model.tokenizer", "nowhere"), "nowhere"),
    ("sft", ("data.sources.names.files", ["*.jsonl"]), "*.jsonl: expected a file of conversations, found none"),
    ("sft", ("data.sources.names.files", []), "data.sources.names.files: expected at least one file"),
    ("sft", ("data.validation_files", ["no.jsonl"]), "no.jsonl: expected a file of conversations, found none"),
    ("sft", ("ckpt_path", "nowhere.ckpt"), "ckpt_path: expected a checkpoint, 'nowhere.ckpt' does not exist"),
    ("validate", ("ckpt_path", "nowhere.ckpt"), "ckpt_path: expected a checkpoint"),
    # what is chosen
    ("sft", ("model.class_path", "sftmodule"), "did you mean 'SFTModule'?"),
    ("sft", ("model.class_path", "north_lightning.modules.SFTModul"), "did you mean 'SFTModule'?"),
    ("sft", ("model.class_path", "torch.nn.Linear"), "Known here: NorthModule"),
    ("sft", ("model.optimizer", {"class_path": "AdamWW"}), "did you mean 'AdamW'?"),
    ("sft", ("model.optimizer", {"lr": 1e-3}), "'lr' is set by model.optimizer's init_args"),
    (
        "sft",
        ("model.optimizer", {"class_path": ADAMW, "lr": 1e-3}),
        "lr stands beside class_path: move it under",
    ),
    ("sft", ("model.optimizer", {"class_path": ADAMW, "init_args": {"lr": -1}}), "model.optimizer"),
    ("sft", ("model.optimizer", {"class_path": ADAMW, "init_args": {"betas": [0.9, 1.5]}}), "model.optimizer"),
    ("sft", ("model.lr", 1e-3), "'lr' is set by model.optimizer's init_args"),
    (
        "sft",
        ("model.lr_scheduler", {"class_path": "WarmupSchedule", "init_args": {"warmup_steps": 10}}),
        "warmup_steps: expected fewer than trainer.max_steps, 4, got 10",
    ),
    ("sft", ("trainer.logger", "WandbLoger"), "did you mean 'WandbLogger'?"),
    ("sft", ("trainer.callbacks+", {"HFCheckpoint": {}}), "write it as class_path: HFCheckpoint"),
    (
        "sft",
        ("trainer.callbacks+", {"class_path": "SamplerMetrics"}),
        "SamplerMetrics works with model.class_path CI",
    ),
    ("sft", ("data.filters", ["Duplicat"]), "did you mean 'Duplicate'?"),
    # contradictions
    ("sft", ("data.sources.names.share", 0.6), "data.sources: expected shares that sum to 1, got 1.1"),
    (
        "sft",
        ("trainer.strategy", {"class_path": "NorthStrategy", "init_args": {"context": 2}}),
        "trainer.strategy: expected replicate x shard x context x tensor = 1",
    ),
    ("rl", ("data.class_path", "TaskDataModule", "data.init_args", {"task_sets": ["x"]}), "expected RolloutDataModule"),
    ("rl", ("producer.group_size", 1), "group_size: expected at least 2"),
    ("rl", ("producer.max_concurrent_groups", 0), "max_concurrent_groups: expected at least 1, got 0"),
    ("rl", ("producer.task_sets", ["nowhere"]), "nowhere: no such task set"),
    ("rl", ("producer.task_sets", []), "task_sets: expected at least one task"),
    ("rl", ("producer.environment_weights", {"terminal": 1, "swee": 1}), "environment_weights: expected one per"),
    ("rl", ("producer.rollouts.harnesses.swe", ...), "harnesses: expected one for every environment, none for swe"),
    ("rl", ("producer.rollouts.harnesses.swe.command_timeout_s", -1), "command_timeout_s: expected more than 0"),
    ("rl", ("producer.rollouts.harnesses.swe.command_timeout_s", 500), "timeouts.act_s: expected more than the 500 s"),
    ("rl", ("producer.rollouts.max_turn_tokens", 3000), "max_turn_tokens: expected at most max_context_tokens, 2000"),
    ("rl", ("producer.rollouts.max_context_tokens", 3000), "at most the sidecar's max_model_len, 2048"),
    (
        "rl",
        ("producer.rollouts.max_context_tokens", 70),
        "rollouts.max_context_tokens: expected more than the prompts of",
    ),
    ("rl", ("producer.rollouts.max_contex_tokens", 20), "did you mean 'max_context_tokens'?"),
    (
        "rl",
        ("producer.rollouts.temperature", 0.7, "model.temperature", 1.0),
        "rollouts.temperature: expected model.temperature, 1.0",
    ),
    ("rl", ("producer.rollouts.sandboxes", "Docker"), "did you mean 'DockerProvider'?"),
    ("rl", ("sidecar.sidecar.max_model_len", 9999), "max_model_len: expected at most 2048"),
    ("rl", ("sidecar.sidecar.dtype", "fp16"), "sidecar.dtype: expected one of"),
    ("rl", ("sidecar.sidecar.extra_args", ["--max-model-len=512"]), "set the sidecar's max_model_len instead"),
    ("rl", ("sidecar.sidecar.extra_args", ["--enable-expert-paralel"]), "did you mean --enable-expert-parallel?"),
    ("rl", ("sync.every_n_steps", 0), "every_n_steps: expected at least 1, got 0"),
    ("rl", ("sync.max_policy_lag", 0), "max_policy_lag: expected at least"),
    ("rl", ("trainer.callbacks.2", ...), "trainer.callbacks: expected one RolloutProducerCallback"),
    ("rl", ("trainer.callbacks.1", ...), "trainer.callbacks: expected one WeightSyncCallback"),
    ("rl", ("trainer.callbacks+", {"class_path": "SidecarCallback"}), "expected one SidecarCallback"),
    ("rl", ("model.loss", "CISPO"), "did you mean 'CISPOLoss'?"),
    ("rl", ("model.loss", ...), "missing, or null: loss (of CISPOModule)"),
    ("rl", ("data.groups_per_batch", 3), "data.groups_per_batch: expected the queue's groups_per_batch, 2, got 3"),
    ("rl", ("data.max_row_tokens", 100), "data.max_row_tokens: expected at least rollouts.max_context_tokens"),
    ("rl", ("data.num_batches", 2, "trainer.max_epochs", 1), "trainer.max_steps: expected at most data.num_batches"),
    ("rl", ("trainer.accumulate_grad_batches", 4), "trainer.accumulate_grad_batches: got 4, expected 1"),
    ("predict", ("trainer.devices", 2), "trainer.devices: expected one process, got 2"),
    ("predict", ("model.rollouts.max_context_tokens", 4000), "at most the sidecar's max_model_len, 2048"),
    ("predict", ("data.task_sets", []), "task_sets: expected at least one task"),
    # what is read is not written, what is trained on is read once
    (
        "sft",
        ("trainer.callbacks.0", {"class_path": "HFCheckpoint", "init_args": {"directory": "TOKENIZER"}}),
        "where model.tok",
    ),
    ("sft", ("data.sources.names.files", ["SUMS"]), "expected each file once, got"),
    # processes, servers, sandboxes
    ("sft", ("trainer.num_nodes", 2), "trainer.num_nodes: got 2, but nothing has started processes on other nodes"),
    ("sft", ("trainer.max_time", "2h"), "trainer.max_time: got '2h'"),
    ("sft", ("model.compute", {"attention": "varlen"}), "model.compute.attention: expected auto or blocks on a CPU"),
    ("rl", ("sidecar.sidecar.kv_cache_gib", 5000.0), "GiB of this machine, got 5000"),
    ("rl", ("producer.rollouts.sandboxes.init_args", {"max_slots": 7}), "max_concurrent_groups, 8, got 7"),
    (
        "rl",
        ("producer.rollouts.sandboxes.init_args", {"memory_bytes": 4}),
        "memory_bytes: expected at least 1048576 bytes",
    ),
    (
        "rl",
        ("producer.rollouts.sandboxes.init_args", {"root": "/etc/passwd"}),
        "sandboxes.root: '/etc/passwd': expected a",
    ),
    ("rl", ("producer.rollouts.temperature", 0.0), "rollouts.temperature: expected more than 0 (attempts"),
    ("rl", ("producer.rollouts.timeouts", 600), "expected keys below it: attempt_s, open_s"),
    (
        "rl",
        ("model.loss", {"class_path": "CISPOLoss", "init_args": {"max_importance_weight": 0.2}}),
        "one, 1 or more, got 0.2",
    ),
    # other names, other places
    ("sft", ("resume", "atuo"), "resume: expected auto, last or a checkpoint, 'atuo' does not exist"),
    ("sft", ("resume", "last"), "resume: expected a complete checkpoint"),
    ("sft", ("trainer.resume_from_checkpoint", "x.ckpt"), "is set by resume, at the top level"),
    ("sft", ("trainer.callbacks", {"HFCheckpoint": {"keep": 1}}), "write it as class_path: HFCheckpoint"),
    ("sft", ("data.tokenizer", "SUMS"), "tokenizer: expected a folder with a tokenizer.json"),
    # utilities
    ("predict", ("model.max_per_task", 9), "max_per_task: expected 1 to num_samples, 8, got 9"),
    (
        "tasks",
        ("sets+", {"name": "b", "environment": "terminal", "split": "train", "count": 1}),
        "expected no task twice",
    ),
    ("trajectories", ("output_dir", "/etc/passwd"), "output_dir: expected a folder that can be written"),
    (
        "test",
        (
            "checkpoints",
            ...,
            "sidecar",
            ...,
            "servers",
            {"a": {"url": "http://x/v1", "model": "m", "api_key_env": "NOKEY"}},
        ),
        "api_key_env: expected the environment variable NOKEY to hold a key",
    ),
    ("calibrate", ("rollouts.max_context_tokens", 4000), "at most the sidecar's max_model_len, 2048"),
    ("calibrate", ("budget_quantile", 2), "budget_quantile: expected at most 1, got 2"),
    ("test", ("task_sets", ["nowhere"]), "nowhere: no such task set"),
    ("test", ("num_samples", 0), "num_samples: expected at least 1, got 0"),
    ("test", ("sidecar", ...), "sidecar: expected a vLLM server"),
    ("trajectories", ("look_around_fraction", 2), "look_around_fraction: expected at most 1"),
    ("tokenizer", ("files", ["nowhere.jsonl"]), "nowhere.jsonl"),
    ("tasks", ("sets.0.count", 0), "sets.count: expected at least 1, got 0"),
    ("estimate", ("gpus", 0), "gpus: expected at least 1, got 0"),
    ("data filter", ("sources.names.max_broken", -1), "sources.names.max_broken: expected at least 0"),
    ("recipe", ("stages.0.comand", "x"), "did you mean 'command'?"),
]

TEXTS = {
    "twice": (
        "trainer:\n  max_steps: 4\n  devices: 1\n  max_steps: 5\n",
        ":4: max_steps is given twice, in lines 2",
    ),
    "sections": ("trainer: {}\nmodel: {}\ntrainer: {}\n", ":3: trainer is given twice, in lines 1 and 3"),
    "tab": ("trainer:\n\tmax_steps: 4\n", ":2: not YAML: a tab"),
    "bracket": ("trainer: {max_steps: 4\nmodel: 3\n", ":2: not YAML"),
    "alias": ("a: *y\n", "undefined alias"),
    "another command's": ("task_sets: [a]\n", "unknown key 'task_sets'"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "estimate.yaml").write_text(as_yaml(base_config("sft", folder, folder / "run")))
    return folder


@pytest.mark.parametrize(
    ("kind", "edits", "expected"),
    [pytest.param(*row, marks=pytest.mark.long if number % 9 else []) for number, row in enumerate(MISTAKES)],
    ids=lambda value: str(value)[:60],
)
def test_a_mistake_is_answered_with_key_and_remedy_before_anything_starts(
    kind: str,
    edits: tuple[Any, ...],
    expected: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = base_config(kind, inputs, tmp_path / "run")
    for path, value in zip(edits[::2], edits[1::2], strict=True):
        edit(config, path, value)
    config = json.loads(
        json.dumps(config).replace("TOKENIZER", str(inputs / "tokenizer")).replace("SUMS", str(inputs / "sums.jsonl"))
    )
    answer = run(kind, as_yaml(config), tmp_path / "run", monkeypatch, capfd)
    errors = [line for line in answer.err.splitlines() if "Seed set to" not in line]
    assert answer.code in (1, 2), "accepted"
    assert expected in "\n".join(errors)
    assert len(errors) <= MAX_LINES
    assert not answer.written


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        (("sft.yaml",), {}, "write --config sft.yaml"),
        (("trainer.max_steps=5",), {}, "write --trainer.max_steps=5"),
        (
            (),
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"},
            "has started (WORLD_SIZE), got 1",
        ),
        ((), {"SLURM_STEP_NUM_TASKS": "4"}, "has started (SLURM_STEP_NUM_TASKS), got 1 x 1"),
    ],
)
def test_a_command_line_and_a_launcher_that_do_not_fit_are_answered(
    arguments: tuple[str, ...],
    variables: dict[str, str],
    expected: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = as_yaml(base_config("sft", inputs, tmp_path / "run"))
    answer = run("sft", config, tmp_path / "run", monkeypatch, capfd, arguments)
    assert expected in answer.err
    assert not answer.written


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_no_config_is_answered_with_its_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    text, expected = TEXTS[name]
    answer = run("recipe" if name.startswith("another") else "tokenizer", text, tmp_path / "run", monkeypatch, capfd)
    assert answer.code in (1, 2)
    assert expected in answer.err
    assert len(answer.err.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("kind", ["sft", "rl", "predict", "validate"])
def test_a_config_without_a_mistake_begins(
    kind: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = run(kind, as_yaml(base_config(kind, inputs, tmp_path / "run")), tmp_path / "run", monkeypatch, capfd)
    assert answer.code is None, answer.err


def test_values_within_their_range_pass() -> None:
    check_values({"class_path": "north_lightning.sampling.Sidecar", "init_args": {"max_num_seqs": 1}}, None)


def test_a_sidecar_takes_the_arguments_that_vllm_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    Sidecar(
        tmp_path, tmp_path / "log", extra_args=["--tensor-parallel-size", "2", "--enable-return-routed-experts"]
    ).check()
