"""Runs named pytest tests against untrusted code, as ``unittest_runner`` runs unittest's. It runs *inside* a sandbox.

In: the same files as there, with node ids (``tests/test_a.py::test_b[1]``, relative to ``/tests``) in place of dotted
ones, or a file's name: what is in it is run and noted, but nothing is handed back for it. Out: the same.

pytest and what it needs come from ``/grader/packages``, ahead of everything of the task and the attempt. No
configuration file, plug-in, entry point or variable is read; ``conftest.py`` counts where it lies beside the tests.
"""

import ast
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

GRADER = "/grader"
sys.path[:0] = [GRADER, f"{GRADER}/packages"]

import pytest  # noqa: E402
from _pytest.assertion import rewrite  # noqa: E402
from _pytest.runner import runtestprotocol  # noqa: E402

if TYPE_CHECKING:
    from north_lightning.verifiers import unittest_runner as base
else:
    import unittest_runner as base

globals()["__builtins__"] = dict(vars(__import__("builtins")))  # of the functions below, whatever becomes of the module

Canaries, apart, strict = base.Canaries, base.apart, base.strict
OPTIONS = (
    "-q", "--tb=short", "--rootdir", base.TESTS, "--confcutdir", base.TESTS, "-c", "/dev/null",
    "-p", "no:cacheprovider", "-p", "no:legacypath", "--continue-on-collection-errors",
)  # fmt: skip


class Plugin:
    """Selects the expected tests and the canaries, watches the seal, and says what passed."""

    def __init__(self, channel: Any, watch: Any, wanted: set[str], canary_path: str) -> None:
        self._channel = channel
        self._watch = watch
        self._wanted = wanted
        self._files = {one for one in wanted if "::" not in one}
        self._canary_path = canary_path
        self._passed: dict[str, bool] = {}
        self._names: dict[str, str] = {}  # node id of a canary -> its name

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        module = getattr(item, "module", None)
        if module is not None:
            path = str(item.path)
            if path == self._canary_path:
                self._names[item.nodeid] = item.originalname
            else:
                base.loaded[path] = module
                for name in classes_in(path):
                    strict.of_tests[id(vars(module).get(name))] = vars(module).get(name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._channel.note(report.nodeid or apart.END, "not-loaded", report.longreprtext)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        canaries = [item for item in items if item.nodeid in self._names]
        for item in canaries:  # no fixture of the tests is theirs
            wanted = {*item._fixtureinfo.argnames, "request"}
            item.fixturenames[:] = [name for name in item.fixturenames if name in wanted]
        items[:] = base.interleaved([item for item in items if self._is_wanted(item.nodeid)], canaries)

    def pytest_collection_finish(self) -> None:
        self._check(self._watch.tests_are_loaded)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if item.nodeid not in self._names:
            return None
        for report in runtestprotocol(item, log=False, nextitem=nextitem):  # and people see nothing of it
            self.pytest_runtest_logreport(report)
        self.pytest_runtest_logfinish(item.nodeid)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        whole = self._passed.get(report.nodeid, True) and report.outcome == "passed" and not hasattr(report, "wasxfail")
        self._passed[report.nodeid] = whole
        if report.outcome != "passed":
            self._channel.note(self._name(report.nodeid), report.outcome, report.longreprtext)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._check()
        if self._passed.get(nodeid):
            name = self._name(nodeid)
            if not self._channel.is_expected(name):
                self._channel.note(name, "passed", "")
            self._channel.passed(name)

    def _name(self, node_id: str) -> str:
        return self._names.get(node_id, node_id)

    def _is_wanted(self, node_id: str) -> bool:
        return node_id in self._wanted or node_id.split("::")[0] in self._files

    def _check(self, check: Any = None) -> None:
        try:
            (check or self._watch.check)()
        except apart.Tampered as error:  # at once: pytest would go on after an error of a plug-in
            self._channel.note(apart.END, "tampered", str(error))
            os._exit(1)


def classes_in(path: str) -> set[str]:
    """Names of the classes that a test file defines at its top."""
    try:
        with open(path, "rb") as file:
            return {node.name for node in ast.parse(file.read()).body if isinstance(node, ast.ClassDef)}
    except (OSError, SyntaxError):
        return set()


def make_asserts_strict() -> None:
    original = rewrite.rewrite_asserts

    def rewrite_asserts(tree: ast.Module, *arguments: Any, **more: Any) -> None:
        original(strict.make_strict(tree, shows_sides=True), *arguments, **more)

    rewrite.rewrite_asserts = rewrite_asserts


def run_file(path: str, tests: Sequence[str], judge: Any) -> None:
    conftests = [
        os.path.join(base.TESTS, *path.split("/")[:depth], "conftest.py") for depth in range(path.count("/") + 1)
    ]
    files = base.TestFiles([os.path.join(base.TESTS, path), *conftests])
    files.import_standard_library()
    canaries = Canaries(files.words, "pytest")
    judge.run(tests, canaries.ends, lambda channel: run_tests(files, path, tests, canaries, channel))


def run_tests(files: Any, path: str, tests: Sequence[str], canaries: Any, channel: Any) -> None:
    sys.path += [base.TESTS, base.WORK]
    base.loaders.add(rewrite.AssertionRewritingHook)
    make_asserts_strict()
    strict.trust_standard_library()
    strict.seal_assertions()
    place = tempfile.mkdtemp()
    canary_path = base.some_path(place)
    with open(canary_path, "w") as file:
        file.write(canaries.source)
    watch = base.Watch(files)
    for own in (apart.Channel, Plugin, base.Watch):
        watch.add_class(own)
    base.find_beside_tests(watch)
    plugin = Plugin(channel, watch, set(tests), canary_path)
    pytest.main([*OPTIONS, os.path.join(base.TESTS, path), canary_path], plugins=[plugin])
    watch.check()
    shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    for name in (GRADER, f"{GRADER}/packages"):
        if name in sys.path:
            sys.path.remove(name)
    sys.path[:0] = [f"{GRADER}/packages"]
    del sys.modules[__name__], sys.modules["unittest_runner"]
    for name in [name for name in os.environ if name.startswith("PYTEST")]:
        del os.environ[name]
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    judge = apart.Judge()
    for path, tests in base.by_file(judge.expected, lambda test: test.split("::")[0]).items():
        run_file(path, tests, judge)
    judge.end()
