"""Targets as SciCode's own code saves them, and its own verdicts on steps: ``python official_scicode.py PATHS FOLDER``.

PATHS are folders to import from, separated by ``:``: the unpacked wheel nvidia-scicode, and numpy, scipy, sympy and
h5py. In, in FOLDER: ``steps.json`` of ``scicode_rows``. Out: ``test_data.h5`` and ``verdicts.json``. Runs the answers
of the rows without a sandbox.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = sys.argv[1].split(":")

import h5py
import numpy as np
import scipy.sparse
import sympy as sp

if not hasattr(np, "float_"):
    np.float_ = np.float64
from scicode.parse import parse  # type: ignore[import-not-found]
from scicode_rows import CODES, STRICT_CODES  # type: ignore[import-not-found]


def save(step: dict[str, Any], number: int, file: Any) -> None:
    group = file.create_group(f"90.{number}/test1")
    for index, expression in enumerate(step["saved"], 1):
        parse.save_data_to_hdf5(f"var{index}", eval(expression, {"np": np, "scipy": scipy, "sp": sp}), group)


RUN = (
    "import runpy, sys; sys.path[:0] = sys.argv[1].split(':'); import numpy as np; from scicode.parse import parse; "
    "np.float_ = np.float64; parse.process_hdf5_to_tuple.__defaults__ = (sys.argv[2],); "
    "runpy.run_path('step.py', run_name='__main__')"
)


def passes(step: dict[str, Any], number: int, dependencies: str) -> bool:
    """The official script: answers that may end their process in a new one, others in a forked one."""
    script = (
        f"{dependencies}\n\n{step['code']}\n\nfrom scicode.parse.parse import process_hdf5_to_tuple\n\n"
        f"targets = process_hdf5_to_tuple('90.{number}', 1)\ntarget = targets[0]\n\n{step['test']}\n"
    )
    if step["code"] in (*STRICT_CODES, *CODES):
        Path("step.py").write_text(script)
        return subprocess.run([sys.executable, "-c", RUN, sys.argv[1], os.path.abspath("test_data.h5")]).returncode == 0
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        try:
            exec(compile(script, "step.py", "exec"), {"__name__": "__main__"})
        except SystemExit as end:
            os._exit(int(bool(end.code)))
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    folder = Path(sys.argv[2])
    given = json.loads((folder / "steps.json").read_text())
    os.chdir(folder)
    with h5py.File("test_data.h5", "w") as file:
        for number, step in enumerate(given["steps"], 1):
            save(step, number, file)
    parse.process_hdf5_to_tuple.__defaults__ = (str(folder / "test_data.h5"),)
    verdicts = [passes(step, number, given["dependencies"]) for number, step in enumerate(given["steps"], 1)]
    (folder / "verdicts.json").write_text(json.dumps(verdicts))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
