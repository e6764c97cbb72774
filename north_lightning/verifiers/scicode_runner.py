"""Runs the tests of one SciCode problem against untrusted code, one process a step. It runs *inside* a sandbox.

In: ``/tests/problem.json``, the answers in ``/work``, ``/logs/verifier/targets.h5``, and what ``apart`` reads, with a
step for every id. Out: what ``apart`` writes; a step has passed if all of its tests have.

A step is what the official script is: the dependencies, the code of the steps before it, its own, its tests, as one
``__main__``, ended after ``TIMEOUT_S``. The targets and the comparisons mean what the official ones mean. Started with
the word ``official``, a step has passed if its process ends with exit code 0, which is all that the official runner
asks for. Without it, grading is strict: the tests must have run to their end, with the modules and comparisons that
were there before the code.

Beside the standard library it imports numpy, scipy, sympy and h5py, of ``PACKAGES`` if the sandbox has none.
"""

import json
import os
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

sys.path += ["/grader", "/grader/packages"]

import h5py
import numpy as np
import scipy.sparse
import sympy
from apart import Channel, Judge  # type: ignore[import-not-found]

TIMEOUT_S = 1800
TESTS, TARGETS, WORK = "/tests/problem.json", "/logs/verifier/targets.h5", "/work"

# ---- targets -------------------------------------------------------------------------------------------------------


def read_targets(file: Any, step: str, num_tests: int) -> list[Any]:
    """What each test of a step expects; a test of several values expects a tuple, in the order of their names."""
    targets = []
    for number in range(1, num_tests + 1):
        values = [_value(one) for one in file[f"{step}/test{number}"].values()]
        targets.append(values[0] if len(values) == 1 else tuple(values))
    return targets


def _value(node: Any) -> Any:
    if isinstance(node, h5py.Dataset):
        return _plain(node)
    kind = next(iter(node), None)
    if kind == "list":
        return [one[()] for one in node["list"].values()]
    if kind == "sparse_matrix":
        return _sparse(node["sparse_matrix"])
    return {_key(key, one): _sparse(one["sparse_matrix"]) if isinstance(one, h5py.Group) else _plain(one)
            for key, one in node.items()} if kind is not None else None  # fmt: skip


def _plain(dataset: Any) -> Any:
    value = dataset[()]
    return value.decode() if isinstance(value, bytes) else value


def _key(key: str, node: Any) -> str | float:
    """A number where the value is one."""
    try:
        return key if isinstance(node, h5py.Group) or isinstance(node[()], bytes) else float(key)
    except ValueError:
        return key


def _sparse(group: Any) -> Any:
    data, shape = group["data"][()], tuple(group["shape"][()])
    if "row" in group and "col" in group:
        return scipy.sparse.coo_matrix((data, (group["row"][()], group["col"][()])), shape=shape)
    parts = (data, group["indices"][()], group["indptr"][()])
    if "blocksize" in group:
        return scipy.sparse.bsr_matrix(parts, shape=shape, blocksize=tuple(group["blocksize"][()]))
    return scipy.sparse.csr_matrix(parts, shape=shape)


# ---- comparisons: what the tests import as scicode.compare.cmp ------------------------------------------------------

MATRICES = (scipy.sparse.csr_matrix, scipy.sparse.csc_matrix, scipy.sparse.bsr_matrix, scipy.sparse.coo_matrix)


def are_dicts_close(dict1: Any, dict2: Any, atol: float = 1e-8, rtol: float = 1e-5) -> bool:
    dict1, dict2 = process_symbol_in_dict(dict1), process_symbol_in_dict(dict2)
    if dict1.keys() != dict2.keys():
        return False
    for key, value in dict1.items():
        other = dict2[key]
        if isinstance(value, sympy.Symbol | str):
            same = value == other
        elif isinstance(value, MATRICES):
            same = np.allclose(value.toarray(), other.toarray(), atol=atol, rtol=rtol)
        else:
            same = _are_close(value, other, atol, rtol)
        if not same:
            return False
    return True


def process_symbol_in_dict(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Symbols as texts, but for values under a key that is one."""
    named = {key: str(value) if isinstance(value, sympy.Symbol) else value for key, value in values.items()}
    for key, value in values.items():
        if isinstance(key, sympy.Symbol):
            named[str(key)] = value
            named.pop(key)
    return named


def are_csc_matrix_close(matrix1: Any, matrix2: Any) -> bool:
    return bool(np.allclose(matrix1.toarray(), matrix2.toarray()))


def cmp_tuple_or_list(var1: Any, var2: Any) -> bool:
    if len(var1) != len(var2):
        return False
    for first, second in zip(var1, var2, strict=True):
        if isinstance(first, dict):
            same = are_dicts_close(first, second)
        elif isinstance(first, scipy.sparse.csr_matrix | scipy.sparse.csc_matrix):
            same = are_csc_matrix_close(first, second)
        elif isinstance(first, bool):
            same = first == second
        else:
            same = _are_close(first, second, 1e-8, 1e-5)
        if not same:
            return False
    return True


def _are_close(first: Any, second: Any, atol: float, rtol: float) -> Any:
    try:
        return np.allclose(first, second, atol=atol, rtol=rtol)
    except ValueError:  # of different shapes
        return first == second


COMPARISONS = {one.__name__: one for one in
               (are_dicts_close, process_symbol_in_dict, are_csc_matrix_close, cmp_tuple_or_list)}  # fmt: skip


# ---- steps ---------------------------------------------------------------------------------------------------------


def run_step(
    is_official: bool, step: str, dependencies: str, codes: Sequence[str], tests: Sequence[str], targets: Sequence[Any]
) -> None:
    """Run the code of all steps up to one, and that one's tests; whatever is wrong is an exception."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    names, untouched = vars(main), dict[str, Any]()
    exec(dependencies, untouched)
    kept = {name: value for name, value in untouched.items() if isinstance(value, types.ModuleType)}
    judges = [(np, "allclose", np.allclose), (np, "isclose", np.isclose)]
    provide(targets)
    exec(compile("\n".join((dependencies, *codes, "\n")), f"{WORK}/step.py", "exec"), names)
    if not is_official:
        provide(targets)
        if any(names.get(name) is not value for name, value in kept.items()):
            raise AssertionError("the code replaced a module that the tests use")
    asked = "from scicode.parse.parse import process_hdf5_to_tuple\n"
    asked += f"targets = process_hdf5_to_tuple({step!r}, {len(tests)})\n"
    asked += "".join(f"target = targets[{number}]\n\n{test}\n" for number, test in enumerate(tests))
    exec(compile(asked, TESTS, "exec"), names)
    if not is_official and any(getattr(module, name) is not value for module, name, value in judges):
        raise AssertionError("the code replaced what the tests compare with")


def provide(targets: Sequence[Any]) -> None:
    """The modules of the package ``scicode`` that tests import."""
    parse, compare = "scicode.parse.parse", "scicode.compare.cmp"
    for name in ("scicode", "scicode.parse", "scicode.compare", parse, compare):
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[parse])["process_hdf5_to_tuple"] = lambda step, num_tests: targets
    vars(sys.modules[compare]).update(COMPARISONS)


def try_step(channel: Channel, step: str, *work: Any) -> None:
    try:
        run_step(False, step, *work)
        channel.passed(step)
    except BaseException as error:
        channel.note(step, "failed", repr(error))


def run_apart(judge: Judge, is_official: bool, step: str, *work: Any) -> None:
    """``run_step`` in a process of its own."""
    if is_official:  # an exception, or the code's own exit, ends this process as it ends a script
        judge.run([step], {}, lambda _: run_step(True, step, *work), TIMEOUT_S, by_exit_code=True)
    else:
        judge.run([step], {}, lambda channel: try_step(channel, step, *work), TIMEOUT_S)


def main() -> None:
    with open(TESTS) as file:
        problem = json.load(file)
    steps = problem["steps"]
    with h5py.File(TARGETS) as opened:
        targets = {step["number"]: read_targets(opened, step["number"], len(step["tests"])) for step in steps}
    os.unlink(TARGETS)
    judge, is_official = Judge(), sys.argv[1:] == ["official"]
    codes: list[str] = []
    for step in steps:
        number = step["number"]
        if "code" in step:
            codes.append(step["code"])
            continue
        try:
            with open(f"{WORK}/{number}.py", errors="replace") as answer:
                codes.append(answer.read())
        except OSError:
            codes.append("")
            continue  # not answered
        run_apart(judge, is_official, number, problem["dependencies"], codes, step["tests"], targets[number])
    judge.end()


if __name__ == "__main__":
    main()
