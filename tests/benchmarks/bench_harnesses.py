"""Fuzzed episodes through every harness in real sandboxes, at full size: outcomes, and drift of tokens.

    python tests/benchmarks/bench_harnesses.py [--episodes 1000] [--outputs 10000] [--output runs/bench/harnesses.json]

So many episodes of several turns, and outputs, per harness. It fails if anything escapes a harness, an episode takes
two minutes, or one token drifts. It also reads generated task directories as ``tasks check`` does, and says how many a
second.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "harnesses"), str(ROOT / "tasks")]

from fuzz import HARNESSES, fuzz  # noqa: E402
from harbor_directories import DIRECTORIES, write_directory  # noqa: E402

from north_lightning.errors import TaskError  # noqa: E402
from north_lightning.tasks.check import check_tasks  # noqa: E402


def check_rate(copies):
    """Directories a second, warm, of the test's directories in so many copies."""
    with tempfile.TemporaryDirectory() as parent:
        paths = [
            write_directory(name, Path(parent, str(copy), str(number)))
            for copy in range(copies)
            for number, name in enumerate(DIRECTORIES)
        ]
        started = time.perf_counter()
        with contextlib.suppress(TaskError), contextlib.redirect_stdout(io.StringIO()):
            check_tasks(paths)
        seconds = time.perf_counter() - started
    return {"directories": len(paths), "seconds": round(seconds, 3), "per_second": round(len(paths) / seconds)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--outputs", type=int, default=10_000)
    parser.add_argument("--harness", action="append", choices=list(HARNESSES))
    parser.add_argument("--output", type=Path, default=Path("runs/bench/harnesses.json"))
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if not arguments.harness:
        results["tasks check"] = check_rate(copies=20)
        print("tasks check", results["tasks check"], flush=True)
    for name in arguments.harness or HARNESSES:
        started = time.monotonic()
        report = fuzz(name, arguments.episodes, min_outputs=arguments.outputs)
        results[name] = {
            "episodes": report.episodes,
            "multi_turn_episodes": report.multi_turn_episodes,
            "outputs": report.outputs,
            "drifted_tokens": report.drifted_tokens,
            "episodes_ended": dict(report.ends),
            "outputs_ended": dict(report.turns),
            "seconds": round(time.monotonic() - started, 1),
        }
        print(name, results[name], flush=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")
        assert report.drifted_tokens == 0, f"{name}: {report.drifted_tokens} tokens drifted"


if __name__ == "__main__":
    main()
