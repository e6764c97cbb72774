"""Runs named unittest tests against untrusted code and says which passed. It runs *inside* a sandbox.

In: what ``apart`` reads, with a test id (``module.Class.method``) for every expected test; the test modules under
``/tests``; the code under test in ``/work``. Out: what ``apart`` writes.

Started as ``python3 -I -S -E -B``: no site-packages, no ``sitecustomize``, no ``.pth``, no environment. ``/work`` comes
last on ``sys.path``, so that nothing in it shadows the standard library or the tests. Every file of tests runs in a
process of its own, among canaries. Only the standard library is imported here.
"""

from __future__ import annotations

import builtins
import os
import sys
import types

GRADER = "/grader"
sys.path.insert(0, GRADER)

import traceback  # noqa: E402
import unittest  # noqa: E402
from collections.abc import Callable, Mapping, Sequence  # noqa: E402
from importlib import machinery  # noqa: E402

import apart  # type: ignore[import-not-found]  # noqa: E402
import seal as sealing  # type: ignore[import-not-found]  # noqa: E402
import strict  # type: ignore[import-not-found]  # noqa: E402
from canaries import Canaries  # type: ignore[import-not-found]  # noqa: E402
from seal import TESTS, TestFiles  # noqa: E402

TYPE_CHECKING = False  # typing takes longer to load than all of this
if TYPE_CHECKING:
    from typing import Any

globals()["__builtins__"] = dict(vars(__import__("builtins")))  # of the functions below, whatever becomes of the module

sys.path.remove(GRADER)
for _name in ("apart", "strict", "canaries", "seal"):
    del sys.modules[_name]  # the code under test must not find them by name, nor miss a module of its own

WORK = "/work"
loaded: dict[str, types.ModuleType] = {}
"""Files of the tests -> modules."""
loaders: set[type] = set()
"""Load from where the tests are."""


class Watch:
    """The seal, and with the tests loaded their constants."""

    def __init__(self, files: TestFiles) -> None:
        self._files = files
        self._seal: sealing.Seal = files.seal()
        self._constants: list[sealing.Constant] = []
        for module in (apart, strict, sealing):
            self._seal.add_module(module, skipped=())

    def add_class(self, cls: type) -> None:
        self._seal.add_class(cls, closed=True)

    def add_helper(self, module: types.ModuleType) -> None:
        self._seal.add(vars(module), self._files.rebound)

    def tests_are_loaded(self) -> None:
        if len(sys._current_frames()) > 1:
            raise apart.Tampered("a thread was started while the tests were loaded")
        self.check()
        self._constants = self._files.seal_loaded(self._seal, loaded, loaders)
        self.check()

    def check(self) -> None:
        self._seal.check()
        sealing.check_constants(self._constants)


class TestLoader(machinery.SourceFileLoader):
    """Loads what lies beside the tests: with strict comparisons, never from a cache."""

    def get_code(self, name: str) -> types.CodeType:
        path = self.get_filename(name)
        return strict.compiled(self.get_data(path), path)

    def exec_module(self, module: types.ModuleType) -> None:
        loaded[str(module.__file__)] = module
        super().exec_module(module)
        self.watch(module)  # before anybody else has it

    @staticmethod
    def watch(module: types.ModuleType) -> None: ...


def find_beside_tests(watch: Watch) -> None:
    finder = machinery.FileFinder.path_hook((TestLoader, [".py"]))
    loaders.add(TestLoader)
    TestLoader.watch = watch.add_helper  # type: ignore[method-assign]

    def hook(path: str) -> Any:
        if path != TESTS and not path.startswith(f"{TESTS}/"):
            raise ImportError(path)
        return finder(path)

    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()


class Results(unittest.TestResult):
    """Says of an expected test that it passed, with the seal unbroken."""

    def __init__(self, channel: apart.Channel, watch: Watch, canary_module: str) -> None:
        super().__init__()
        self._canary_module = canary_module
        self._channel = channel
        self._watch = watch
        self._passed: set[str] = set()

    def note(self, test: Any, outcome: str, what: Any) -> None:
        if isinstance(what, tuple):
            what = "" if self._is_canary(test) else "".join(traceback.format_exception(*what))
        self._channel.note(test if isinstance(test, str) else self._name(test), outcome, what)

    def _is_canary(self, test: Any) -> bool:
        return type(test).__module__ == self._canary_module

    def _name(self, test: unittest.TestCase) -> str:
        return test._testMethodName if self._is_canary(test) else test.id()

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._passed.add(self._name(test))

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        self.note(test, "error", err)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self.note(test, "failed", err)

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.note(test, "skipped", reason)

    def addExpectedFailure(self, test: unittest.TestCase, err: Any) -> None:
        self.note(test, "expected-failure", "")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self.note(test, "unexpected-success", "")

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: Any) -> None:
        if err is not None:
            self.note(test, "failed", err)

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        self._watch.check()
        if any(callable(getattr(unittest.TestCase, name, None)) for name in vars(test)):
            raise apart.Tampered(f"a method of {test.id()} was replaced on the instance")
        for function in vars(test)["_type_equality_funcs"].values():
            if not isinstance(function, str) and not strict.is_of_tests(function):
                raise apart.Tampered(f"{test.id()} was given another way to compare")
        if self._name(test) in self._passed:
            self._channel.passed(self._name(test))


def module_of(test_id: str) -> tuple[str, str]:
    """The longest dotted prefix of a test id that is a file under TESTS: (name, path)."""
    parts = test_id.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = os.path.join(TESTS, *parts[:length]) + ".py"
        if os.path.isfile(path):
            return ".".join(parts[:length]), path
    raise LookupError(f"no file under {TESTS} holds {test_id}")


def load_module(name: str, path: str, source: bytes | None = None) -> types.ModuleType:
    """Execute a test module from its source; it never comes from a cache or from WORK."""
    if source is None:
        with open(path, "rb") as file:
            source = file.read()
    code = strict.compiled(source, path)
    module = types.ModuleType(name)
    module.__file__ = path
    module.__package__ = name.rpartition(".")[0]  # for imports relative to the tests
    vars(module)["__builtins__"] = builtins
    sys.modules[name] = loaded[path] = module
    exec(code, module.__dict__)
    return module


class Canary:
    """Runs a test as a suite would, between two tests of one class, whose fixtures it leaves alone."""

    def __init__(self, test: unittest.TestCase) -> None:
        self._test = test

    def __iter__(self) -> Any:
        return iter(())

    def countTestCases(self) -> int:
        return 1

    def __call__(self, result: unittest.TestResult, debug: bool = False) -> None:
        self._test(result)


def canary_tests(canaries: Canaries, path: str) -> list[Any]:
    module = load_module(os.path.basename(path)[:-3], path, canaries.source.encode())
    tests = []
    for cls in vars(module).values():
        if isinstance(cls, type) and cls.__module__ == module.__name__:
            tests += [Canary(cls(name)) for name in vars(cls) if name.startswith("test")]
    return tests


def interleaved(tests: Sequence[Any], canaries: Sequence[Any]) -> list[Any]:
    """``tests`` in their order with ``canaries`` at random places among them, before the first and after the last."""
    places = sorted([0, len(tests), *(int.from_bytes(os.urandom(4), "big") % (len(tests) + 1) for _ in canaries[2:])])
    mixed: list[Any] = []
    for place in range(len(tests) + 1):
        mixed += [canary for canary, its in zip(canaries, places, strict=False) if its == place]
        mixed += tests[place : place + 1]
    return mixed


def load_tests(test_ids: Sequence[str], results: Results) -> list[unittest.TestCase]:
    """Every expected test that can be loaded; the others are noted."""
    tests = []
    for test_id in test_ids:
        try:
            name, path = module_of(test_id)
            module = sys.modules[name] if path in loaded else load_module(name, path)
            class_name, method = test_id[len(name) + 1 :].split(".")
            cls = getattr(module, class_name)
            if not issubclass(cls, unittest.TestCase):
                raise TypeError(f"{class_name} is not a unittest.TestCase")
            tests.append(cls(method))
        except BaseException as error:  # whatever the code under test raises, SystemExit too, is this test's failure
            results.note(test_id, "not-loaded", repr(error))
    return tests


def by_file(test_ids: Sequence[str], file_of: Callable[[str], str]) -> Mapping[str, list[str]]:
    files: dict[str, list[str]] = {}
    for test_id in test_ids:
        files.setdefault(file_of(test_id), []).append(test_id)
    return files


def some_path(directory: str) -> str:
    """Where a file of canaries might lie."""
    return f"{directory}/test_{os.urandom(3).hex()}.py"


def run_file(path: str, tests: Sequence[str], judge: apart.Judge) -> None:
    files = TestFiles([path])
    files.import_standard_library()
    canaries = Canaries(files.words, "unittest")
    canary_path = some_path(os.path.dirname(path))
    judge.run(tests, canaries.ends, lambda channel: run_tests(files, tests, canaries, canary_path, channel))


def run_tests(
    files: TestFiles, tests: Sequence[str], canaries: Canaries, canary_path: str, channel: apart.Channel
) -> None:
    sys.path += [TESTS, WORK]
    strict.trust_standard_library()
    strict.seal_assertions()
    watch = Watch(files)
    for cls in (unittest.TestCase, unittest.TestResult, unittest.TestSuite, apart.Channel, Results, Watch, Canary):
        watch.add_class(cls)
    find_beside_tests(watch)
    results = Results(channel, watch, os.path.basename(canary_path)[:-3])
    real = load_tests(tests, results)
    known = canary_tests(canaries, canary_path)
    watch.tests_are_loaded()
    unittest.TestSuite(interleaved(real, known)).run(results)
    watch.check()


def main() -> None:
    del sys.modules[__name__]
    judge = apart.Judge()
    for path, tests in by_file(judge.expected, lambda test: module_of(test)[1]).items():
        run_file(path, tests, judge)
    judge.end()
