"""Records SFT data: scripted solutions carried out through the harnesses in the sandbox, and verified.

In: task sets whose tasks have a scripted solution. Out: ``<output_dir>/<environment>.jsonl``, one conversation a line.
Every tool call in it was executed, every observation is what came back, and the verifier gave the result a 1; a
solution that scores less is an error of the task, not a sample.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from north_lightning.data.sources import write_samples
from north_lightning.errors import ConfigError, TaskError
from north_lightning.interfaces import Harness, SandboxProvider
from north_lightning.rollout.attempt import record_scripted, script_of_calls
from north_lightning.rollout.metrics import is_solved
from north_lightning.rollout.settings import AttemptSettings
from north_lightning.run_folders import claim
from north_lightning.tasks import image_of, load_task_sets, solution_steps
from north_lightning.tasks.names import Split
from north_lightning.tasks.single_turn import Question, command_question, verify_commands, word_question
from north_lightning.types import Conversation, Count, Fraction, Rollout, Task, Whole

# A first look that the task does not need: real trajectories have such turns, and RL learns to leave them out.
LOOK_AROUND = {"terminal": ("terminal", {"keystrokes": "ls"}), "swe": ("bash", {"command": "ls"})}


def record_trajectories(
    task_sets: list[Path],
    output_dir: Path,
    rollouts: AttemptSettings,
    look_around_fraction: Fraction = 0.15,
    concurrency: Count = 8,
    seed: int = 0,
    num_questions: Whole = 0,
    split: Split = "train",
    overwrite: bool = False,
) -> None:
    """Record a trajectory of every task, and verified single-turn questions beside them.

    Args:
        task_sets: Directories of tasks, or listings.
        output_dir: Where ``<environment>.jsonl``, ``commands.jsonl`` and ``words.jsonl`` are written.
        rollouts: How attempts are made; every solution must score 1 with the verifier.
        look_around_fraction: Share of the trajectories that begin with a needless look around.
        concurrency: Tasks at a time.
        seed: Of wordings and looks around.
        num_questions: Single-turn questions of each kind (commands, words).
        split: Whose names the questions use.
        overwrite: Move an earlier recording aside, to NAME.1, instead of refusing to replace it.
    """
    if concurrency < 1:
        raise ConfigError(f"concurrency: expected at least 1, got {concurrency}")
    tasks = load_task_sets(task_sets)
    sources = {task.environment for task in tasks} | ({"commands", "words"} if num_questions else set())
    claim("output_dir", [output_dir / f"{source}.jsonl" for source in sorted(sources)], overwrite)
    rollouts.prepare(tasks)
    recorded = asyncio.run(_record_all(tasks, rollouts, look_around_fraction, concurrency, seed))
    by_source: dict[str, list[Conversation]] = {}
    for conversation in recorded:
        by_source.setdefault(conversation.source, []).append(conversation)
    for question in asyncio.run(_questions(num_questions, seed, split, rollouts.sandboxes)):
        conversation = Conversation(question.messages, (), source=question.source)
        by_source.setdefault(question.source, []).append(conversation)
    for source, conversations in by_source.items():
        write_samples(output_dir / f"{source}.jsonl", conversations)


async def _record_all(
    tasks: Sequence[Task], rollouts: AttemptSettings, look_around_fraction: float, concurrency: int, seed: int
) -> list[Conversation]:
    slots = asyncio.Semaphore(concurrency)
    with Progress() as progress:
        bar = progress.add_task("trajectories", total=len(tasks))

        async def one(task: Task) -> Conversation:
            async with slots:
                rng = random.Random(f"{seed}/{task.id}")
                look_around = rng.random() < look_around_fraction
                variation = rng.getrandbits(31)  # not the task's number, which also decides its family
                conversation = await _record(task, rollouts, variation, look_around)
                progress.advance(bar)
                return conversation

        return list(await asyncio.gather(*map(one, tasks)))


async def _record(task: Task, rollouts: AttemptSettings, variation: int, look_around: bool) -> Conversation:
    harness = rollouts.harnesses[task.environment]
    steps = ([LOOK_AROUND[task.environment]] if look_around else []) + solution_steps(task)
    rollout = await record_scripted(
        task,
        harness,
        script_of_calls(steps),
        sandboxes=rollouts.sandboxes,
        verifier=rollouts.verifier,
        image_of=image_of,
        variation=variation,
        timeouts=rollouts.timeouts,
    )
    if not is_solved(rollout):
        raise TaskError(f"{task.directory}: the scripted solution scored {rollout.reward}, expected 1")
    return sample_of(rollout, task, harness)


def sample_of(rollout: Rollout, task: Task, harness: Harness, source: str = "") -> Conversation:
    """A solved attempt as a sample for SFT, labelled by its ``source`` or else by its environment."""
    return Conversation(
        tuple(rollout.messages),
        harness.prompt(task).tools,
        source=source or task.environment,
        harness=harness.name,
        environment=task.environment,
        task_id=task.id,
        verified=True,
    )


async def _questions(count: int, seed: int, split: Split, sandboxes: SandboxProvider) -> list[Question]:
    questions = [make(index, seed, split) for make in (command_question, word_question) for index in range(count)]
    await verify_commands(questions, sandboxes)
    return questions
