"""Commands that are struck at random moments of their work, and started again by the same command.

In: what they read, and how often each is struck. What they write is whole or absent afterwards, and at the end what a
command writes that nobody strikes. Anything else raises.
"""

from __future__ import annotations

import importlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from struck_lives import Striker

from north_lightning.cli import UTILITIES

NUM_ROWS = 12
OVERWRITE = ("tasks", "data filter")
"""Commands that refuse to replace what is there."""
GROWS = ("test",)
"""What these write is there before it is whole."""
FORMAT1 = Path(__file__).parents[1] / "fixtures" / "format1"


def write_rows(inputs: Path) -> None:
    """``clone`` and ``rows.jsonl``, for ``tasks import``."""
    clone = inputs / "clone"
    (clone / "tests").mkdir(parents=True)
    commits = []
    for code in ("def double(x):\n    return x + 2\n", "def double(x):\n    return x * 2\n"):
        (clone / "number.py").write_text(code)
        (clone / "tests" / "test_number.py").write_text(f"# {len(commits)}\n")
        _git(clone, "init", "-q"), _git(clone, "add", "-A"), _git(clone, "commit", "-q", "-m", "state")
        commits.append(_git(clone, "rev-parse", "HEAD").strip())
    patch = _git(clone, "diff", *reversed(commits), "--", "number.py")
    row = {"repo": f"swesmith/a__n.{commits[1][:8]}", "patch": patch}  # of SWE-smith: needs no grader of others
    row |= {"problem_statement": "double is wrong.", "FAIL_TO_PASS": ["tests/test_number.py::test"], "PASS_TO_PASS": []}
    lines = (json.dumps(row | {"instance_id": f"a__n-{number}"}) for number in range(NUM_ROWS))
    (inputs / "rows.jsonl").write_text("\n".join(lines) + "\n")


def _git(clone: Path, *arguments: str) -> str:
    words = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def commands(inputs: Path, folder: Path, fit: dict[str, Any], rollouts: dict[str, Any]) -> dict[str, list[str]]:
    """Command -> its arguments; it writes into ``folder / "out"``, if at all."""
    out = folder / "out"
    sidecar = {"class_path": "struck_lives.SlowSidecar", "init_args": {"max_model_len": 2000}}
    test = {"task_sets": [str(inputs / "tasks")], "output_dir": str(out), "rollouts": rollouts, "sidecar": sidecar}
    test |= {"checkpoints": {"start": str(inputs / "start")}, "num_samples": 2, "concurrency": 4}
    sources = {name: {"files": [str(inputs / f"{name}.jsonl")]} for name in ("names", "sums")}
    for name, config in {"test": test, "fit": fit}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return {
        "tasks import": [
            *("--rows", json.dumps([str(inputs / "rows.jsonl")]), "--output_dir", str(out)),
            *("--clones", json.dumps({"a/n": str(inputs / "clone")})),
        ],
        "data filter": ["--sources", json.dumps(sources), "--output_dir", str(out)],
        "tasks check": [*(100 * [str(task) for task in sorted((inputs / "tasks").iterdir())])],
        "tasks": [
            *("--output_dir", str(out)),
            *("--sets", json.dumps([{"name": "a", "environment": "terminal", "split": "train", "count": 20}])),
        ],
        "test": ["--config", str(folder / "test.yaml")],
        "estimate": ["--config", str(folder / "fit.yaml")],
        "export": [
            *("--checkpoint", str(FORMAT1 / "file.ckpt"), "--tokenizer", str(FORMAT1 / "tokenizer")),
            *("--directory", str(out)),
        ],
    }


def strike_commands(
    striker: Striker, inputs: Path, num_strikes: int, fit: dict[str, Any], rollouts: dict[str, Any]
) -> Iterator[dict[str, int]]:
    """Strikes of each command so far: as many of each, or one more."""
    struck = Counter[str]()
    names = list(commands(inputs, striker.folder(), fit, rollouts))
    for number, name in enumerate(names):
        importlib.import_module(UTILITIES[name][0].split(":")[0])  # lives begin with it
        wanted = -(-(num_strikes - number) // len(names))
        written, seconds = {}, 0.0
        while wanted and (seconds == 0 or struck[name] < wanted):
            folder = striker.folder()
            words = [*name.split(), *commands(inputs, folder, fit, rollouts)[name]]
            if seconds == 0:
                seconds = striker.command(folder, words)
                written = contents(folder / "out")
                continue
            before = striker.num_strikes
            code = striker.struck_command(folder, words, name, seconds)
            struck[name] += striker.num_strikes - before
            if code != 0:
                if name not in GROWS:
                    partial = contents(folder / "out")
                    assert partial.items() <= written.items(), f"{folder}: half-written: {partial.keys()}"
                striker.command(folder, [*words, *(("--overwrite", "true") if name in OVERWRITE else ())])
            again = contents(folder / "out")
            assert {path: again.get(path) for path in written} == written, f"{folder}: other contents"
            hidden = [path for place in (folder, folder / "out") for path in place.glob(".*")]
            assert not hidden, f"{folder}: left over: {hidden}"
        yield dict(struck)


def contents(out: Path) -> dict[str, object]:
    """File -> what is in it; of attempts, the rewards."""
    found: dict[str, object] = {}
    for path in (path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if any(part.startswith(".") for part in path.relative_to(out).parts) or path.suffix in (".log", ".1"):
            continue
        if name == "attempts.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = sorted((line["task"], line["seed"], line["reward"]) for line in lines)
        elif name != "summary.json":  # has seconds, as archives have
            found[name] = "there" if name.startswith("works/") else path.read_bytes()
    return found
