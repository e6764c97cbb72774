"""``python -m north_lightning predict``: SFT samples from a served model, by rejection sampling.

In: tasks, and a model behind an OpenAI-compatible server or in a vLLM sidecar of our own. Out, in the output directory:
``samples.jsonl``, canonical samples of attempts that the verifier passed and no filter drops; ``summary.json``, how
many were attempted, verified and kept, per harness and family; ``attempts.jsonl`` and ``verified.jsonl``, what a
stopped run goes on from. It makes no attempts itself (``evaluation`` does) and trains nothing.

A task is sampled in rounds, an attempt each, until enough of it is kept or ``num_samples`` were made. An attempt with
a turn that was no valid action is never kept, whatever it solved: such turns would be trained.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.data import DataLoader

from north_lightning.data.dedup import Identical
from north_lightning.data.filters import SampleFilter, default_filters
from north_lightning.data.sources import append_sample, read_samples, write_samples
from north_lightning.errors import ConfigError, printable
from north_lightning.evaluation.attempts import Attempt, drop_torn_line, read_attempts, weights_digest
from north_lightning.evaluation.each import attempt_all
from north_lightning.evaluation.evaluate import Served, plan_attempts
from north_lightning.evaluation.serve import SidecarFactory, check_serving, checkpoint_server
from north_lightning.interfaces import ConversationFilter
from north_lightning.rollout import ChatServer
from north_lightning.rollout.metrics import is_solved, num_invalid_turns
from north_lightning.rollout.runner import AttemptRunner
from north_lightning.rollout.settings import RolloutSettings
from north_lightning.rollout.trajectories import sample_of
from north_lightning.run_folders import write_result
from north_lightning.seeds import run_seed
from north_lightning.tasks import load_task_sets
from north_lightning.types import Conversation, Count, Rollout, Task

COUNTS = ("attempted", "failed", "verified", "kept")


class TaskDataModule(LightningDataModule):
    """Tasks, a list at a time.

    Args:
        task_sets: Directories of tasks, or listings.
        tasks_at_once: So many are sampled side by side before the next are begun; all by default.
    """

    def __init__(self, task_sets: list[Path], tasks_at_once: Count | None = None) -> None:
        super().__init__()
        if tasks_at_once is not None and tasks_at_once < 1:
            raise ConfigError(f"tasks_at_once: expected at least 1, got {tasks_at_once}")
        self.task_sets = task_sets
        self.tasks_at_once = tasks_at_once

    def predict_dataloader(self) -> DataLoader[Task]:
        tasks = load_task_sets(self.task_sets)
        return DataLoader(tasks, batch_size=self.tasks_at_once or len(tasks), collate_fn=list)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch


class SynthesisModule(LightningModule):
    """Samples attempts at tasks and keeps the verified ones. One process.

    Args:
        output_dir: Where samples and records are written; an earlier run there is continued. One per model.
        rollouts: How attempts are made.
        server: An OpenAI-compatible server; give this or ``checkpoint``.
        checkpoint: A checkpoint directory, served by ``sidecar``.
        sidecar: The vLLM server for ``checkpoint``.
        num_samples: Attempts at a task at most.
        max_per_task: Samples kept of a task at most.
        concurrency: Attempts at a time.
        filters: What drops samples, in order; by default every filter that needs no setting. Identical ones always go.
        source: The label of the samples; a task's environment by default.
        seed: Seed of prompt wording and sampling; the run's ``seed_everything`` by default.
    """

    def __init__(
        self,
        output_dir: Path,
        rollouts: RolloutSettings,
        server: ChatServer | None = None,
        checkpoint: Path | None = None,
        sidecar: SidecarFactory | None = None,
        num_samples: Count = 8,
        max_per_task: Count = 1,
        concurrency: Count = 64,
        filters: list[ConversationFilter] | None = None,
        source: str = "",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if (server is None) == (checkpoint is None) or (checkpoint is None) != (sidecar is None):
            raise ConfigError("model: expected either a server, or a checkpoint with a sidecar")
        if not 1 <= max_per_task <= num_samples:
            raise ConfigError(f"max_per_task: expected 1 to num_samples, {num_samples}, got {max_per_task}")
        self.output_dir = output_dir
        self.rollouts = rollouts
        self.server = server
        self.checkpoint = checkpoint
        self.sidecar = sidecar
        self.num_samples = num_samples
        self.max_per_task = max_per_task
        self.concurrency = concurrency
        self.filters = filters
        self.source = source
        self.seed = seed
        self.summary: dict[str, Any] = {}
        self._stack = ExitStack()

    def check_run(self, trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> None:
        """Refuse several processes, tasks that cannot be attempted, and a server that cannot serve them."""
        if trainer.num_devices * trainer.num_nodes > 1:
            raise ConfigError(f"trainer.devices: expected one process, got {trainer.num_devices * trainer.num_nodes}")
        tasks = load_task_sets(data.task_sets) if isinstance(data, TaskDataModule) else []
        if self.checkpoint is None or self.sidecar is None:
            self.rollouts.prepare(tasks)
        else:
            check_serving([self.checkpoint], tasks, self.rollouts, self.sidecar, self.output_dir)

    def configure_callbacks(self) -> list[Callback]:
        return [_StopsServer(self._stack)]

    def on_predict_start(self) -> None:
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.output_dir = Path(self.trainer.default_root_dir)
        drop_torn_line(self.output_dir / "verified.jsonl")
        filters = default_filters() if self.filters is None else self.filters
        self._kept = KeptSamples(self.output_dir / "verified.jsonl", [*filters, Identical()], self.max_per_task)
        self._served, self._runner = self._serve()

    def predict_step(self, batch: list[Task], batch_idx: int = 0) -> int:
        """Sample these tasks; how many samples are kept by then."""
        self.rollouts.prepare(batch)
        log = self.output_dir / "attempts.jsonl"
        keep = self._keeper(batch)
        seed = run_seed(self.seed)
        for sample in range(self.num_samples):
            lacking = [task for task in batch if self._kept.lacks(task)]
            if lacking:
                samples, recorded = range(sample, sample + 1), read_attempts(log)
                plan = plan_attempts(self._runner, lacking, self._served, samples, recorded, seed=seed)
                attempt_all(self._runner, self._served.checkpoint, plan, log, self.concurrency, seed, keep)
        return len(self._kept.samples())

    def on_predict_end(self) -> None:
        kept = self._kept.samples()
        write_samples(self.output_dir / "samples.jsonl", kept)
        recorded = read_attempts(self.output_dir / "attempts.jsonl")
        latest = {attempt.key: attempt for attempt in recorded if attempt.weights == self._served.weights}
        self.summary = summarise(list(latest.values()), kept, self._kept.fit.dropped)
        write_result(self.output_dir / "summary.json", json.dumps(self.summary, indent=2) + "\n")
        _print(self.summary, self.output_dir / "samples.jsonl")

    def _serve(self) -> tuple[Served, AttemptRunner]:
        """A name for the model, and the runner that attempts tasks with it; a sidecar is stopped with the run."""
        if self.server is not None:
            self.rollouts.check_without_checkpoint()
            name = f"{self.server.model} at {self.server.url}"
            return Served(self.server.model, name), self.rollouts.make_chat_runner(self.server)
        assert self.checkpoint is not None
        assert self.sidecar is not None
        log = self.output_dir / "vllm.log"
        self.output_dir.mkdir(parents=True, exist_ok=True)
        serving = self._stack.enter_context(checkpoint_server([self.checkpoint], self.rollouts, self.sidecar, log))
        return Served(self.checkpoint.name, weights_digest(self.checkpoint)), serving.runner

    def _keeper(self, batch: Iterable[Task]) -> Callable[[Rollout], None]:
        tasks = {task.id: task for task in batch}

        def keep(rollout: Rollout) -> None:
            if is_solved(rollout) and not num_invalid_turns(rollout):
                task = tasks[rollout.task_id]
                self._kept.add(sample_of(rollout, task, self.rollouts.harnesses[task.environment], self.source))

        return keep


class _StopsServer(Callback):
    """However the run ends."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stack.close()


class KeptSamples:
    """Verified samples on disk, and which of them are kept; the same ones after a restart.

    Args:
        path: A file that grows by every verified sample.
        filters: What drops samples, in order.
        max_per_task: Samples kept of a task at most.
    """

    def __init__(self, path: Path, filters: list[ConversationFilter], max_per_task: int) -> None:
        self.path = path
        self.max_per_task = max_per_task
        self.fit = SampleFilter(filters)
        self._by_task: dict[str, list[Conversation]] = defaultdict(list)
        if path.exists() and path.stat().st_size:
            for sample in read_samples(path):
                self._sort(sample)

    def add(self, sample: Conversation) -> None:
        append_sample(self.path, sample)
        self._sort(sample)

    def lacks(self, task: Task) -> bool:
        """Whether more samples of the task are wanted."""
        return len(self._by_task[task.id]) < self.max_per_task

    def samples(self) -> list[Conversation]:
        """What is kept, by task."""
        return [sample for _, samples in sorted(self._by_task.items()) for sample in samples]

    def _sort(self, sample: Conversation) -> None:
        kept = self._by_task[sample.task_id]
        if len(kept) >= self.max_per_task:
            self.fit.count(sample, "enough_of_task", f"{self.max_per_task} are kept")
        else:
            kept += self.fit([sample])


def summarise(attempts: list[Attempt], kept: list[Conversation], dropped: Counter[str]) -> dict[str, Any]:
    """How many attempts were made, failed outside of the model, were verified, and are kept; in all and by group."""
    family_of = {attempt.task_id: attempt.family for attempt in attempts}
    total: Counter[str] = Counter()
    groups: dict[str, dict[str, Counter[str]]] = {"by_harness": defaultdict(Counter), "by_family": defaultdict(Counter)}

    def count(what: str, harness: str, family: str) -> None:
        for counter in (total, groups["by_harness"][harness], groups["by_family"][family]):
            counter[what] += 1

    rejected = 0
    for attempt in attempts:
        harness = attempt.harness.rpartition("-")[0]
        count("attempted", harness, attempt.family)
        if attempt.reward is None:
            count("failed", harness, attempt.family)
        if attempt.solved:
            count("verified", harness, attempt.family)
            rejected += attempt.invalid_turns > 0
    for sample in kept:
        count("kept", sample.harness, family_of.get(sample.task_id, ""))
    reasons = dict(dropped) | ({"invalid_turn": rejected} if rejected else {})
    return {
        **{what: total[what] for what in COUNTS},
        "dropped": reasons,
        **{
            group: {name: {what: counter[what] for what in COUNTS} for name, counter in sorted(counters.items())}
            for group, counters in groups.items()
        },
    }


def _print(summary: dict[str, Any], path: Path) -> None:
    table = Table("", *COUNTS, title=str(path), title_justify="left")
    rows = [("all", summary), *summary["by_harness"].items(), *summary["by_family"].items()]
    for name, counts in rows:
        table.add_row(escape(printable(name)), *(str(counts[what]) for what in COUNTS))
    console = Console(highlight=False)
    console.print(table)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(summary["dropped"].items()))
    console.print(f"verified but dropped: {reasons or 'none'}")
