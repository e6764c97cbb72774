"""Mutation testing of the core: change one thing, run the tests that mirror the file, print what nobody noticed.

A mutation swaps an operator or a comparison, moves a constant by one, negates a condition, drops a statement or a
return value. Files are drawn evenly, then a mutation of the file; one seed always draws the same. Every mutation is
made in a copy of the tree and tested in a forked child with a time limit; a hang counts as noticed. Mutants that change
nothing observable exist: read the survivors, and write the test that is missing.

    make mutants                                            # 48 mutations, a few minutes
    make mutants ARGS="--seed 7 --count 100 --only losses"  # another sample, of files whose path has "losses" in it
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "north_lightning"
CORE = {
    "losses/logprobs.py": ["losses"],
    "losses/cispo.py": ["losses"],
    "losses/masked_importance.py": ["losses"],
    "losses/truncated_importance.py": ["losses"],
    "losses/gspo.py": ["losses"],
    "losses/policy_gradient.py": ["losses"],
    "losses/cross_entropy.py": ["losses"],
    "losses/metrics.py": ["losses"],
    "data/mixing.py": ["data/test_mixing.py"],
    "data/packing.py": ["data/test_packing.py", "data/test_sft_data.py"],
    "data/stream.py": ["data/test_stream.py"],
    "data/batches.py": ["data/test_sft_data.py", "data/test_rollout_data.py"],
    "chat/render.py": ["chat"],
    "chat/training.py": ["chat"],
    "model/decoder.py": ["model/test_transformers_parity.py", "model/test_port_mistakes.py", "model/test_compute.py"],
    "model/attention.py": ["model/test_transformers_parity.py", "model/test_block_attention.py"],
    "model/experts.py": ["model/test_experts.py", "model/test_router_replay.py"],
    "model/checkpoint.py": ["model/test_checkpoint_files.py", "model/test_transformers_parity.py"],
    "modules/base.py": ["modules/test_sft_module.py", "modules/test_cispo_module.py", "modules/test_optimizers.py"],
    "modules/schedule.py": ["modules/test_optimizers.py", "modules/test_sft_module.py"],
    "verifiers/unit_tests.py": ["verifiers/test_unit_tests.py"],
    "verifiers/graded_tree.py": ["verifiers/test_graded_tree.py", "verifiers/test_unit_tests.py"],
    "verifiers/penalties.py": ["verifiers/test_penalties.py"],
    "verifiers/loops.py": ["verifiers/test_penalties.py"],
    "tasks/logs.py": ["tasks/test_swe_rows.py"],
    "rollout/queue.py": ["rollout/test_windowed_fifo_queue.py"],
    "rollout/producer.py": ["rollout/test_rollout_producer.py", "rollout/test_producer_schedules.py"],
    "rollout/advantages.py": ["rollout/test_advantages_and_metrics.py"],
    "rollout/metrics.py": ["rollout/test_advantages_and_metrics.py"],
    "rollout/schedule.py": ["rollout/test_task_schedule.py"],
    "rollout/trajectories.py": ["rollout/test_trajectories.py", "rollout/test_records.py"],
    "sampling/transport.py": ["sampling/test_pool.py", "sampling/test_client.py"],
    "evaluation/statistics.py": ["evaluation/test_statistics.py"],
    "evaluation/summary.py": ["evaluation/test_evaluate.py"],
    "evaluation/attempts.py": ["evaluation/test_evaluate.py"],
}
FAST = "not vllm and not slow and not long and not gpu"
SWAPS: dict[type, str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is", ast.And: "or", ast.Or: "and",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/", ast.Mod: "*", ast.Pow: "*",
}  # fmt: skip


def mutations(source: str) -> list[tuple[int, str]]:
    """(line, whole mutated source) for every mutation of a file, in order."""
    lines = source.encode().splitlines(keepends=True)
    starts = [0, *[sum(map(len, lines[: i + 1])) for i in range(len(lines))]]

    def replaced(node: ast.AST, text: str, end: ast.AST | None = None) -> tuple[int, str]:
        last = end or node
        head, tail = starts[node.lineno - 1] + node.col_offset, starts[last.end_lineno - 1] + last.end_col_offset
        data = source.encode()
        return node.lineno, (data[:head] + text.encode() + data[tail:]).decode()

    def text(node: ast.AST) -> str:
        return ast.get_source_segment(source, node) or ""

    def of(node: ast.AST) -> Iterator[tuple[int, str]]:
        match node:
            case ast.Compare(left=left, ops=[operator], comparators=[right]):
                yield replaced(node, f"{text(left)} {SWAPS[type(operator)]} {text(right)}")
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in SWAPS:
                yield replaced(node, f"({text(left)} {SWAPS[type(operator)]} {text(right)})")
            case ast.BoolOp(op=operator, values=values):
                yield replaced(
                    node, "(" + f" {SWAPS[type(operator)]} ".join(f"({text(value)})" for value in values) + ")"
                )
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield replaced(node, f"bool({text(operand)})")
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                yield replaced(node, f"(+{text(operand)})")
            case ast.Constant(value=bool(value)):
                yield replaced(node, str(not value))
            case ast.Constant(value=int(value) | float(value)):
                yield replaced(node, repr(value + 1) if isinstance(value, int) else repr(value * 1.5 or 1.0))
            case ast.Name(id="min" | "max" as name):
                yield replaced(node, "max" if name == "min" else "min")
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                yield replaced(test, f"(not ({text(test)}))")
            case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign() | ast.Raise() | ast.Delete():
                yield replaced(node, "pass")
            case ast.Continue() | ast.Break():
                yield replaced(node, "pass")
            case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
                yield replaced(value, "None")

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        yield from of(node)
        for name, field in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "keywords") and isinstance(node, ast.ClassDef):
                continue
            if name in ("annotation", "returns", "decorator_list") or isinstance(
                node, ast.Raise | ast.JoinedStr | ast.Import
            ):
                continue  # what types and messages say is not looked at
            for child in field if isinstance(field, list) else [field]:
                if isinstance(child, ast.AST):
                    yield from walk(child)

    found = []
    for line, mutant in walk(ast.parse(source)):
        try:
            ast.parse(mutant)
        except SyntaxError:
            continue
        found.append((line, mutant))
    return found


def tests_pass(tree: str, tests: list[str], limit_s: float) -> bool:
    """Whether the tests pass in a copy of the tree, in a forked child: the slow packages are imported already."""
    child = multiprocessing.get_context("fork").Process(target=_test, args=(tree, tests))
    child.start()
    child.join(limit_s)
    try:
        os.killpg(child.pid, signal.SIGKILL)  # and what the tests left running
    except (ProcessLookupError, PermissionError):
        child.kill()
    child.join()
    return child.exitcode == 0


def _test(tree: str, tests: list[str]) -> None:
    os.setsid()
    os.chdir(tree)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.path[:0] = [tree, f"{tree}/tests"]
    os.environ["PYTHONPATH"] = tree
    import pytest

    places = [f"tests/{test}" for test in tests]
    code = pytest.main(["-x", "-q", "-m", FAST, "-p", "no:cacheprovider", "-p", "no:warnings", *places])
    os._exit(int(code))


def copy_of_the_tree(place: Path) -> str:
    shutil.copytree(
        ROOT, place, ignore=shutil.ignore_patterns(".*", "runs", "wandb", "shared", "__pycache__", "*.egg-info")
    )
    return str(place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--only", default="", help="part of the path of the files to mutate")
    parser.add_argument("--jobs", type=int, default=max(1, min(4, len(os.sched_getaffinity(0)))))
    args = parser.parse_args()
    files = [file for file in CORE if args.only in file]
    if not files:
        parser.error(f"--only: expected a part of one of {', '.join(CORE)}, got {args.only!r}")
    rng = random.Random(args.seed)
    sources = {file: (PACKAGE / file).read_text() for file in files}
    everything = {file: mutations(source) for file, source in sources.items()}
    pool = [(file, *one) for file in files for one in rng.sample(everything[file], len(everything[file]))]
    by_file = {file: [one for one in pool if one[0] == file] for file in files}
    sample = []
    while len(sample) < min(args.count, len(pool)):
        left = [file for file in files if by_file[file]]
        sample += [by_file[file].pop() for file in rng.sample(left, min(len(left), args.count - len(sample)))]

    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for slow in ("torch", "lightning", "hypothesis", "transformers", "pytest", "matplotlib"):
        importlib.import_module(slow)
    survivors, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="north-mutants-") as scratch:
        trees: Queue[str] = Queue()
        for job in range(args.jobs):
            trees.put(copy_of_the_tree(Path(scratch) / str(job)))

        def seconds_alone(tests: list[str]) -> float:
            tree, start = trees.get(), time.monotonic()
            try:
                if not tests_pass(tree, tests, 600):
                    raise SystemExit(f"tests/{' tests/'.join(tests)} fail without a mutation")
                return time.monotonic() - start
            finally:
                trees.put(tree)

        def survives(mutant: tuple[str, int, str]) -> bool:
            file, _, source = mutant
            tree = trees.get()
            target = Path(tree) / "north_lightning" / file
            try:
                target.write_text(source)
                return tests_pass(tree, CORE[file], 10 + 3 * limits[tuple(CORE[file])])
            finally:
                target.write_text(sources[file])
                trees.put(tree)

        with ThreadPoolExecutor(args.jobs) as threads:
            needed = sorted({tuple(CORE[file]) for file, _, _ in sample})
            limits = dict(zip(needed, threads.map(seconds_alone, map(list, needed)), strict=True))
            print(f"{len(needed)} sets of tests pass without a mutation, {time.monotonic() - began:.0f} s", flush=True)
            for mutant, alive in zip(sample, threads.map(survives, sample), strict=True):
                if alive:
                    survivors.append(mutant)
                    file, line, source = mutant
                    print(f"\nsurvivor: north_lightning/{file}:{line}   (tests: {' '.join(CORE[file])})")
                    diff = difflib.unified_diff(sources[file].splitlines(), source.splitlines(), n=0, lineterm="")
                    print("\n".join(list(diff)[3:]), flush=True)
    killed = len(sample) - len(survivors)
    print(
        f"\n{len(sample)} of {len(pool)} mutations, seed {args.seed}: {killed} killed, {len(survivors)} survive; ",
        end="",
    )
    print(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
