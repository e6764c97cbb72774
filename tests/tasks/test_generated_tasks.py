"""Generated tasks: valid by construction (gold passes, untouched fails), disjoint by split, deterministic."""

import asyncio
import subprocess
from pathlib import Path

import pytest

from north_lightning.errors import TaskError
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import image_of, load_task, load_tasks, write_task
from north_lightning.tasks.names import NameSource, split_of
from north_lightning.tasks.software import KINDS, software_task
from north_lightning.tasks.terminal import FAMILIES, terminal_task
from north_lightning.types import Rollout, Task
from north_lightning.verifiers import UnitTestVerifier

INDICES = range(3 * len(FAMILIES))


def all_words(directory: Path) -> set[str]:
    text = "\n".join(
        str(path.relative_to(directory)) + "\n" + (path.read_text() if path.suffix != ".toml" else "")
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink() and ".git" not in path.parts
    )
    return {word for word in "".join(c if c.isalpha() else " " for c in text).split() if looks_drawn(word)}


def looks_drawn(word: str) -> bool:
    """Two onset-vowel-coda syllables: the shape of a drawn name."""
    return len(word) == 6 and all(c in "bdgkmptz" for c in word[::3]) and all(c in "nr" for c in word[2::3])


def test_there_are_at_least_eight_families_and_five_kinds_of_bug():
    assert len({family.__name__ for family in FAMILIES}) >= 8
    assert len({kind.__name__ for kind in KINDS}) >= 5


def test_a_task_is_a_function_of_index_seed_and_split():
    assert terminal_task(5, 1, "train") == terminal_task(5, 1, "train")
    assert terminal_task(5, 1, "train").instruction != terminal_task(5, 2, "train").instruction
    assert terminal_task(5, 1, "train").instruction != terminal_task(16, 1, "train").instruction
    assert software_task(3, 0, "heldout") == software_task(3, 0, "heldout")


def test_the_two_splits_share_no_name_and_no_number(tmp_path):
    words = {}
    for split in ("train", "heldout"):
        for index in INDICES:
            write_task(terminal_task(index, 0, split), tmp_path / split)
            write_task(software_task(index, 0, split), tmp_path / split)
        words[split] = set().union(*(all_words(child) for child in (tmp_path / split).iterdir()))
        assert len(words[split]) > 200
    assert not words["train"] & words["heldout"]
    assert all(split_of(word) == split for split in words for word in words[split])


def test_names_come_from_thousands_of_values():
    import random

    names = NameSource(random.Random(0), "train")
    assert len({names.name() for _ in range(3000)}) == 3000


def test_software_tasks_are_git_repositories_whose_named_test_fails(tmp_path):
    for index in range(len(KINDS)):
        task = load_task(write_task(software_task(index, 0, "train"), tmp_path))
        image = image_of(task)
        log = subprocess.run(["git", "log", "--oneline"], cwd=image, capture_output=True, text=True, check=True).stdout
        assert log.count("\n") == 1
        for names, expected in (("fail_to_pass", 1), ("pass_to_pass", 0)):
            command = ["python3", "-m", "unittest", *task.metadata[names]]
            result = subprocess.run(command, cwd=image, capture_output=True, env={"PYTHONDONTWRITEBYTECODE": "1"})
            assert result.returncode == expected, (task.family, names, result.stderr)


async def reward_of(task: Task, workdir: Path, script: str | None) -> float:
    provider = BubblewrapProvider()
    sandbox = await provider.open(image_of(task))
    try:
        if script is not None:
            result = await sandbox.run(script, timeout_s=20)
            assert result.exit_code == 0, result.output
        await sandbox.snapshot(workdir)
    finally:
        await sandbox.close()
    attempt = Rollout(task.id, task.environment, task.family, group_id=0, index=0, seed=0)
    return (await UnitTestVerifier().verify(task, attempt, workdir, provider)).value


@pytest.mark.parametrize("generator", [terminal_task, software_task])
def test_the_gold_solution_scores_one_and_the_untouched_state_zero(generator, tmp_path):
    for index in range(11):
        for split in ("train", "heldout"):
            task = load_task(write_task(generator(index, 3, split), tmp_path / "tasks"))
            gold = (task.directory / "solution" / "solve.sh").read_text()
            assert asyncio.run(reward_of(task, tmp_path / f"gold-{split}-{index}", gold)) == 1.0, task
            assert asyncio.run(reward_of(task, tmp_path / f"untouched-{split}-{index}", None)) == 0.0, task


def test_bad_task_directories_are_named(tmp_path):
    with pytest.raises(TaskError, match="no such task set"):
        load_tasks(tmp_path / "nowhere")
    directory = write_task(terminal_task(0, 0, "train"), tmp_path)
    (directory / "task.toml").write_text("[metadata]\nfamily = 3\n")
    with pytest.raises(TaskError, match=r"\[metadata\] family: expected a name of at most 200 characters, got 3"):
        load_task(directory)
    listing = tmp_path / "set.jsonl"
    listing.write_text('{"directory": "x"}\nnonsense\n')
    with pytest.raises(TaskError, match="x/task.toml: not found"):
        load_tasks(listing)


def test_the_verifiers_limit_is_read_and_a_bad_one_is_named(tmp_path):
    directory = write_task(terminal_task(0, 0, "train"), tmp_path)
    config = directory / "task.toml"
    text = config.read_text()
    assert load_task(directory).verifier_timeout_s == 60.0
    config.write_text(text.replace("[verifier]\ntimeout_sec = 60\n", ""))
    assert load_task(directory).verifier_timeout_s is None
    for bad in ("0", "-3", "inf", "nan"):
        config.write_text(text.replace("[verifier]\ntimeout_sec = 60", f"[verifier]\ntimeout_sec = {bad}"))
        with pytest.raises(TaskError, match=r"task.toml: \[verifier\] timeout_sec: expected a positive number"):
            load_task(directory)


def test_a_listing_overrides_the_step_budget(tmp_path):
    directory = write_task(terminal_task(0, 0, "train"), tmp_path)
    listing = tmp_path / "set.jsonl"
    listing.write_text(f'{{"directory": "{directory.name}", "max_turns": 4}}\n')
    assert load_tasks(listing)[0].max_turns == 4 != load_task(directory).max_turns
