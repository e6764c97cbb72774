"""The unit-test reward in real sandboxes: gold solutions, untouched states, cheats, broken infrastructure."""

import asyncio
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from north_lightning.errors import InfrastructureError, VerifierError
from north_lightning.sandbox import BubblewrapProvider
from north_lightning.tasks import load_task, write_task
from north_lightning.tasks.software import software_task
from north_lightning.tasks.terminal import terminal_task
from north_lightning.types import Reward, Rollout, Task
from north_lightning.verifiers import LoopPenalty, Part, RewardSum, UnitTestVerifier
from north_lightning.verifiers.unit_tests import read_reward
from tests.tasks import harbor_rewards

TASKS = Path(harbor_rewards.__file__).parent
BUGGY = "def add(a, b):\n    return a - b\n\n\ndef same(a):\n    return a\n"
FIXED = BUGGY.replace("a - b", "a + b")
# What a cheat could wish for: its code is imported first, called before its result is compared, and given time.
TESTS = """from calc import add, same

import json
import time
import unittest


class Test(unittest.TestCase):
    def test_add(self):
        result = add(7, 2)
        self.assertEqual(result, 9)

    def test_add_negative(self):
        result = add(7, -2)
        self.assertEqual(result, 5)

    def test_same(self):
        result = same(6)
        self.assertEqual(result, json.loads("6"))


time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def sandboxes() -> BubblewrapProvider:
    return BubblewrapProvider()


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def software(tmp_path: Path) -> Task:
    return make_software(tmp_path / "software")


@pytest.fixture
def terminal(tmp_path: Path) -> Task:
    return make_terminal(tmp_path / "terminal")


def make_software(directory: Path) -> Task:
    write(directory / "environment" / "files", {"calc.py": BUGGY, "test_calc.py": TESTS})
    write(directory / "tests", {"test_calc.py": TESTS, "test.sh": "exit 1\n"})
    metadata = {
        "fail_to_pass": ["test_calc.Test.test_add", "test_calc.Test.test_add_negative"],
        "pass_to_pass": ["test_calc.Test.test_same"],
    }
    return Task("software", "swe", "tiny", "add must add", directory, 8, metadata)


def make_terminal(directory: Path) -> Task:
    write(directory / "environment" / "files", {"note": "blue\n"})
    script = 'if [ "$(cat answer)" = blue ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt\n'
    write(directory / "tests", {"test.sh": script})
    return Task("terminal", "terminal", "tiny", "copy note to answer", directory, 4)


def attempt_at(task: Task, files: dict[str, str]) -> Path:
    """A snapshot: the task's files with these changes."""
    workdir = task.directory / "attempt"
    shutil.copytree(task.directory / "environment" / "files", workdir, symlinks=True)
    return write(workdir, files)


def cheat_at(task: Task, files: dict[str, str]) -> Path:
    """A snapshot with these changes in which everything may be executed."""
    workdir = attempt_at(task, files)
    for path in workdir.rglob("*"):
        path.chmod(0o755)
    return workdir


def score(task: Task, workdir: Path, sandboxes: BubblewrapProvider, timeout_s: float = 20.0, **settings) -> Reward:
    verifier = UnitTestVerifier(timeout_s=timeout_s, **settings)
    rollout = Rollout(task.id, task.environment, task.family, 0, 0, 0)
    return asyncio.run(verifier.verify(task, rollout, workdir, sandboxes))


# ---- what must be 1, and what must be 0 ----------------------------------------------------------------------------


def test_the_gold_software_solution_scores_1_and_names_every_test(software, sandboxes):
    reward = score(software, attempt_at(software, {"calc.py": FIXED}), sandboxes)
    assert reward.value == 1.0, reward.details
    assert reward.details["passed"] == [*software.metadata["fail_to_pass"], *software.metadata["pass_to_pass"]]
    assert reward.details["failed"] == []


def test_the_untouched_software_state_scores_0_and_says_which_tests_fail(software, sandboxes):
    reward = score(software, attempt_at(software, {}), sandboxes)
    assert reward.value == 0.0
    assert reward.details["failed"] == software.metadata["fail_to_pass"]
    assert reward.details["passed"] == software.metadata["pass_to_pass"]
    assert "AssertionError: 5 != 9" in "\n".join(reward.details["notes"])


def test_a_fix_that_breaks_a_passing_test_scores_0(software, sandboxes):
    broken = FIXED.replace("return a\n", "return -a\n")
    assert score(software, attempt_at(software, {"calc.py": broken}), sandboxes).value == 0.0


def test_an_expected_test_that_does_not_exist_is_a_failure(software, sandboxes):
    task = replace(software, metadata={**software.metadata, "pass_to_pass": ["test_calc.Test.test_gone"]})
    reward = score(task, attempt_at(task, {"calc.py": FIXED}), sandboxes)
    assert reward.value == 0.0
    assert reward.details["failed"] == ["test_calc.Test.test_gone"]


def test_a_gold_solution_with_new_files_deleted_files_and_links_scores_1(software, sandboxes):
    workdir = attempt_at(software, {"pkg/impl.py": "def plus(a, b):\n    return a + b\n", "pkg/__init__.py": ""})
    (workdir / "calc.py").unlink()
    write(workdir, {"real.py": "from pkg.impl import plus as add\n\n\ndef same(a):\n    return a\n"})
    (workdir / "calc.py").symlink_to("real.py")
    assert score(software, workdir, sandboxes).value == 1.0


def test_an_attempt_that_rewrites_a_data_file_of_the_tests_scores_0(software, sandboxes):
    module = TESTS.replace("import json\n", "import json\nimport pathlib\n")
    module = module.replace("(result, 9)", '(result, int(pathlib.Path("tests/sum").read_text()))')
    write(software.directory / "tests", {"test_calc.py": module})
    write(software.directory / "environment" / "files", {"test_calc.py": module, "tests/sum": "9\n"})
    task = replace(software, metadata={"fail_to_pass": ["test_calc.Test.test_add"], "pass_to_pass": []})
    assert score(task, attempt_at(task, {"calc.py": FIXED}), sandboxes).value == 1.0
    shutil.rmtree(task.directory / "attempt")
    assert score(task, attempt_at(task, {"tests/sum": "5\n"}), sandboxes).value == 0.0  # what the bug returns


def test_fixtures_subtests_and_helpers_of_real_test_modules_work(software, sandboxes):
    module = """import unittest
from unittest import mock

import calc
from helper import nine


class Base(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.ready = True

    def setUp(self):
        self.addCleanup(lambda: None)


class Test(Base):
    @mock.patch("calc.same", lambda a: 3)
    def test_add(self):
        self.assertTrue(self.ready)
        with self.subTest("nine"):
            self.assertEqual(calc.add(7, 2), nine())
        self.assertEqual([calc.same(1), {"a": {1, 2}}], [3, {"a": {2, 1}}])
        with self.assertRaises(TypeError):
            calc.add(1)


class TestAsync(unittest.IsolatedAsyncioTestCase):
    async def test_same(self):
        self.assertEqual(calc.same(float("inf")), float("inf"))
"""
    write(software.directory / "tests", {"test_more.py": module, "helper.py": "def nine():\n    return 9\n"})
    metadata = {"fail_to_pass": ["test_more.Test.test_add"], "pass_to_pass": ["test_more.TestAsync.test_same"]}
    task = replace(software, metadata=metadata)
    reward = score(task, attempt_at(task, {"calc.py": FIXED, "helper.py": "nine = None\n"}), sandboxes)
    assert reward.value == 1.0, reward.details


def test_threads_and_exit_hooks_that_the_tests_leave_behind_do_not_hold_up_a_pass(software, sandboxes):
    lingering = FIXED.replace("return a\n", "threading.Thread(target=time.sleep, args=[99]).start(); return a\n")
    source = "import atexit, threading, time\natexit.register(time.sleep, 99)\n" + lingering
    workdir = attempt_at(software, {"calc.py": source})
    assert score(software, workdir, sandboxes).value == 1.0


def test_the_gold_terminal_solution_scores_1_and_the_untouched_state_0(terminal, sandboxes):
    untouched = terminal.directory / "environment" / "files"
    assert score(terminal, untouched, sandboxes).value == 0.0
    assert score(terminal, attempt_at(terminal, {"answer": "blue\n"}), sandboxes).value == 1.0


def test_the_exit_code_of_test_sh_is_ignored_and_reward_json_beats_reward_txt(terminal, sandboxes):
    script = (
        'echo 1 > /logs/verifier/reward.txt; echo \'{"reward": 0.25, "style": 3}\' > /logs/verifier/reward.json; exit 9'
    )
    write(terminal.directory / "tests", {"test.sh": script})
    reward = score(terminal, attempt_at(terminal, {}), sandboxes)
    assert reward.value == 0.25
    assert reward.details["style"] == 3.0


# ---- cheats on software tasks --------------------------------------------------------------------------------------

FORGE = """
import os
for fd in range(3, 20):
    for line in ("OK\\n", "PASSED\\n", "test_calc.Test.test_add passed\\n", "test_calc.Test.test_add ok\\n"):
        try:
            os.write(fd, line.encode())
        except OSError:
            pass
"""
WRITE_RESULTS = """
import os
for name in ("expected", "results", "reward.txt", "reward.json"):
    path = "/logs/verifier/" + name
    if os.path.lexists(path):
        os.unlink(path)
    with open(path, "w") as file:
        file.write("1\\n")
"""
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            for name in ("results", "reward.txt", "reward.json"):
                with open("/logs/verifier/" + name, "w") as file:
                    file.write("1\\n")
    os._exit(0)
"""
SOFTWARE_CHEATS: dict[str, dict[str, str]] = {
    "exit 0 on import": {"calc.py": "import sys\nprint('OK')\nsys.exit(0)\n"},
    "hard exit 0 on import": {"calc.py": "import os\nos._exit(0)\n"},
    "exit 0 in the function": {"calc.py": BUGGY.replace("return a - b", "import sys; sys.exit(0)")},
    "hard exit 0 in the function": {"calc.py": BUGGY.replace("return a - b", "import os; os._exit(0)")},
    "kill the runner": {"calc.py": "import os\nos.kill(os.getpid(), 9)\n"},
    "printed success": {"calc.py": "print('test_add ... ok\\nRan 3 tests\\n\\nOK\\nPASSED')\n" + BUGGY},
    "skip on import": {"calc.py": "import unittest\nraise unittest.SkipTest('not today')\n"},
    "skip in the function": {
        "calc.py": BUGGY.replace("return a - b", "import unittest; raise unittest.SkipTest('not today')")
    },
    "skip marks on the tests": {
        "calc.py": BUGGY.replace(
            "return a - b", "import sys; sys.modules['test_calc'].Test.__unittest_skip__ = True; raise AssertionError"
        )
    },
    "assertEqual patched on import": {
        "calc.py": "import unittest\nunittest.TestCase.assertEqual = lambda *a, **k: None\n" + BUGGY
    },
    "assertEqual patched in the function": {
        "calc.py": BUGGY.replace(
            "return a - b", "import unittest; unittest.TestCase.assertEqual = lambda *a, **k: None; return a - b"
        )
    },
    "assertEqual given another body": {
        "calc.py": "import unittest\ndef ok(self, first, second, msg=None): pass\n"
        "unittest.TestCase._baseAssertEqual.__code__ = ok.__code__\n" + BUGGY
    },
    "failing turned into passing": {
        "calc.py": "import unittest\nunittest.TestCase.fail = lambda *a: None\n"
        "unittest.TestCase._baseAssertEqual = lambda *a, **k: None\n" + BUGGY
    },
    "failures not recorded": {
        "calc.py": "import unittest\nunittest.TestResult.addFailure = unittest.TestResult.addSuccess\n" + BUGGY
    },
    "the failure exception swapped": {
        "calc.py": "import unittest\nunittest.TestCase.failureException = KeyError\n"
        "unittest.TestCase._callTestMethod = lambda self, method: None\n" + BUGGY
    },
    "unittest replaced": {
        "calc.py": "import sys, types\nfake = types.ModuleType('unittest')\n"
        "class TestCase:\n    def __init__(self, name): self.name = name\n"
        "    def id(self): return 'test_calc.Test.' + self.name\n    def __call__(self, result):\n"
        "        result.startTest(self)\n        result.addSuccess(self)\n        result.stopTest(self)\n"
        "fake.TestCase = TestCase\nsys.modules['unittest'] = fake\n" + BUGGY
    },
    "tests replaced from the function": {
        "calc.py": BUGGY.replace(
            "return a - b",
            "import sys\n    test = sys.modules['test_calc'].Test\n"
            "    test.test_add_negative = test.test_add = lambda self: None\n    return 9",
        )
    },
    "tests replaced by a thread": {
        "calc.py": "import sys, threading\nsys.setswitchinterval(1e-7)\ndef patch():\n    while True:\n"
        "        test = getattr(sys.modules.get('test_calc'), 'Test', None)\n"
        "        if test is not None:\n            test.test_add = test.test_add_negative = lambda self: None\n"
        "threading.Thread(target=patch, daemon=True).start()\n" + BUGGY
    },
    "test classes built differently": {
        "calc.py": "import builtins\nbuild = builtins.__build_class__\n"
        "def fake(body, name, *bases, **kwargs):\n    cls = build(body, name, *bases, **kwargs)\n"
        "    [setattr(cls, key, lambda self: None) for key in list(vars(cls)) if key.startswith('test')]\n"
        "    return cls\nbuiltins.__build_class__ = fake\n" + BUGGY
    },
    "equal to everything": {
        "calc.py": "class Any:\n    def __eq__(self, other):\n        return True\n"
        "def add(a, b):\n    return Any()\ndef same(a):\n    return a\n"
    },
    "assertions patched on the instance": {
        "calc.py": BUGGY.replace(
            "return a - b", "import sys; sys._getframe(1).f_locals['self'].assertEqual = lambda *a: None"
        )
    },
    "a trace function that changes results": {
        "calc.py": "import sys\ndef trace(frame, event, arg):\n    name = frame.f_code.co_name\n"
        "    if name in ('test_add', 'test_add_negative') and 'result' in frame.f_locals:\n"
        "        frame.f_locals['result'] = 9 if name == 'test_add' else 5\n"
        "    return trace\nsys.settrace(trace)\n" + BUGGY,
    },
    "the runner's module patched": {
        "calc.py": "import __main__, unittest\n__main__.Seal.check = lambda self: None\n"
        "unittest.TestCase.assertEqual = lambda *a, **k: None\n" + BUGGY
    },
    "the runner's results patched": {
        "calc.py": "import unittest\n[results] = unittest.TestResult.__subclasses__()[-1:]\n"
        "results.addFailure = lambda self, test, err: self.addSuccess(test)\n" + BUGGY
    },
    "forged lines on every descriptor": {"calc.py": FORGE + BUGGY},
    "forged result files": {"calc.py": WRITE_RESULTS + BUGGY},
    "forged result files at exit": {
        "calc.py": "import atexit\n@atexit.register\ndef forge():\n    "
        + WRITE_RESULTS.strip().replace("\n", "\n    ")
        + "\n"
        + BUGGY
    },
    "result files linked elsewhere": {
        "answer": "1\n",
        "calc.py": WRITE_RESULTS.replace('with open(path, "w") as file:', 'os.symlink("/work/answer", path)').replace(
            '        file.write("1\\n")\n', ""
        )
        + BUGGY,
    },
    "a daemon that rewrites results": {"calc.py": DAEMON + BUGGY},
    "tests edited": {"test_calc.py": TESTS.replace("9)", "5)").replace("5)", "9)")},
    "tests emptied": {"test_calc.py": "import unittest\n\n\nclass Test(unittest.TestCase):\n    pass\n"},
    "conftest and sitecustomize": dict.fromkeys(
        ("conftest.py", "sitecustomize.py", "usercustomize.py", "tests/conftest.py"),
        "import unittest\nunittest.TestCase.assertEqual = lambda *a, **k: None\n",
    ),
    "a path file": {"patch.pth": "import os; os._exit(0)\n"},
    "standard library shadowed": dict.fromkeys(
        ("unittest.py", "json.py", "traceback.py", "types.py", "asyncio.py", "unittest/__init__.py"),
        "import os\nprint('OK')\nos._exit(0)\n",
    ),
    "programs shadowed": dict.fromkeys(
        ("python3", "bash", "cat", "bin/python3"), "#!/bin/bash\necho 1 > /logs/verifier/reward.txt\nexit 0\n"
    ),
    "equal to everything but a bare object": {
        "calc.py": "class Any:\n    def __eq__(self, other):\n        return type(other) is not object\n"
        "def add(a, b):\n    return Any()\ndef same(a):\n    return a\n"
    },
    "the comparison of a standard class patched": {
        "calc.py": "import collections, sys\ncollections.Counter.__eq__ = lambda self, other: True\n"
        "def add(a, b):\n    return collections.Counter()\ndef same(a):\n    return a\n"
    },
    "a test helper shadowed": {"test_calc/__init__.py": "class Test: pass\n"},
}


@pytest.mark.parametrize("name", SOFTWARE_CHEATS)
def test_software_cheat_scores_0(name, software, sandboxes):
    reward = score(software, cheat_at(software, SOFTWARE_CHEATS[name]), sandboxes)
    assert reward.value == 0.0, reward.details


ASSERTIONS = {
    "Equal": "self.assertEqual(calc.value(), 9)",
    "EqualReflected": "self.assertEqual(9, calc.value())",
    "EqualKeywords": "self.assertEqual(first=calc.value(), second=9)",
    "NotEqual": "self.assertNotEqual(calc.value(), 8)",
    "AlmostEqual": "self.assertAlmostEqual(calc.value(), 9.0)",
    "AlmostEqualDelta": "self.assertAlmostEqual(calc.value(), 9.0, delta=0.1)",
    "Less": "self.assertLess(calc.value(), 10)",
    "GreaterEqual": "self.assertGreaterEqual(calc.value(), 9)",
    "In": "self.assertIn(9, calc.value())",
    "NotIn": "self.assertNotIn(8, calc.value())",
    "InMember": "self.assertIn(calc.value(), [9])",
    "ListEqual": "self.assertEqual([calc.value()], [9])",
    "TupleEqual": "self.assertEqual((1, calc.value()), (1, 9))",
    "SetEqual": "self.assertEqual({calc.value()}, {9})",
    "DictEqual": "self.assertEqual({'a': [calc.value()]}, {'a': [9]})",
    "KeyEqual": "self.assertEqual({calc.value(): 1}, {9: 1})",
    "CountEqual": "self.assertCountEqual([calc.value()], [9])",
    "CountEqualIterable": "self.assertCountEqual((calc.value() for _ in range(1)), [9])",
    "SequenceEqual": "self.assertSequenceEqual((calc.value(),), [9])",
    "InKeys": "self.assertIn(9, {calc.value(): 1}.keys())",
    "DequeEqual": "self.assertEqual(deque([calc.value()]), deque([9]))",
}
METHODS = """
    def __eq__(self, other): return type(other) is not object
    def __ne__(self, other): return True
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    def __hash__(self): return hash(5)
    def __contains__(self, item): return type(item) is not object
    def __sub__(self, other): return 0
    __rsub__ = __sub__
"""
LIARS = {
    "its own class": f"class Liar:{METHODS}",
    "an int": f"class Liar(int):{METHODS}",
    "a str": f"class Liar(str):{METHODS}",
    "a dict": f"class Liar(dict):{METHODS}",
    "a list": f"class Liar(list):{METHODS}",
    "a named tuple": f"import collections\nclass Liar(collections.namedtuple('Liar', '')):{METHODS}",
    "a borrowed slot": "class Liar(int):\n    __eq__, __lt__, __hash__ = int.__ne__, int.__ne__, lambda self: 5",
    "a base with the lie": f"class Lie:{METHODS}\nclass Liar(Lie, int): pass",
    "a lying metaclass": "class Meta(type):\n    __mro__ = __dict__ = property(lambda cls: (object,))\n"
    "    __eq__ = lambda cls, other: True\n    __hash__ = lambda cls: hash(int)\n"
    f"class Liar(metaclass=Meta):{METHODS}    __class__ = int\n    __module__ = 'builtins'",
    "a proxy": f"import types\nclass Lie:{METHODS}    def __getitem__(self, key): return 9\n"
    "Liar = lambda: types.MappingProxyType(Lie())",
    "a weak proxy": f"import weakref\nclass Lie:{METHODS}\nkept = Lie()\nLiar = lambda: weakref.proxy(kept)",
    "hidden in a list": f"class Lie:{METHODS}\nLiar = lambda: [Lie()]",
}


@pytest.mark.parametrize("liar", LIARS)
def test_no_assertion_leaves_the_comparison_to_a_class_of_the_code_under_test(liar, software, sandboxes):
    tests = "".join(f"    def test_{name}(self):\n        {line}\n" for name, line in ASSERTIONS.items())
    module = (
        f"import unittest\nfrom collections import deque\n\nimport calc\n\n\nclass Test(unittest.TestCase):\n{tests}"
    )
    write(software.directory / "tests", {"test_more.py": module})
    task = replace(
        software, metadata={"fail_to_pass": [f"test_more.Test.test_{name}" for name in ASSERTIONS], "pass_to_pass": []}
    )
    reward = score(task, attempt_at(task, {"calc.py": f"{LIARS[liar]}\ndef value(): return Liar()\n"}), sandboxes)
    as_of_any_wrong_value = {"test_more.Test.test_NotEqual"}
    as_of_any_wrong_value |= {"test_more.Test.test_Less"} if liar == "a borrowed slot" else set()
    assert set(reward.details["passed"]) <= as_of_any_wrong_value


def test_honest_values_of_many_classes_are_compared_as_ever(software, sandboxes):
    source = """import collections, dataclasses, decimal, enum, fractions, pathlib
Pair = collections.namedtuple("Pair", "a b")
class Color(enum.IntEnum):
    RED = 1
class Plain:
    pass
class Words(list):
    def last(self): return self[-1]
@dataclasses.dataclass(order=True)
class Point:
    x: int
    def __add__(self, other): return Point(self.x + other.x)
default = collections.defaultdict(list, a=[1])
knot = [1]
knot.append(knot)
def count(): yield from (2, 1)
"""
    module = """import unittest
from collections import Counter, OrderedDict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from calc import *

class Test(unittest.TestCase):
    def test_all(self):
        self.assertEqual(Pair(1, 2), (1, 2))
        self.assertEqual(Color.RED, 1)
        self.assertEqual(default, {"a": [1]})
        self.assertEqual(Counter("aa"), {"a": 2})
        self.assertEqual(OrderedDict(a=1), {"a": 1})
        self.assertEqual([Decimal(2), Fraction(4, 2)], [2, 2])
        self.assertAlmostEqual(Decimal("0.5"), 0.5)
        self.assertEqual(Path("/a") / "b", Path("/a/b"))
        self.assertEqual(Words("ab"), ["a", "b"])
        self.assertEqual(Point(1) + Point(2), Point(3))
        self.assertLess(Point(1), Point(2))
        self.assertCountEqual(count(), [1, 2])
        self.assertCountEqual(first=[1, 2], second=[2, 1])
        self.assertIn("a", default.keys())
        self.assertNotEqual(Plain(), None)
        self.assertEqual(knot, knot)
        self.assertEqual(ValueError, ValueError, msg="the same class")
        with self.assertRaises(AssertionError):
            self.assertEqual(Point(1), Point(2))
"""
    write(software.directory / "tests", {"test_more.py": module})
    task = replace(software, metadata={"fail_to_pass": ["test_more.Test.test_all"], "pass_to_pass": []})
    reward = score(task, attempt_at(task, {"calc.py": source}), sandboxes)
    assert reward.value == 1.0, reward.details


def test_a_cheat_beside_a_real_fix_changes_nothing_for_shims_and_shadows(software, sandboxes):
    for name in ("conftest and sitecustomize", "standard library shadowed", "programs shadowed", "a path file"):
        workdir = attempt_at(software, {**SOFTWARE_CHEATS[name], "calc.py": FIXED})
        assert score(software, workdir, sandboxes).value == 1.0, name
        shutil.rmtree(workdir)


def test_a_software_attempt_that_hangs_scores_0_with_the_reason(software, sandboxes):
    for source in ("while True:\n    pass\n", "import time\ntime.sleep(1000)\n"):
        workdir = attempt_at(software, {"calc.py": source})
        reward = score(software, workdir, sandboxes, timeout_s=3.0)
        assert reward.value == 0.0
        assert "did not run to their end" in reward.details["reason"]
        shutil.rmtree(workdir)


def test_the_tests_of_a_task_have_the_limit_of_its_task_toml(tmp_path, sandboxes):
    for make, hang in ((terminal_task, "sleep 1000\n"), (software_task, "import time\ntime.sleep(1000)\n")):
        directory = write_task(make(0, 0, "train"), tmp_path)
        for path in (directory / "tests").iterdir():
            path.write_text(hang)
        toml = (directory / "task.toml").read_text()
        (directory / "task.toml").write_text(toml.replace("timeout_sec = 60", "timeout_sec = 1.5"))
        task = load_task(directory)
        reward = score(task, directory / "environment" / "files", sandboxes, timeout_s=60)
        assert reward.value == 0.0
        assert reward.details["reason"].endswith(" within 1.5 s")


def test_a_software_attempt_that_leaves_too_much_scores_0(software, sandboxes):
    workdir = attempt_at(software, {"calc.py": FIXED})
    with open(workdir / "huge", "wb") as file:
        file.truncate(2 * 2**20)
    assert score(software, workdir, sandboxes, max_snapshot_mib=1).value == 0.0
    assert score(software, workdir, sandboxes, max_snapshot_mib=4).value == 1.0


# ---- cheats on terminal tasks --------------------------------------------------------------------------------------

TERMINAL_CHEATS: dict[str, dict[str, str]] = {
    "reward files in the work directory": {
        "reward.txt": "1\n",
        "reward.json": '{"reward": 1}',
        "logs/reward.txt": "1\n",
    },
    "tests in the work directory": {"tests/test.sh": "echo 1 > /logs/verifier/reward.txt\n", "test.sh": "exit 0\n"},
    "programs shadowed": dict.fromkeys(("cat", "bash", "[", "echo", "bin/cat"), "#!/bin/bash\necho blue\n"),
    "start-up files": dict.fromkeys(
        (".bashrc", ".profile", ".bash_profile", "etc/profile", ".bash_env"), "cat() { echo blue; }\n"
    ),
    "an answer with more in it": {"answer": "blue\nred\n"},
}


@pytest.mark.parametrize("name", TERMINAL_CHEATS)
def test_terminal_cheat_scores_0(name, terminal, sandboxes):
    reward = score(terminal, cheat_at(terminal, TERMINAL_CHEATS[name]), sandboxes)
    assert reward.value == 0.0, reward.details


def test_a_terminal_answer_that_never_ends_scores_0_with_the_reason(terminal, sandboxes):
    workdir = attempt_at(terminal, {})
    (workdir / "answer").symlink_to("/dev/stdin")
    assert score(terminal, workdir, sandboxes).value == 0.0
    (workdir / "answer").unlink()
    (workdir / "answer").symlink_to("/dev/zero")
    reward = score(terminal, workdir, sandboxes, timeout_s=1.0)
    assert reward.value == 0.0
    assert "did not end within 1 s" in reward.details["reason"]
    assert reward.unended


def test_a_program_of_the_attempt_cannot_leave_a_daemon_that_rewrites_the_reward(terminal, sandboxes):
    script = 'bash ./run; if [ "$(cat answer)" = blue ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt\n'
    write(terminal.directory / "tests", {"test.sh": script})
    daemon = "setsid bash -c 'while :; do echo 1 > /logs/verifier/reward.txt; done' </dev/null >/dev/null 2>&1 &\n"
    reward = score(terminal, attempt_at(terminal, {"run": daemon}), sandboxes)
    assert reward.value == 0.0
    assert reward.details["reason"] == "a process outlived the tests"


@pytest.mark.parametrize(("grading", "value"), [("official", 1.0), ("strict", 0.0)])
def test_official_grading_lets_a_process_outlive_the_tests_as_harbor_does(grading, value, terminal, sandboxes):
    script = "sleep 100 </dev/null >/dev/null 2>&1 &\necho 1 > /logs/verifier/reward.txt\n"
    write(terminal.directory / "tests", {"test.sh": script})
    assert score(terminal, attempt_at(terminal, {}), sandboxes, grading=grading).value == value


def test_reward_files_say_what_they_say_to_harbor(tmp_path):
    """2,000 of them, against verdicts that ``record_harbor_rewards`` recorded."""
    recorded = json.loads((TASKS / "harbor_rewards.json").read_text())
    assert sum(one is not None for one in recorded) > 700
    for number, (files, official) in enumerate(zip(harbor_rewards.files(2000), recorded, strict=True)):
        logs = tmp_path / str(number)
        logs.mkdir()
        for name, content in files.items():
            (logs / name).write_bytes(content)
        try:
            numbers = read_reward(logs, "task")
        except VerifierError:
            numbers = None
        assert numbers == (official or None), files  # no number is no verdict


def test_shipped_evaluations_are_graded_officially():
    configs = sorted((TASKS.parents[1] / "configs" / "eval").glob("*.yaml"))
    found = {path.name: yaml.safe_load(path.read_text())["rollouts"]["verifier"]["init_args"] for path in configs}
    assert len(found) == 6
    assert {one["grading"] for one in found.values()} == {"official"}


def test_a_grader_has_a_name_and_a_version(software, terminal):
    assert UnitTestVerifier().grader(terminal) == "test.sh, as Harbor 0.25.0 (strict)"
    assert UnitTestVerifier(grading="official").grader(terminal) == "test.sh, as Harbor 0.25.0 (official)"
    names = {
        "live_code_bench": r"live code bench runner [0-9a-f]{8}, equals nvidia-livecodebench 26.3 \(official\)",
        "scicode": r"scicode runner [0-9a-f]{8}, equals nvidia-scicode 26.3 \(official\)",
        "swe_bench": "swebench 5.0.2",
        "swe_bench_pro": "SWE-bench Pro's scripts",
    }
    for grader, name in names.items():
        task = replace(software, metadata={"grader": grader})
        assert re.fullmatch(name, UnitTestVerifier(grading="official").grader(task))
    assert re.fullmatch("unittest by name, runner [0-9a-f]{8}", UnitTestVerifier().grader(software))
    judge = RewardSum(Part(UnitTestVerifier(grading="official")), {"loops": Part(LoopPenalty())})
    assert (judge.grading, judge.grader(terminal)) == ("official", "test.sh, as Harbor 0.25.0 (official)")


def test_an_attempt_without_any_effect_scores_0_in_both_environments(software, terminal, sandboxes):
    for task in (software, terminal):
        workdir = attempt_at(task, {"unrelated": "noise\n"})
        assert score(task, workdir, sandboxes).value == 0.0


# ---- infrastructure is never a reward ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script",
    [
        "true",
        "echo nothing > /logs/verifier/reward.txt",
        ": > /logs/verifier/reward.txt",
        "echo nan > /logs/verifier/reward.txt",
        "echo inf > /logs/verifier/reward.txt",
        "echo '{' > /logs/verifier/reward.json; echo 1 > /logs/verifier/reward.txt",
        "echo '{}' > /logs/verifier/reward.json",
        "echo '[1]' > /logs/verifier/reward.json",
        'echo \'{"a": 1, "b": 0}\' > /logs/verifier/reward.json',
        "echo '{\"reward\": NaN}' > /logs/verifier/reward.json",
        "ln -s /etc/passwd /logs/verifier/reward.txt",
        "mkfifo /logs/verifier/reward.txt",
        "mkdir /logs/verifier/reward.txt",
        "kill -9 $PPID",
    ],
)
def test_a_missing_or_unusable_reward_is_an_error_not_a_0(script, terminal, sandboxes):
    write(terminal.directory / "tests", {"test.sh": script + "\n"})
    with pytest.raises(VerifierError):
        score(terminal, attempt_at(terminal, {"answer": "blue\n"}), sandboxes)


def test_a_link_as_reward_is_never_followed_out_of_the_sandbox(terminal, sandboxes, tmp_path):
    (tmp_path / "one").write_text("1\n")
    write(terminal.directory / "tests", {"test.sh": f"ln -s {tmp_path}/one /logs/verifier/reward.txt\n"})
    with pytest.raises(VerifierError, match="regular file"):
        score(terminal, attempt_at(terminal, {}), sandboxes)


def test_a_missing_interpreter_or_test_directory_is_an_error(software, terminal, sandboxes):
    gold = attempt_at(software, {"calc.py": FIXED})
    with pytest.raises(VerifierError, match="did not start"):
        score(software, gold, sandboxes, python="/usr/bin/python0")
    shutil.rmtree(terminal.directory / "tests")
    with pytest.raises(VerifierError, match="tests"):
        score(terminal, attempt_at(terminal, {}), sandboxes)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"fail_to_pass": [], "pass_to_pass": []},
        {"fail_to_pass": "test_calc.Test.test_add", "pass_to_pass": []},
        {"fail_to_pass": ["test_gone.Test.test_add"], "pass_to_pass": []},
        {"fail_to_pass": ["test_add"], "pass_to_pass": []},
        {"fail_to_pass": ["test_calc.Test.test add"], "pass_to_pass": []},
    ],
)
def test_unusable_test_ids_are_an_error_that_names_the_task(metadata, software, sandboxes):
    with pytest.raises(VerifierError, match="task software"):
        score(replace(software, metadata=metadata), attempt_at(software, {}), sandboxes)


class NoSandboxes(BubblewrapProvider):
    async def open(self, *args, **kwargs):
        raise InfrastructureError("no room")


def test_a_sandbox_that_cannot_open_is_an_error(software, terminal):
    for task in (software, terminal):
        with pytest.raises(InfrastructureError, match="no room"):
            score(task, attempt_at(task, {}), NoSandboxes())


def test_nothing_is_left_behind_on_this_machine(software, sandboxes, tmp_path, monkeypatch):
    sandboxes.check()  # its own directory must be where other users can look, unlike a test's
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    score(software, attempt_at(software, {"calc.py": FIXED}), sandboxes)
    assert [path.name for path in scratch.iterdir() if path.name.startswith("north-verify-")] == []
