"""Verdicts of LiveCodeBench's own runner, as the package nvidia-livecodebench carries it: stdin rows, stdout verdicts.

Started as ``python official_live_code_bench.py FOLDER`` with the unpacked wheel in FOLDER. Runs code of the rows, in
forked processes without a sandbox: for the rows of ``answer_rows`` only.
"""

import json
import multiprocessing
import os
import sys
import types
from pathlib import Path

import numpy as np


def load(folder: Path) -> types.ModuleType:
    """``compute_code_generation_metrics``, without what its packages import."""
    for name in ("livecodebench", "livecodebench.evaluation"):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
    import livecodebench.evaluation.compute_code_generation_metrics as official  # type: ignore[import-not-found]

    return official  # type: ignore[no-any-return]


def main() -> None:
    multiprocessing.set_start_method("fork")
    official = load(Path(sys.argv[1]))
    lines, verdicts = sys.stdin.readlines(), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)  # the rows' code does not read the rows and says no verdict
    for number in (0, 1):
        os.dup2(nothing, number)
    for line in lines:
        row = json.loads(line)
        tests = {key: row["tests"][key] for key in ("inputs", "outputs", "fn_name")}
        sample = {"input_output": json.dumps(tests)}
        [results], _ = official.evaluate_generations_by_problem(([row["code"]], sample, False, 6))
        try:
            passed = bool(np.all(np.array(results) > 0))
        except ValueError:  # an empty array among the results: the official metrics raise
            passed = False
        print(json.dumps(passed), file=verdicts, flush=True)


if __name__ == "__main__":
    main()
