"""Synthetic SciCode steps: what a test expects, the test, and an answer to it; with every kind of target."""

import random
from typing import Any

CMP = "from scicode.compare.cmp import cmp_tuple_or_list, are_dicts_close\n"
CLOSE, EQUAL = "assert np.allclose(f(), target)", "assert f() == target"
TUPLES, DICTS = f"{CMP}assert cmp_tuple_or_list(f(), target)", f"{CMP}assert are_dicts_close(f(), target)"
DEPENDENCIES = "import numpy as np\nimport scipy.sparse\nimport sympy as sp\nfrom math import pi"

TARGETS = (  # the expression that was saved; a tuple of several is saved as var1, var2, ...
    *("3", "3.0", "0.1", "1e-9", "-2.5e8", "float('nan')", "float('inf')", "1 + 2j", "complex('nan')", "True", "False"),
    *("'text'", "''", "'3.0'", "np.int64(3)", "np.bool_(True)"),
    *("np.array([1.0, 2.0])", "np.zeros((2, 2))", "np.array([[1, 2], [3, 4]])", "np.array([np.nan, 1.0])"),
    *(
        "np.array([1 + 1j, 2])",
        "np.array([])",
        "np.array(5.0)",
        "[1, 2, 3]",
        "[1.5, [2.5]]",
        "[[1], [2, 3]]",
        "['a', 'b']",
    ),
    *(
        "scipy.sparse.csr_matrix(np.eye(3))",
        "scipy.sparse.csc_matrix(np.eye(3))",
        "scipy.sparse.coo_matrix(np.eye(2) * 2)",
    ),
    *("scipy.sparse.bsr_matrix(np.eye(2))", "scipy.sparse.csr_matrix((2, 2))"),
    *(
        "{'a': 1.0, 'b': np.array([1.0, 2.0])}",
        "{np.float64(1.5): 2.0, np.float64(2.5): 3.0}",
        "{'a': 'text'}",
        "{'m': scipy.sparse.csr_matrix(np.eye(2))}",
    ),
    *("{'1': 'one', 'b': 2}", "{'x': [1, 2]}", "{}"),
    *("(1.0, 2.0)", "(np.array([1.0, 2.0]), 3)", "('text', 1.0)", "(True, 2.0)", "({'a': 1.0}, 2.0)", "(np.nan, 1.0)"),
    *(
        "(scipy.sparse.csr_matrix(np.eye(2)), 1.0)",
        "(scipy.sparse.coo_matrix(np.eye(2)), 1.0)",
        "([1, 2], 'x')",
        "(1, 2, 3)",
    ),
    *("(False, np.array([[1.0]]))", "('a', 'b')", "(1 + 1j, 2.0)", "tuple(float(i) for i in range(12))"),
    *("sp.Symbol('x')", "{sp.Symbol('x'): 1.0}", "{'x': sp.Symbol('y')}"),
)
WAYS = (  # how an answer differs from what was saved
    "{0}", "{0}", "{0}", "{0} + 1", "{0} * (1 + 1e-7)", "{0} * (1 + 1e-4)", "[{0}]", "({0},)", "np.array({0})", "list({0})",
    "tuple({0})", "dict({0})", "{0}.toarray()", "scipy.sparse.csc_matrix({0})", "scipy.sparse.coo_matrix({0})", "str({0})",
    "float({0})", "complex({0})", "bool({0})", "np.nan", "None", "{0}[::-1]", "{0}[:1]", "not {0}", "np.bool_({0})", "target",
    "{{k: v for k, v in reversed({0}.items())}}", "{{**{0}, 'more': 1}}", "{{sp.Symbol(str(k)): v for k, v in {0}.items()}}",
    "{{str(k): v for k, v in {0}.items()}}", "{{k: sp.Symbol(str(v)) for k, v in {0}.items()}}", "1 / 0", "f()",
    "np.asarray({0}).tolist()", "np.asarray({0}, dtype=float)", "np.matrix({0})", "-{0}", "{0} + 1e-10", "({0}, {0})",
)  # fmt: skip
TESTS = (
    CLOSE,
    EQUAL,
    TUPLES,
    DICTS,
    "assert np.isclose(f(), target).all()",
    "assert f() == target and isinstance(f(), str)",
)

CODES = (  # whole answers to a step that expects 3.0
    "def f():\n    return 3.0",
    "def f():\n    return 3.0\nif __name__ == '__main__':\n    f()",
    "def f():\n    return 3.0\nif __name__ == '__main__':\n    raise ValueError",
    "f = lambda: np.float32(3)",
    "class A:\n    def __call__(self):\n        return pi - pi + 3\nf = A()",
    "def f(:\n    return 3.0",
    "def g():\n    return 3.0",
    "raise ValueError",
    "import sys\nsys.exit(1)",
    "import os\nos._exit(3)",
    "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "def f():\n    return f()",
    "",
    "'''",
    "def f():\n    print('x' * 100000)\n    return 3.0",
    "import threading\nthreading.Thread(target=print).start()\ndef f():\n    return 3.0",
    "import subprocess\nsubprocess.run(['true'], check=True)\ndef f():\n    return 3.0",
    "def f():\n    with open('made', 'w') as file:\n        file.write('3.0')\n    return float(open('made').read())",
    "def f():\n    return np.random.rand() * 0 + 3",
    "def f(x=[]):\n    x.append(1)\n    return 3.0 if len(x) == 1 else 4.0",
    "import sys\nsys.exit('words')",
    "raise KeyboardInterrupt",
    "import atexit\natexit.register(print, 'x')\ndef f():\n    return 3.0",
    "import os, atexit\natexit.register(os._exit, 5)\ndef f():\n    return 3.0 + 1",
    "from scicode.compare.cmp import cmp_tuple_or_list\ndef f():\n    return 3.0 if cmp_tuple_or_list([1], [1]) else 0",
    "targets, target = [0.0], 0.0\ndef f():\n    return 3.0",
    "def f():\n    return 3.0\nif False:\n    '''",
    "def f():\n    return 3.0\nx = (",
    "def f():\n    return 3.0\nx = 3 \\",
    "def f():\n    return 3.0\n@f",
    "import sys\nsys.excepthook = lambda *_: None\nraise ValueError",
    "import sys\nsys.modules['scicode.compare.cmp'] = sys\ndef f():\n    return 0.0",
    "def f():\n    np.allclose = lambda *_: True\n    return 0",
)
STRICT_CODES = (  # which the official runner takes for right
    "import sys\nsys.exit(0)",
    "raise SystemExit",
    "exit()",
    "import os\nos._exit(0)",
    "import atexit, os\natexit.register(os._exit, 0)\nraise ValueError",
    "np.allclose = lambda *_, **__: True\ndef f():\n    return 0",
    "class np:\n    allclose = lambda *_: True\ndef f():\n    return 0",
    "import scicode.parse.parse as p\np.process_hdf5_to_tuple = lambda *_: [0.0]\ndef f():\n    return 0.0",
    "import sys, types\np = sys.modules['scicode.parse.parse'] = types.ModuleType('p')\n"
    "p.process_hdf5_to_tuple = lambda *_: [0.0]\ndef f():\n    return 0.0",
)


def steps(count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` steps: ``saved`` (expressions, one a variable), ``test`` and ``code``; ``STRICT_CODES`` and ``CODES``
    come first."""
    rng = random.Random(seed)
    found = [{"saved": ["3.0"], "test": CLOSE, "code": code} for code in (*STRICT_CODES, *CODES)]
    while len(found) < count:
        target = rng.choice(TARGETS)
        way = rng.choice(WAYS)
        test = rng.choice(TESTS)
        if rng.random() < 0.7:  # a test that fits the target
            fits = DICTS if target.startswith("{") else TUPLES if target.startswith(("(", "tuple")) else CLOSE
            test = EQUAL if target.startswith("'") else fits
        many = target.startswith(("(", "tuple"))
        saved = (
            [f"{target}[{i}]" for i in range(12 if target.startswith("tuple") else _length(target))]
            if many
            else [target]
        )
        found.append({"saved": saved, "test": test, "code": f"def f():\n    return {way.format(f'({target})')}"})
    return found


def _length(target: str) -> int:
    depth, commas = 0, 1
    for character in target[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        commas += character == "," and depth == 0
    return commas


def problem(found: list[dict[str, Any]], name: str = "90") -> dict[str, Any]:
    """A row of SciCode with these steps."""
    return {
        "problem_name": "Synthetic",
        "problem_id": name,
        "problem_description_main": "Give numbers.",
        "problem_background_main": "",
        "problem_io": "",
        "required_dependencies": DEPENDENCIES,
        "sub_steps": [
            {
                "step_number": f"{name}.{number}",
                "step_description_prompt": f"Step {number}.",
                "step_background": f"Background of step {number}.",
                "function_header": "def f():\n    '''Give it.'''",
                "test_cases": [step["test"]] * step.get("repeat", 1),
                "return_line": "    return value",
            }
            for number, step in enumerate(found, 1)
        ],
        "general_tests": [],
    }
