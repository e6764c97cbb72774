"""The whole loop at once: two trainer processes, two real vLLM servers, rollout process, both environments.

    python tests/benchmarks/bench_several_servers.py

Checks that both servers sampled and serve the last version, that the ledger is exact and the weights of both processes
are equal; a push succeeds only if both servers agree on a probe. Writes runs/bench/several_servers.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from lightning.pytorch import Callback

sys.path.extend([str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "callbacks")])
from launch import as_torchrun_would, run_processes
from rl_plugins import FirstTokenIsEven
from small_runs import MODEL, quiet_trainer

from north_lightning.callbacks import RolloutProducerCallback, SidecarCallback, WeightSyncCallback
from north_lightning.callbacks.sidecar import running_sidecar
from north_lightning.chat import train_tokenizer
from north_lightning.data import RolloutDataModule
from north_lightning.harnesses import ReActTerminalHarness, SWEAgentHarness
from north_lightning.losses import CISPOLoss
from north_lightning.model import NorthConfig, NorthModel, named_hf_tensors, save_checkpoint
from north_lightning.modules import CISPOModule
from north_lightning.parallel import NorthStrategy
from north_lightning.rollout import WindowedFIFOQueue
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.sampling.sidecar import Sidecar
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import write_task
from north_lightning.tasks.software import software_task
from north_lightning.tasks.terminal import terminal_task

OUTPUT = Path("runs/bench/several_servers.json")
NUM_STEPS, GROUPS_PER_BATCH, GROUP_SIZE, PUSH_EVERY_K, NUM_SERVERS = 4, 2, 4, 2, 2
VOCAB_SIZE = 500


class AsksTheServers(Callback):
    """At the end: which version each serves, and how many requests each has answered."""

    def __init__(self) -> None:
        self.versions: list[str] = []
        self.num_answered: list[float] = []

    def on_train_end(self, trainer: Any, *_: object) -> None:
        if not trainer.is_global_zero:
            return
        for url in running_sidecar(trainer).urls:
            self.versions.append(httpx.get(f"{url}/weight_info").json()["weight_version"])
            lines = httpx.get(f"{url}/metrics").text.splitlines()
            counts = [line.split()[-1] for line in lines if line.startswith("vllm:request_success_total")]
            self.num_answered.append(sum(map(float, counts)))


def train(inputs: Path, run_dir: Path) -> dict[str, Any]:
    """This process's part of the run."""
    as_torchrun_would()
    rollouts = RolloutSettings(
        harnesses={"terminal": ReActTerminalHarness(), "swe": SWEAgentHarness()},
        verifier=FirstTokenIsEven(),
        sandboxes=BubblewrapProvider(),
        max_turn_tokens=12,
        max_context_tokens=2000,
        reasoning=True,
    )
    task_sets = [inputs / "tasks" / "terminal", inputs / "tasks" / "swe"]
    make_sidecar = partial(Sidecar, max_model_len=2048, kv_cache_gib=0.25)
    sync, asks = WeightSyncCallback(PUSH_EVERY_K), AsksTheServers()
    callbacks = [
        SidecarCallback(lambda *paths: with_statistics(make_sidecar(*paths)), environments=[{}] * NUM_SERVERS),
        sync,
        RolloutProducerCallback(task_sets, rollouts, GROUP_SIZE, max_concurrent_groups=4),
        asks,
    ]
    queue = WindowedFIFOQueue(GROUPS_PER_BATCH, 1, window=2)
    module = CISPOModule(
        loss=CISPOLoss(),
        checkpoint=inputs / "checkpoint",
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    data = RolloutDataModule(queue, GROUPS_PER_BATCH, 3000, num_batches=NUM_STEPS, max_wait_s=300)
    strategy = NorthStrategy(replicate=2)
    trainer = quiet_trainer(run_dir, devices=2, strategy=strategy, max_steps=NUM_STEPS, callbacks=callbacks)
    trainer.fit(module, datamodule=data)
    weights = {name: tensor.detach().clone().numpy() for name, tensor in named_hf_tensors(module.model)}
    ledger = {group_id: queue.end_of(group_id) for group_id in range(queue.state_dict()["next_id"])}
    return {
        "published_at": sync.published_at,
        "versions": asks.versions,
        "answered": asks.num_answered,
        "ledger": ledger,
        "weights": weights,
    }


def with_statistics(sidecar: Sidecar) -> Sidecar:
    command = sidecar._command
    sidecar._command = lambda: [word for word in command() if word != "--disable-log-stats"]
    return sidecar


def write_inputs(inputs: Path) -> None:
    folder = inputs / "tokenizer"
    tokenizer = train_tokenizer(
        ["run the command in the terminal and say when it is done " * 3], [], VOCAB_SIZE, folder
    )
    sizes = {"head_dim": 32, "hidden_size": 64, "vocab_size": VOCAB_SIZE, "eos_token_id": tokenizer.eos_id}
    (inputs / "model.json").write_text(json.dumps(MODEL | sizes))
    torch.manual_seed(0)
    save_checkpoint(NorthModel(NorthConfig.load(inputs / "model.json")), inputs / "checkpoint", tokenizer_dir=folder)
    for index in range(3):
        write_task(terminal_task(index, 0, "train"), inputs / "tasks" / "terminal")
        write_task(software_task(index, 0, "train"), inputs / "tasks" / "swe")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch)
        write_inputs(inputs)
        started = time.monotonic()
        first, second = run_processes(2, train, inputs, inputs / "run")
        seconds = time.monotonic() - started
        records = [json.loads(line) for line in (inputs / "run" / "rollouts.jsonl").read_text().splitlines()]
    num_pushes = NUM_STEPS // PUSH_EVERY_K
    assert first["published_at"] == second["published_at"] == {i: i * PUSH_EVERY_K for i in range(num_pushes + 1)}
    assert first["versions"] == [str(num_pushes)] * NUM_SERVERS
    num_own = 1 + num_pushes  # of the start, and the probes
    assert all(count > num_own + 5 for count in first["answered"]), first["answered"]
    trained = [group_id for group_id, end in first["ledger"].items() if end == "trained"]
    assert len(trained) == NUM_STEPS * GROUPS_PER_BATCH
    assert set(first["ledger"].values()) <= {"trained", None}  # nothing dropped
    assert {record["environment"] for record in records} == {"terminal", "swe"}
    assert all((first["weights"][name] == weight).all() for name, weight in second["weights"].items())
    result = {
        "seconds": round(seconds, 1),
        "steps": NUM_STEPS,
        "rollouts": len(records),
        "requests_by_server": first["answered"],
        "versions_served": first["versions"],
        "trained_groups": len(trained),
    }
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
