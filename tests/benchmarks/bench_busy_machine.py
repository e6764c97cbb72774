"""A busy machine: the quickstart's SFT step beside 0, 1, 4 and 20 busy processes, and an RL run at a load above 25.

    python tests/benchmarks/bench_busy_machine.py [sft] [rl]        (both: 6 minutes, on a machine that is idle)

Writes runs/bench/busy_machine.json, each section as it is done.

**Fair share.** Linux gives every runnable thread of a session the same share of the cores. With C cores, a trainer of
T threads and n busy neighbors of one thread, a trainer's thread gets min(1, C / (T + n)) of a core, so a trainer that
loses nothing beside its share keeps that fraction of the speed it has alone. ``kept`` is what it keeps of that. Where
sessions are scheduled as groups (``sched_autogroup_enabled``) and every neighbor has a session of its own (``apart``),
each session is entitled to C / (n + 1) cores, and the trainer to what n neighbors of one core each leave.

The step is measured with threads that wait passively, as the package sets it, with one thread (``--num_threads 1``),
and with libgomp's own default.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

OUTPUT = Path("runs/bench/busy_machine.json")
MODEL = Path(__file__).parents[2] / "configs" / "quickstart" / "model.json"
NEIGHBORS = (0, 1, 4, 20)
SETTLE_S, MEASURE_S = 2.0, float(os.environ.get("MEASURE_S", 10))
RL_NEIGHBORS, RL_S = 40, float(os.environ.get("RL_S", 90))


@contextmanager
def neighbors(number: int, apart: bool = False) -> Iterator[None]:
    """``apart``: each in a session of its own, and so with the same share as a whole session of ours."""
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command, start_new_session=apart) for _ in range(number)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


# ---- SFT -----------------------------------------------------------------------------------------------------------


def train_for_ever() -> None:
    """A process that writes a line of seconds, CPU seconds and tokens after every step."""
    import north_lightning  # noqa: F401, I001  # before torch, as when the command line starts
    import bench_sft_step

    from north_lightning.model import NorthConfig, NorthModel

    config = NorthConfig.load(MODEL)
    bench_sft_step.ROW_TOKENS = 1024  # as in configs/quickstart/sft_stage1.yaml
    documents = bench_sft_step.make_documents(100, 400, config.vocab_size)
    step, num_tokens = bench_sft_step.our_step(NorthModel(config), documents), sum(map(len, documents))
    while True:
        step()
        print(time.monotonic(), time.process_time(), num_tokens, flush=True)


def fair_share(cores: int, threads: int, num_neighbors: int, apart: bool) -> float:
    """Of the speed that the trainer has alone."""
    if apart:
        return min(1.0, max(cores - num_neighbors, cores / (num_neighbors + 1)) / min(cores, threads))
    return min(1.0, cores / (threads + num_neighbors))


def measure_sft(environment: dict[str, str], apart: bool = False) -> dict[str, Any]:
    """Tokens a second and CPU cores beside each number of neighbors, and what is kept of the fair share."""
    import torch

    cores = len(os.sched_getaffinity(0))
    threads = int(environment.get("OMP_NUM_THREADS", torch.get_num_threads()))
    trainer = subprocess.Popen(
        [sys.executable, __file__, "train_for_ever"],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert trainer.stdout is not None
    results: dict[str, Any] = {"cores": cores, "threads": threads}
    try:
        for _ in range(3):
            trainer.stdout.readline()
        for number in NEIGHBORS:
            with neighbors(number, apart):
                time.sleep(SETTLE_S)
                until = time.monotonic() + MEASURE_S
                lines = []
                while not lines or lines[-1][0] < until or len(lines) < 3:
                    line = tuple(map(float, trainer.stdout.readline().split()))
                    if line[0] > until - MEASURE_S:
                        lines.append(line)
                load = os.getloadavg()[0]
            seconds, cpu_s = (lines[-1][i] - lines[0][i] for i in (0, 1))
            speed = sum(line[2] for line in lines[1:]) / seconds
            alone = results.get("0", {}).get("tokens_per_s", speed)
            fair = fair_share(cores, threads, number, apart)
            results[str(number)] = {
                "tokens_per_s": round(speed),
                "cores_used": round(cpu_s / seconds, 3),
                "of_alone": round(speed / alone, 3),
                "fair_share": round(fair, 3),
                "kept": round(speed / alone / fair, 3),
                "steps": len(lines) - 1,
                "load": round(load, 1),
            }
            print(f"  {number:2d} neighbors: {results[str(number)]}", flush=True)
    finally:
        trainer.kill()
        trainer.wait()
    return results


def bench_sft() -> dict[str, Any]:
    results = {}
    variants = {"passive": {}, "one_thread": {"OMP_NUM_THREADS": "1"}, "libgomp_default": {"OMP_WAIT_POLICY": ""}}
    for name, environment in variants.items():
        print(f"SFT, threads wait: {name}")
        results[name] = measure_sft(environment)
    if Path("/proc/sys/kernel/sched_autogroup_enabled").read_text().strip() == "1":
        print("SFT, threads wait: passive, neighbors in sessions of their own")
        results["passive_apart"] = measure_sft({}, apart=True)
    return results


# ---- RL ------------------------------------------------------------------------------------------------------------


def bench_rl() -> dict[str, Any]:
    """Real vLLM, sandboxes and trainer with the quickstart's sizes and random weights; the neighbors come after the
    first step."""
    import north_lightning  # noqa: F401, I001  # before torch, as when the command line starts
    import torch
    from lightning.pytorch import Callback

    sys.path.append(str(Path(__file__).parents[1]))
    sys.path.append(str(Path(__file__).parents[1] / "callbacks"))
    from rl_plugins import FirstTokenIsEven
    from small_runs import quiet_trainer

    from north_lightning.callbacks import JSONLHistory, RolloutProducerCallback, SidecarCallback, WeightSyncCallback
    from north_lightning.chat import train_tokenizer
    from north_lightning.data import RolloutDataModule
    from north_lightning.harnesses import ReActTerminalHarness, SWEAgentHarness
    from north_lightning.history import read_history
    from north_lightning.losses import CISPOLoss
    from north_lightning.model import NorthConfig, NorthModel, save_checkpoint
    from north_lightning.modules import CISPOModule
    from north_lightning.rollout import WindowedFIFOQueue
    from north_lightning.rollout.settings import RolloutSettings
    from north_lightning.sampling.sidecar import Sidecar
    from north_lightning.sandbox import BubblewrapProvider
    from north_lightning.tasks import write_task
    from north_lightning.tasks.software import software_task
    from north_lightning.tasks.terminal import terminal_task

    torch.set_num_threads(1)  # as in configs/quickstart/rl.yaml
    numbers: dict[str, Any] = {"neighbors": RL_NEIGHBORS}
    loads: list[float] = []

    class Crowd(Callback):
        """Busy processes from the first step on, for ``RL_S``; then training ends."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            now = time.monotonic()
            if trainer.global_step == 2:
                self.crowd, self.until = neighbors(RL_NEIGHBORS, apart=True), now + RL_S
                self.crowd.__enter__()
                numbers["steps_before"] = trainer.global_step
            elif trainer.global_step > 2:
                loads.append(os.getloadavg()[0])
                trainer.should_stop = now > self.until

        def on_train_end(self, trainer: Any, *_: Any) -> None:
            self.crowd.__exit__(None, None, None)
            producer = next(one for one in trainer.callbacks if isinstance(one, RolloutProducerCallback))
            numbers["steps"] = trainer.global_step
            numbers["queue"] = dict(trainer.datamodule.queue.stats())
            numbers["producer"] = dict(producer._producer.stats())

    with tempfile.TemporaryDirectory(prefix="busy-") as scratch:
        folder = Path(scratch)
        tokenizer = train_tokenizer(["run the command in the terminal and say when it is done " * 3], [], 500, folder)
        config = json.loads(MODEL.read_text()) | {"vocab_size": 512, "eos_token_id": tokenizer.eos_id}
        (folder / "model.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        save_checkpoint(NorthModel(NorthConfig.load(folder / "model.json")), folder / "served", tokenizer_dir=folder)
        for index in range(8):
            write_task(terminal_task(index, 0, "train"), folder / "tasks" / "terminal")
            write_task(software_task(index, 0, "train"), folder / "tasks" / "swe")
        rollouts = RolloutSettings(
            harnesses={"terminal": ReActTerminalHarness(command_timeout_s=3), "swe": SWEAgentHarness()},
            verifier=FirstTokenIsEven(),
            sandboxes=BubblewrapProvider(),
            max_turn_tokens=32,
            max_context_tokens=2048,
        )
        sidecar = SidecarCallback(lambda model, log: Sidecar(model, log, max_model_len=2048, kv_cache_gib=0.5))
        sync = WeightSyncCallback(every_n_steps=4)
        producer = RolloutProducerCallback(
            [folder / "tasks" / "terminal", folder / "tasks" / "swe"], rollouts, 4, max_concurrent_groups=4
        )
        data = RolloutDataModule(WindowedFIFOQueue(2, 1, head_timeout_s=6000), 2, 8192, num_batches=100_000)
        quiet_trainer(
            folder / "run",
            max_steps=100_000,
            callbacks=[sidecar, sync, Crowd(), producer],
            logger=JSONLHistory(folder / "run"),
        ).fit(CISPOModule(loss=CISPOLoss(), checkpoint=folder / "served"), datamodule=data)
        history = read_history(folder / "run" / "history.jsonl")
    numbers |= {
        "seconds": RL_S,
        "load_max": round(max(loads, default=0.0), 1),
        "load_mean": round(fmean(loads), 1) if loads else 0.0,
        "pushes": sync.version,
        "servers_replaced": int(history[-1]["sidecar/deaths"]),
        "slow_or_paused_s": round(history[-1]["sidecar/slow_or_paused_s"], 1),
        "rollout_processes_replaced": int(numbers["producer"].get("child_restarts", 0)),
        "groups_dropped": int(sum(v for name, v in numbers["queue"].items() if name.startswith("dropped/"))),
        "groups_requeued": int(numbers["queue"]["requeued"]),
    }
    print(f"RL: {numbers}", flush=True)
    return numbers


def main() -> None:
    wanted = sys.argv[1:] or ["sft", "rl"]
    report = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    report["load_before"] = os.getloadavg()[0]
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    for name, bench in {"sft": bench_sft, "rl": bench_rl}.items():
        if name in wanted:
            report[name] = bench()
            OUTPUT.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {OUTPUT}")


if __name__ == "__main__":
    train_for_ever() if sys.argv[1:] == ["train_for_ever"] else main()
