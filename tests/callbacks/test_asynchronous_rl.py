"""The whole loop with nothing faked but the reward: real vLLM, sandboxes, rollout process, pushes, optimizer steps."""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import torch
from launch import as_torchrun_would, run_processes
from lightning.pytorch import Callback
from listeners import beyond_loopback, listeners_of_tree
from rl_plugins import FirstTokenIsEven
from small_runs import quiet_trainer

from north_lightning.callbacks import (
    HFCheckpoint,
    JSONLHistory,
    RolloutProducerCallback,
    SamplerMetrics,
    SidecarCallback,
    Throughput,
    TimeAccounts,
    WeightSyncCallback,
)
from north_lightning.chat import train_tokenizer
from north_lightning.data import RolloutDataModule
from north_lightning.errors import ConfigError
from north_lightning.evaluation.online import OnlineEvaluator, PointSpec, Snapshot
from north_lightning.harnesses import ReActTerminalHarness, SWEAgentHarness
from north_lightning.history import read_history
from north_lightning.interfaces import RolloutQueue, WeightTransport
from north_lightning.losses import CISPOLoss
from north_lightning.model import load_checkpoint, named_hf_tensors
from north_lightning.modules import CISPOModule
from north_lightning.parallel import NorthStrategy
from north_lightning.rollout import PassRateCurriculum, Timeouts, WindowedFIFOQueue
from north_lightning.rollout.ray import RayProducers, RayQueue
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.sampling.client import VLLMSampler
from north_lightning.sampling.sidecar import Sidecar
from north_lightning.sampling.transport import PrefixCache, PushReport, SharedMemoryTransport
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import load_task_sets, write_task
from north_lightning.tasks.software import software_task
from north_lightning.tasks.terminal import terminal_task

STEPS, GROUPS_PER_BATCH, GROUP_SIZE = 6, 2, 4


class Borrowed(WeightTransport):
    """The session's transport, which the run must not close."""

    def __init__(self, transport: SharedMemoryTransport) -> None:
        self.transport = transport

    def push(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.transport.push(tensors, version)

    @property
    def last_push(self) -> PushReport | None:
        return self.transport.last_push


class Running:
    """The session's server, dressed as one that the callback starts and stops."""

    can_return_routed_experts = False

    def __init__(self, url: str, max_model_len: int) -> None:
        self.url, self.max_model_len = url, max_model_len
        self.environment: dict[str, str] = {}
        self.vocab_size: int | None = None

    def check_alive(self) -> None:
        httpx.get(f"{self.url}/weight_info", timeout=30).raise_for_status()

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Listeners(Callback):
    """What listens after every step: trainer, rollout process, sandboxes, and the session's server, a child too."""

    def __init__(self) -> None:
        self.found: list[set[tuple[str, str, int]]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append(listeners_of_tree(os.getpid()))


@pytest.fixture
def checkpoint(vllm_checkpoint: Path, tmp_path: Path) -> Path:
    """The served weights, with a tokenizer."""
    folder = tmp_path / "checkpoint"
    tokenizer = train_tokenizer(["run the command in the terminal and say when it is done " * 3], [], 500, folder)
    shutil.copytree(vllm_checkpoint, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": tokenizer.eos_id}))
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    for index in range(3):
        write_task(terminal_task(index, 0, "train"), tmp_path / "tasks" / "terminal")
        write_task(software_task(index, 0, "train"), tmp_path / "tasks" / "swe")
    return [tmp_path / "tasks" / "terminal", tmp_path / "tasks" / "swe"]


def make_producer(tasks: list[Path], **settings: Any) -> RolloutProducerCallback:
    defaults: dict[str, Any] = {
        "harnesses": {"terminal": ReActTerminalHarness(), "swe": SWEAgentHarness()},
        "verifier": FirstTokenIsEven(),
        "sandboxes": BubblewrapProvider(),
        "max_turn_tokens": 12,
        "max_context_tokens": 2000,
        "reasoning": True,
    }
    rollouts = RolloutSettings(**{**defaults, **settings})
    return RolloutProducerCallback(
        tasks, rollouts, group_size=GROUP_SIZE, max_concurrent_groups=4, curriculum=PassRateCurriculum()
    )


@pytest.mark.slow
def test_rollouts_are_sampled_trained_and_sampled_again_from_the_new_weights(
    checkpoint: Path, tasks: list[Path], tmp_path: Path, vllm_server: Sidecar, weight_transport: SharedMemoryTransport
) -> None:
    run_dir = tmp_path / "run"
    queue = WindowedFIFOQueue(GROUPS_PER_BATCH, max_batches_ahead=1, window=2)
    sync = WeightSyncCallback(every_n_steps=2, transport=lambda url: Borrowed(weight_transport))
    module = CISPOModule(
        loss=CISPOLoss(),
        checkpoint=checkpoint,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95)),
    )
    sidecar = SidecarCallback(lambda model_dir, log_path: Running(vllm_server.url, vllm_server.max_model_len))
    listeners = Listeners()
    accounts, measured = TimeAccounts(), SamplerMetrics(every_s=0.2)
    producer = make_producer(tasks)
    callbacks = [sidecar, sync, producer, Throughput(), HFCheckpoint(), listeners, accounts, measured]
    started = time.monotonic()
    trainer = quiet_trainer(run_dir, max_steps=STEPS, callbacks=callbacks, logger=JSONLHistory(run_dir))
    data = RolloutDataModule(queue, GROUPS_PER_BATCH, max_row_tokens=3000, num_batches=STEPS)
    trainer.fit(module, datamodule=data)

    server_port = int(vllm_server.url.rpartition(":")[2])
    assert all(("tcp", "127.0.0.1", server_port) in found for found in listeners.found)
    assert [beyond_loopback(found) for found in listeners.found] == [set()] * STEPS

    history = read_history(run_dir / "history.jsonl")
    assert [line["step"] for line in history] == list(range(STEPS))
    assert sync.published_at == {0: 0, 1: 2, 2: 4, 3: 6}
    # The trainer agrees with the sampler on every token of weights that are still its own: before the first step, ...
    assert history[0]["policy_lag/max"] == 0
    assert history[0]["train/mismatch_abs_max"] < 1e-4
    # ... and disagrees on those of older ones, within the bound.
    assert history[1]["train/mismatch_abs_max"] > 1e-3
    assert 0 < max(line["policy_lag/max"] for line in history) <= queue.max_policy_lag(2)

    records = [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]
    assert {0, 1, 2} <= {record["policy_version_max"] for record in records} <= {0, 1, 2, 3}
    assert {record["reward"] for record in records} == {0.0, 1.0}
    assert queue.stats()["trained"] == STEPS * GROUPS_PER_BATCH
    schedule = producer.state_dict()["schedule"]
    trained = [group_id for group_id in range(schedule["num_assigned"]) if queue.end_of(group_id) == "trained"]
    assert not schedule["assigned"].keys() & set(trained)
    memory = [8.0 * 0.7**n + GROUP_SIZE * sum(0.7**i for i in range(n)) for n in range(len(trained) + 1)]
    counted = [min(range(len(memory)), key=lambda n: abs(memory[n] - a)) for a in attempts_of(schedule)]
    assert sum(counted) == len(trained) == STEPS * GROUPS_PER_BATCH  # each group was observed once
    start, end = load_checkpoint(checkpoint), load_checkpoint(run_dir / "checkpoint")
    assert not torch.equal(start.embedding_weight, end.embedding_weight)
    check_accounts(json.loads((run_dir / "time.json").read_text()), time.monotonic() - started)
    check_metrics_of_the_sampler(history, records)


def attempts_of(schedule: dict[str, Any]) -> list[float]:
    return list(schedule["curriculum"]["attempts"].values())


def check_accounts(written: dict[str, Any], clock_s: float) -> None:
    """Against a clock that was read before and after the run, and what the run cannot have been without."""
    (sampler,) = written["samplers_s"]
    trainer_s, sampler_s = sum(written["trainer_s"].values()), sum(sampler.values())
    assert sampler_s <= trainer_s + 0.01 <= clock_s + 0.02
    assert trainer_s - sampler_s < 0.5 * trainer_s  # a sign of life comes every second
    assert sum(written["generated_for_s"].values()) == pytest.approx(sampler["generating"], abs=0.01)
    assert all(sampler[account] > 0 for account in ("generating", "sandbox", "paused"))
    assert written["generated_for_s"]["trained"] > 0
    assert sampler["paused"] <= written["trainer_s"]["push"]
    assert sampler["down"] == 0


def check_metrics_of_the_sampler(history: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    """The server's counts, against the tokens of the rollouts that came of them."""
    counted = sum(line.get("sampler/generated_tokens", 0.0) for line in history)
    sampled = sum(turn["num_tokens"] for record in records for turn in record["turns"])
    assert 0 < counted < 3 * sampled  # what is in flight at the end is counted, what came before the first reading not
    assert max(line.get("sampler/kv_use/max", 0.0) for line in history) > 0
    assert max(line.get("sampler/running/max", 0.0) for line in history) <= 4 * GROUP_SIZE
    assert sum(line.get("sampler/preemptions", 0.0) for line in history) == 0
    pushes = [line for line in history if "weights/push_gb_s" in line]
    assert len(pushes) == STEPS // 2
    assert all(0 < line["weights/paused_s"] <= line["weights/push_s"] for line in pushes)
    for line in history:
        shares = {name: share for name, share in line.items() if name.startswith("policy_lag/share_")}
        assert sum(shares.values()) == pytest.approx(1)
        mean = sum(int(name.rpartition("_")[2]) * share for name, share in shares.items())
        assert mean == pytest.approx(line["policy_lag/mean"], rel=1e-4)
        if "sampler_time/generating" in line:
            assert sum(v for name, v in line.items() if name.startswith("sampler_time/")) == pytest.approx(1)


def make_queue() -> WindowedFIFOQueue:
    return WindowedFIFOQueue(GROUPS_PER_BATCH, 1, window=2)


def make_ray_queue() -> RayQueue:
    return RayQueue(make_queue)


def train_on_each(
    checkpoint: Path,
    tasks: list[Path],
    run_dir: Path,
    servers: list[Running],
    make_queue: Callable[[], RolloutQueue],
    ray: RayProducers | None,
) -> dict[str, Any]:
    """Three steps of what is one of several processes; what this one has published, and what it has started."""
    as_torchrun_would()
    # Buckets of a few tensors, read as they are gathered: the server gets them in many files.
    sync = WeightSyncCallback(2, lambda urls: SharedMemoryTransport(urls, max_staged_gib=1e-4))
    producer = make_producer(tasks)
    producer.ray = ray
    if ray is not None:
        producer.curriculum = None
    module = CISPOModule(
        loss=CISPOLoss(), checkpoint=checkpoint, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)
    )
    data = RolloutDataModule(make_queue(), GROUPS_PER_BATCH, 3000, num_batches=3)
    waiting = list(servers)
    sidecars = SidecarCallback(lambda model_dir, log_path: waiting.pop(0), environments=[{}] * len(servers))
    quiet_trainer(
        run_dir,
        devices=2,
        strategy=NorthStrategy(shard=2),
        max_steps=3,
        callbacks=[sidecars, sync, producer, HFCheckpoint()],
        logger=JSONLHistory(run_dir),
    ).fit(module, datamodule=data)
    return {"published_at": sync.published_at, "processes": [one.pid for one in psutil.Process().children(True)]}


def check_two_trainers(first: dict[str, Any], second: dict[str, Any], checkpoint: Path, run_dir: Path) -> None:
    assert first["published_at"] == second["published_at"] == {0: 0, 1: 2}
    history = read_history(run_dir / "history.jsonl")
    assert [line["step"] for line in history] == [0, 1, 2]
    assert history[-1]["queue/trained"] == 3 * GROUPS_PER_BATCH
    assert all(line["policy_lag/max"] <= line["policy_lag/bound"] for line in history)
    assert history[0]["train/mismatch_abs_max"] < 1e-4 < 1e-3 < history[1]["train/mismatch_abs_max"]
    records = [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]
    assert len(records) >= 3 * GROUPS_PER_BATCH * GROUP_SIZE
    assert {record["environment"] for record in records} == {"terminal", "swe"}
    start, end = (dict(named_hf_tensors(load_checkpoint(path))) for path in (checkpoint, run_dir / "checkpoint"))
    assert any(not torch.equal(start[name], end[name]) for name in start)


@pytest.mark.slow
def test_two_trainer_processes_sample_from_one_real_server_and_push_to_it(
    checkpoint: Path, tasks: list[Path], tmp_path: Path, vllm_server: Sidecar, weight_transport: SharedMemoryTransport
) -> None:
    server = Running(vllm_server.url, vllm_server.max_model_len)
    first, second = run_processes(2, train_on_each, checkpoint, tasks, tmp_path / "run", [server], make_queue, None)
    served = httpx.get(f"{vllm_server.url}/weight_info").json()["weight_version"]
    weight_transport.push(named_hf_tensors(load_checkpoint(checkpoint)), 0)  # the session's server again
    assert served == "1"
    check_two_trainers(first, second, checkpoint, tmp_path / "run")


@pytest.mark.slow
def test_two_trainers_two_servers_and_two_producers_in_ray_actors_train_both_environments(
    checkpoint: Path, tasks: list[Path], tmp_path: Path, vllm_server: Sidecar, weight_transport: SharedMemoryTransport
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    with Sidecar(checkpoint, tmp_path / "second.log", max_model_len=2048) as another:
        servers = [Running(one.url, one.max_model_len) for one in (vllm_server, another)]
        first, second = run_processes(
            2, train_on_each, checkpoint, tasks, tmp_path / "run", servers, make_ray_queue, RayProducers(2, 0.5)
        )
        served = [httpx.get(f"{one.url}/weight_info").json()["weight_version"] for one in servers]
        sampled = [_sampled_tokens(one.url) for one in servers]
    weight_transport.push(named_hf_tensors(load_checkpoint(checkpoint)), 0)
    assert served == ["1", "1"]
    assert all(sampled)
    check_two_trainers(first, second, checkpoint, tmp_path / "run")
    history = read_history(tmp_path / "run" / "history.jsonl")
    assert history[-1]["producer/actors"] == 2
    assert history[-1]["producer/completed"] > 0  # as they last said
    assert not any(name.startswith(("queue/dropped", "producer/failures")) for line in history for name in line)
    assert first["processes"]
    assert not [pid for pid in first["processes"] if psutil.pid_exists(pid)]


def _sampled_tokens(url: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:generation_tokens_total"))


@pytest.mark.parametrize("policy", ["cleared", "salted"])
def test_rollouts_salt_their_prefixes_if_the_transport_says_so(
    policy: PrefixCache, checkpoint: Path, tasks: list[Path]
) -> None:
    sync, sidecars, producer = WeightSyncCallback(), SidecarCallback(), make_producer(tasks)
    sync._transport = SharedMemoryTransport("http://127.0.0.1:1", prefix_cache=policy)
    sidecars._sidecars = [Running("http://127.0.0.1:1", 2048)]  # type: ignore[list-item]
    producer._prepare()
    module = CISPOModule(loss=CISPOLoss(), checkpoint=checkpoint)
    trainer: Any = SimpleNamespace(callbacks=[sidecars, sync, producer])
    runner: Any = producer._spec(trainer, module).make_runner()
    assert runner.sampler.sampler.salt_by_version == (policy == "salted")
    sync._transport.close()


def test_the_producer_must_come_after_the_weight_sync(checkpoint: Path, tasks: list[Path], tmp_path: Path) -> None:
    module = CISPOModule(loss=CISPOLoss(), checkpoint=checkpoint)
    callbacks = [make_producer(tasks), SidecarCallback(), WeightSyncCallback()]
    data = RolloutDataModule(WindowedFIFOQueue(2, 1), 2, max_row_tokens=3000, num_batches=1)
    with pytest.raises(ConfigError, match="a WeightSyncCallback before the RolloutProducerCallback"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=callbacks).fit(module, datamodule=data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"queue": WindowedFIFOQueue(2, 1, head_timeout_s=4000)},
            r"data.queue.head_timeout_s: expected at least the 4260 s that an attempt at task '.*' may take .*got 4000",
        ),
        (
            {"queue": WindowedFIFOQueue(2, 1, head_timeout_s=5000, head_requeues=1)},
            r"data.max_wait_s: expected at least the 10000 s after which the queue gives a group up .*got 7200",
        ),
        (
            {"max_row_tokens": 1999},
            r"data.max_row_tokens: expected at least rollouts.max_context_tokens, 2000, got 1999",
        ),
        ({"groups_per_batch": 3}, "data.groups_per_batch: expected the queue's groups_per_batch, 2, got 3"),
    ],
)
def test_data_that_contradict_the_rollouts_are_refused_before_anything_starts(
    data: dict[str, Any], message: str, checkpoint: Path, tasks: list[Path], tmp_path: Path
) -> None:
    module = CISPOModule(loss=CISPOLoss(), checkpoint=checkpoint)
    callbacks = [SidecarCallback(), WeightSyncCallback(), make_producer(tasks)]
    with pytest.raises(ConfigError, match=message):
        quiet_trainer(tmp_path, max_steps=1, callbacks=callbacks).fit(
            module, datamodule=RolloutDataModule(**{"queue": WindowedFIFOQueue(2, 1), **data})
        )


class Stops(Callback):
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        raise KeyError("far enough")


def test_what_is_left_out_of_data_and_module_is_derived(checkpoint: Path, tasks: list[Path], tmp_path: Path) -> None:
    module, data = CISPOModule(loss=CISPOLoss(), checkpoint=checkpoint), RolloutDataModule(WindowedFIFOQueue(2, 1))
    callbacks = [Stops(), SidecarCallback(), WeightSyncCallback(), make_producer(tasks, temperature=0.8)]
    with pytest.raises(KeyError, match="far enough"):
        quiet_trainer(tmp_path, max_steps=7, callbacks=callbacks).fit(module, datamodule=data)
    assert (data.groups_per_batch, data.max_row_tokens, data.num_batches, module.temperature) == (2, 2000, 7, 0.8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"harnesses": {"terminal": ReActTerminalHarness()}}, "none for swe"),
        ({"temperature": 0.8}, r"rollouts.temperature: expected model.temperature, 1.0, got 0.8"),
        ({"top_p": 0.9}, r"rollouts.top_p: expected 1.0"),
        (
            {"timeouts": Timeouts(attempt_s=7000)},
            r"data.max_wait_s: expected at least the 7660 s that an attempt .*timeouts.attempt_s, 7000.* got 7200",
        ),
    ],
)
def test_settings_that_cannot_be_trained_on_are_refused_before_anything_starts(
    settings: dict[str, Any], message: str, checkpoint: Path, tasks: list[Path], tmp_path: Path
) -> None:
    producer = make_producer(tasks, **settings)
    module = CISPOModule(loss=CISPOLoss(), checkpoint=checkpoint, temperature=1.0)
    callbacks = [SidecarCallback(), WeightSyncCallback(), producer]
    data = RolloutDataModule(WindowedFIFOQueue(2, 1), 2, max_row_tokens=3000, num_batches=1)
    with pytest.raises(ConfigError, match=message):
        quiet_trainer(tmp_path, max_steps=1, callbacks=callbacks).fit(module, datamodule=data)


@pytest.mark.slow
def test_a_point_during_rl_is_measured_on_real_vllm_with_the_weights_of_its_step(
    checkpoint: Path, tasks: list[Path], tmp_path: Path, vllm_server: Sidecar, weight_transport: SharedMemoryTransport
) -> None:
    model = load_checkpoint(checkpoint)
    torch.manual_seed(1)
    with torch.no_grad():
        model.embedding_weight.add_(0.5 * torch.randn_like(model.embedding_weight))
    snapshot = Snapshot(8, 3, [(name, tensor.clone()) for name, tensor in named_hf_tensors(model)])
    settings = make_producer(tasks).rollouts
    make_runner = partial(settings.make_runner, checkpoint)
    spec = PointSpec(load_task_sets(tasks), make_runner, num_samples=2, concurrency=8, seed=0)
    server: Any = Running(vllm_server.url, vllm_server.max_model_len)
    evaluator = OnlineEvaluator(server, lambda urls: Borrowed(weight_transport), spec, tmp_path)
    evaluator.begin(snapshot)
    assert evaluator.finish(120)
    (point,) = evaluator.take()
    evaluator.stop()
    served = httpx.get(f"{vllm_server.url}/weight_info").json()["weight_version"]
    scored = _score(vllm_server.url)
    weight_transport.push(named_hf_tensors(load_checkpoint(checkpoint)), 0)
    assert served == "3"
    assert (point["eval/num_tasks"], point["eval/num_attempts"], point["eval/num_errors"]) == (6, 12, 0)
    assert scored != pytest.approx(_score(vllm_server.url), abs=1e-3)  # those of the snapshot, not of the checkpoint


def _score(url: str) -> list[float]:
    sampler = VLLMSampler(url, 60.0)

    async def score() -> list[float]:
        try:
            return await sampler.score(range(10, 26))
        finally:
            await sampler.close()

    return asyncio.run(score())
