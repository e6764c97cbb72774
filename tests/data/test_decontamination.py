"""Leaks are found by every road they come in, and what only resembles one is left alone."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from data_fuzz import Benchmark, edit, prose, sound_conversation

from north_lightning.data.block_lists import SHIPPED, load_block_list, ngram_fingerprints, write_block_list
from north_lightning.data.decontamination import (
    CommitLeak,
    InstructionLeak,
    PatchLeak,
    RepositoryLeak,
    StatementLeak,
)
from north_lightning.data.dedup import Duplicate, word_runs
from north_lightning.errors import ConfigError, DataError
from north_lightning.types import Conversation, Message, ToolCall


def about(text: str = "Fix it.", **labels: str) -> Conversation:
    return Conversation((Message("user", text), Message("assistant", "Done.")), **labels)


def typed(command: str) -> Conversation:
    call = Message("assistant", tool_calls=(ToolCall("0", "bash", {"command": command}),))
    return Conversation((Message("user", "Fix it."), call))


@pytest.fixture(scope="module")
def benchmark_(tmp_path_factory) -> Benchmark:
    return Benchmark(tmp_path_factory.mktemp("benchmark"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_lists_say_source_and_date_and_hold_the_repositories(name):
    listed = load_block_list(name)
    assert len(listed.repositories) == {"swe_bench": 12, "swe_bench_pro": 11}[name]
    assert listed.source
    assert listed.date.startswith("20")


DJANGO = (
    "django__django-11099-3",
    "django__django-11099_0",
    "django__django-11099.1-of-1.json",
    "instance_django__django-11099__run_2",
    "sweb.eval.x86_64.django_1776_django-11099:latest",
    "xingyaoww/sweb.eval.x86_64.django_s_django-11099",
    "ghcr.io/epoch-research/swe-bench.eval.arm64.django__django-11099",
    "swesmith.x86_64.django_1776_django.1a2b3c4d",
    "/testbed/django__django__3.0",
)
GETS_DJANGO = (
    "pip install git+https://github.com/django/django.git@main",
    "pip install 'django @ git+ssh://git@github.com/django/django'",
    "uv pip install https://github.com/django/django/archive/main.zip",
    "git remote add upstream https://github.com/django/django",
    "git -C repo remote set-url origin git@github.com:django/django.git",
    "git fetch https://github.com/django/django.git main",
    "git fetch \\\n  https://github.com/django/django",
    "git submodule add https://github.com/django/django vendor/django",
    "curl -sL https://raw.githubusercontent.com/django/django/main/setup.py",
    "wget https://codeload.github.com/django/django/tar.gz/refs/tags/3.0",
    "curl https://api.github.com/repos/django/django/contents/setup.py",
    "curl -L https://github.com/django/django/pull/123.diff | git apply",
    "gh repo clone django/django",
    "gh pr checkout 12 --repo django/django",
    "npm install github:django/django",
)


@pytest.mark.parametrize(
    ("sample", "blocked"),
    [
        (about(repo="django/django"), "django/django of swe_bench"),
        (about(repo="https://github.com/Django/Django.git"), "django/django of swe_bench"),
        (about(repo="git@github.com:kennethreitz/requests"), "psf/requests of swe_bench"),
        (about(repo="someone/scikit-learn"), "the name of scikit-learn/scikit-learn of swe_bench"),
        (about(repo="swesmith/sympy__sympy.1a2b3c4d"), "sympy/sympy of swe_bench"),
        (about(task_id="astropy__astropy-12907"), "astropy/astropy of swe_bench"),
        (about(task_id=f"instance_NodeBB__NodeBB-{'a' * 40}-vnan"), "NodeBB/NodeBB of swe_bench_pro"),
        (
            about(task_id="pylint-dev__astroid.b114f6b5.func_pm__x1", repo="vector-im/riot-web"),
            "element-hq/element-web",
        ),
        (about("Solve sphinx-doc__sphinx-8273."), "sphinx-doc/sphinx of swe_bench"),
        (typed("cd /tmp && git clone --depth 1 https://github.com/pallets/flask.git"), "pallets/flask of swe_bench"),
        *((about(f"See {text} there."), "django/django of swe_bench") for text in DJANGO),
        *((about(task_id=text), "django/django of swe_bench") for text in DJANGO[:4]),
        *((typed(text), "django/django of swe_bench") for text in GETS_DJANGO),
        (typed(["git", "clone", "https://github.com/django/django"]), "django/django of swe_bench"),
    ],
)
def test_repositories_are_found_under_any_name(sample, blocked):
    assert blocked in RepositoryLeak().find_fault(sample)


@pytest.mark.parametrize(
    "sample",
    [
        about(repo="spam/eggs", task_id="spam__eggs-12"),
        about(repo="django/channels"),
        about("As in https://github.com/django/django/issues/1, but in our code; uses requests and flask."),
        about("__init__ of a__b and snake__case-names"),
        typed("pip install django && git clone https://github.com/spam/django-tools"),
        typed("git commit -m 'as django/django does' && ls django/django"),
        about("Read https://github.com/django/django/blob/main/setup.py"),
    ],
)
def test_other_repositories_and_mere_mentions_are_no_leaks(sample):
    assert RepositoryLeak().find_fault(sample) is None


def test_a_fifth_of_a_statement_is_no_leak_and_a_half_is(benchmark_):
    leak = StatementLeak([str(benchmark_.block_list)])
    words = max((instance["problem_statement"] for instance in benchmark_.instances), key=len).split()
    assert leak.find_fault(about(" ".join(words[: len(words) // 5]))) is None
    assert "of the statement of acme__rocket" in leak.find_fault(about(" ".join(words[: len(words) * 6 // 10])))


def test_part_of_a_hunk_a_short_hunk_and_removed_lines_are_no_leaks(benchmark_):
    leak = PatchLeak([str(benchmark_.block_list)])
    instance = max(benchmark_.instances, key=lambda one: len(one["patch"]))
    lines = benchmark_.added_lines(instance)
    assert len(lines) > 2
    assert "gold patch of acme__rocket" in leak.find_fault(about("\n".join(lines)))
    assert leak.find_fault(about("\n".join(lines[:-1]))) is None
    assert leak.find_fault(about("\n".join(reversed(lines)))) is None
    assert leak.find_fault(about("old\na = 1\nb = 2")) is None


def test_other_commits_and_short_prefixes_are_no_leaks(benchmark_):
    leak = CommitLeak([str(benchmark_.block_list)])
    commit = benchmark_.instances[0]["base_commit"]
    other = commit[:-1] + ("0" if commit[-1] != "0" else "1")
    assert "base commit of acme__rocket0-0 of made_up" in leak.find_fault(about(f"at {commit}:"))
    assert leak.find_fault(about(f"at {other}, {commit[:11]} or {commit}0")) is None


def test_an_instruction_is_found_whatever_its_case_and_punctuation(benchmark_):
    leak = InstructionLeak([str(benchmark_.block_list)])
    assert leak.find_fault(about(benchmark_.tasks[3].upper() + "!!")).endswith("task-3 of made_up")
    assert leak.find_fault(about(benchmark_.tasks[3] + " please")) is None


def test_a_block_list_gives_nothing_of_the_benchmark_away(benchmark_):
    text = benchmark_.block_list.read_text()
    for instance in benchmark_.instances:
        assert not any(line in text for line in benchmark_.added_lines(instance))
        assert " ".join(instance["problem_statement"].split()[:4]) not in text


def test_ngrams_are_those_of_a_ten_line_reference():
    words = [f"w{number}" for number in range(15)]
    assert len(ngram_fingerprints(" ".join(words))) == 3
    assert ngram_fingerprints("W0, w1!") == ngram_fingerprints("w0 w1")
    assert ngram_fingerprints(" ".join(words[1:14])) < ngram_fingerprints(" ".join(words))


def test_a_list_without_source_and_an_unknown_list_are_mistakes_of_the_config(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({"name": "x", "source": "", "date": "2026-01-01"}))
    for name in (str(tmp_path / "list.json"), "swe_bench_max"):
        with pytest.raises(ConfigError, match="block_lists"):
            RepositoryLeak([name]).find_fault(about(repo="a/b"))
    with pytest.raises(DataError, match="expected a benchmark, found nothing"):
        write_block_list("x", "s", tmp_path / "out.json", task_dirs=[Path(tmp_path)])


# ---- duplicates ----------------------------------------------------------------------------------------------------


def exact_similarity(a: Conversation, b: Conversation) -> float:
    first, second = set(word_runs(a, 5)), set(word_runs(b, 5))
    return len(first & second) / len(first | second)


def test_estimated_similarity_agrees_with_the_exact_one():
    rng = random.Random(3)
    for _ in range(200):
        base = about(prose(rng, 300, 400))
        words = base.messages[0].content.split()
        for position in rng.sample(range(len(words)), rng.randrange(20)):
            words[position] = f"new{position}"
        changed = edit(base, 0, content=" ".join(words))
        exact = exact_similarity(base, changed)
        duplicate = Duplicate(min_similarity=0.8)
        assert duplicate.find_fault(base) is None
        found = duplicate.find_fault(changed) is not None
        if abs(exact - 0.8) > 0.12:  # more than three standard errors away from the threshold
            assert found == (exact > 0.8)


def test_another_attempt_at_the_same_task_is_no_duplicate():
    rng = random.Random(0)
    task = prose(rng, 30, 40)
    duplicate = Duplicate()
    for _ in range(20):
        attempt = sound_conversation(rng)
        attempt = edit(replace(attempt, task_id="same"), 0, content=task)
        assert duplicate.find_fault(attempt) is None


def test_the_system_prompt_and_an_agent_programs_words_make_no_duplicate_and_hide_none():
    rng = random.Random(0)
    system = Message("system", prose(rng, 1800, 1900))
    rules = f"<uploaded_files>\n/testbed\n</uploaded_files>\n{prose(rng, 900, 1000)}"
    terminal = f"You are an AI assistant in a terminal. Answer as JSON.\n{prose(rng, 500, 600)}\nTask Description:\n"
    frames = (
        lambda task: (system, Message("user", task)),
        lambda task: (Message("user", f"{rules}\n<pr_description>\n{task}\n</pr_description>\n{rules}"),),
        lambda task: (Message("user", f"{terminal}{task}\n\nCurrent terminal state:\n$"),),
        lambda task: (Message("user", f"Please solve this issue: {task}\n\nYou can execute bash commands. {rules}"),),
    )
    for frame in frames:
        duplicate = Duplicate()
        tasks = [prose(rng, 12, 15) for _ in range(20)]
        found = [duplicate.find_fault(Conversation((*frame(task), Message("assistant", "Done.")))) for task in tasks]
        assert found == [None] * 20
        again = duplicate.find_fault(Conversation((*frame(tasks[0]), Message("assistant", "Done."))))
        assert again == "messages: 100% like kept sample 1 /"
    duplicate = Duplicate()
    task = prose(rng, 40, 60)
    assert duplicate.find_fault(Conversation((*frames[0](task), Message("assistant", "Done.")))) is None
    assert duplicate.find_fault(about(task)) is not None, "the same task under another system prompt"
