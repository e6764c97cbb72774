"""Runs named pytest tests against untrusted code, as ``unittest_runner`` runs unittest's. It runs *inside* a sandbox.

In: the same files as there, with node ids (``tests/test_a.py::test_b[1]``, relative to ``/tests``) in place of dotted
ones, or a file's name: what is in it is run and noted, but nothing is handed back for it. Out: the same.

pytest and what it needs come from ``/grader/packages``, ahead of everything of the task and the attempt. No
configuration file, plug-in, entry point or variable is read; ``conftest.py`` counts where it lies beside the tests. A
comparison in an ``assert`` (outside comprehensions) is as strict as unittest's assertions are there: a class that only
one side holds does not decide it, unless the tests themselves define it.
"""

import ast
import os
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

GRADER = "/grader"
sys.path[:0] = [GRADER, f"{GRADER}/packages"]

import pytest  # noqa: E402
from _pytest.assertion import rewrite  # noqa: E402

if TYPE_CHECKING:
    from north_lightning.verifiers import unittest_runner as base
else:
    import unittest_runner as base

COMPARED = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn)
CHECK = "@check"  # no name that source text could hold
_approx_module = sys.modules[type(pytest.approx(0)).__module__]
APPROXIMATE = {id(cls) for cls in vars(_approx_module).values() if isinstance(cls, type)}
OPTIONS = (
    "-q", "--tb=short", "--rootdir", base.TESTS, "--confcutdir", base.TESTS, "-c", "/dev/null",
    "-p", "no:cacheprovider", "-p", "no:legacypath", "--continue-on-collection-errors",
)  # fmt: skip


class StrictComparisons(ast.NodeTransformer):
    """``a == b`` in an assert becomes ``(name := a) == check(name, b)``."""

    def __init__(self) -> None:
        self._num_names = 0
        self._is_asserted = False

    def visit_Assert(self, node: ast.Assert) -> ast.Assert:
        self._is_asserted = True
        node.test = self.visit(node.test)
        self._is_asserted = False
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.Compare:
        self.generic_visit(node)
        if self._is_asserted and len(node.ops) == 1 and isinstance(node.ops[0], COMPARED):
            name = f"@left{self._num_names}"
            self._num_names += 1
            left = ast.NamedExpr(ast.Name(name, ast.Store()), node.left)
            both = [ast.Name(name, ast.Load()), node.comparators[0]]
            node = ast.Compare(left, node.ops, [ast.Call(ast.Name(CHECK, ast.Load()), both, [])])
        return node

    def _leave(self, node: ast.AST) -> ast.AST:
        return node  # a name bound in here would be bound elsewhere too

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_Lambda = _leave


class Comparison:
    """Called as ``check(left, right)``; returns ``right``. ``own`` are ids of classes that the tests define."""

    def __init__(self) -> None:
        self.own: set[int] = set()

    def __call__(self, left: object, right: object) -> object:
        first, second = (
            base.foreign_classes(getattr(value, "expected", value) if id(type(value)) in APPROXIMATE else value)
            for value in (left, right)
        )
        odd = {key: cls for key, cls in {**first, **second}.items() if (key in first) != (key in second)}
        for key, cls in odd.items():
            if key not in self.own:
                raise AssertionError(
                    f"the comparison was left to {type.__repr__(cls)}, a class that only one side holds"
                )
        return right


class Plugin:
    """Selects the expected tests, watches the seal, and hands back what passed."""

    def __init__(self, channel: base.Channel, seal: base.Seal, wanted: set[str], comparison: Comparison) -> None:
        self._channel = channel
        self._seal = seal
        self._wanted = wanted
        self._files = {one for one in wanted if "::" not in one}
        self._comparison = comparison
        self._modules: set[int] = set()
        self._passed: dict[str, bool] = {}

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        module = getattr(item, "module", None)
        if module is not None and id(module) not in self._modules:
            self._modules.add(id(module))
            self._watch(module)

    def _watch(self, module: types.ModuleType) -> None:
        names = vars(module)
        self._seal.add(names, closed=False, kinds=(types.FunctionType, type))
        for name in classes_in(module.__file__ or ""):
            cls = names.get(name)
            if isinstance(cls, type):
                self._comparison.own.add(id(cls))
                self._seal.add(vars(cls), closed=False, kinds=(types.FunctionType, classmethod, staticmethod))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._channel.note(report.nodeid or base.END, "not-loaded", report.longreprtext)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self._is_wanted(item.nodeid)]

    def pytest_collection_finish(self) -> None:
        if len(sys._current_frames()) > 1:
            self._end(base.Tampered("a thread was started while the tests were loaded"))
        self._check()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._check()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._check()
        whole = self._passed.get(report.nodeid, True) and report.outcome == "passed" and not hasattr(report, "wasxfail")
        self._passed[report.nodeid] = whole
        if report.outcome != "passed":
            self._channel.note(report.nodeid, report.outcome, report.longreprtext)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._check()
        if self._passed.get(nodeid):
            if not self._channel.is_expected(nodeid):
                self._channel.note(nodeid, "passed", "")
            self._channel.passed(nodeid)

    def _is_wanted(self, node_id: str) -> bool:
        return node_id in self._wanted or node_id.split("::")[0] in self._files

    def _check(self) -> None:
        try:
            self._seal.check()
        except base.Tampered as error:
            self._end(error)

    def _end(self, error: Exception) -> None:
        """At once: pytest would go on after an error of a plug-in."""
        self._channel.note(base.END, "ended-early", repr(error))
        os._exit(1)


def classes_in(path: str) -> set[str]:
    """Names of the classes that a test file defines at its top."""
    try:
        return {node.name for node in ast.parse(Path(path).read_bytes()).body if isinstance(node, ast.ClassDef)}
    except (OSError, SyntaxError):
        return set()


def make_asserts_strict() -> Comparison:
    original, comparison = rewrite.rewrite_asserts, Comparison()

    def rewrite_asserts(tree: ast.Module, *arguments: Any, **more: Any) -> None:
        StrictComparisons().visit(tree)
        ast.fix_missing_locations(tree)
        original(tree, *arguments, **more)

    rewrite.rewrite_asserts = rewrite_asserts
    setattr(base.builtins, CHECK, comparison)
    return comparison


def seal_pytest(seal: base.Seal) -> None:
    """pytest's and pluggy's functions and classes as they are now."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("_pytest", "pytest", "pluggy") and module is not None:
            seal.add(vars(module), closed=False, kinds=(types.FunctionType, type))
            for cls in vars(module).values():
                if isinstance(cls, type) and cls.__module__ == name:
                    seal.add(vars(cls), closed=False, kinds=(types.FunctionType, classmethod, staticmethod, property))
    for own in (base.Channel, Plugin, Comparison):
        seal.add_class(own)


def main() -> None:
    secrets, descriptor = base.take_secrets()
    for name in (GRADER, f"{GRADER}/packages"):
        sys.path.remove(name)
    sys.path[:0] = [f"{GRADER}/packages"]
    sys.path += [base.TESTS, base.WORK]
    sys.modules.pop("unittest_runner")
    for name in [name for name in os.environ if name.startswith("PYTEST")]:
        del os.environ[name]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    comparison = make_asserts_strict()
    channel = base.Channel(secrets, descriptor)
    wanted = set(secrets) - {base.END}
    seal = base.sealed()
    seal_pytest(seal)
    files = sorted({os.path.join(base.TESTS, one.split("::")[0]) for one in wanted})
    try:
        pytest.main([*OPTIONS, *files], plugins=[Plugin(channel, seal, wanted, comparison)])
        seal.check()
        channel.passed(base.END)
    except BaseException as error:
        channel.note(base.END, "ended-early", repr(error))
        os._exit(1)
    # Nothing the code under test registered may run now.
    os._exit(0)


if __name__ == "__main__":
    main()
