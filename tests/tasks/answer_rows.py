"""Synthetic rows of LiveCodeBench, and answers to them that try every way of being right or wrong."""

import base64
import json
import pickle
import random
import zlib
from typing import Any


def packed(cases: list[dict[str, str]]) -> str:
    """As in the published files."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def case(given: str, expected: str, kind: str = "stdin") -> dict[str, str]:
    return {"input": given, "output": expected, "testtype": kind}


def live_code_bench_row(
    name: str, public: list[dict[str, str]], private: list[dict[str, str]], function: str | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "question_title": name,
        "question_content": "Double the number.",
        "platform": "leetcode" if function else "atcoder",
        "question_id": name,
        "contest_id": "c",
        "contest_date": "2024-08-03T00:00:00",
        "starter_code": "class Solution:\n    def double(self, x: int) -> int:\n        " if function else "",
        "difficulty": "easy",
        "public_test_cases": json.dumps(public),
        "private_test_cases": packed(private),
        "metadata": json.dumps({"func_name": function} if function else {}),
    } | more


STDIN = live_code_bench_row("abc_a", [case("3\n", "6\n")], [case("4\n", "8\n"), case("-1\n", "-2\n")])
FUNCTIONAL = live_code_bench_row(
    "double", [case("3", "6", "functional")], [case("4", "8", "functional")], function="double"
)

# ---- answers whose verdicts are compared with the official runner's ----------------------------------------------------

PRINTED = {  # what is expected: what is printed
    "6": ("6", "6\n", " 6 ", "6\n\n", "\n6", "6.0", "6.", "06", "+6", "6e0", "0.6e1", "6,", "six", "", "5", "6 6",
        "6\n6", "٦", "６", "1_0", "6_", "NaN", "-6", "6\r\n", "\t6", "6\x00"),
    "1000": ("1e3", "1E+3", "1_000", "1,000", "1000.000", "999.9999999999999999999999"),
    "0.1": ("0.10", ".1", "1e-1", "0.1000000000000000055511151231257827", "1/10"),
    "50000000000000001": ("50000000000000000", "50000000000000001.0", "5.0000000000000001e16"),
    "NaN": ("NaN", "nan", "sNaN", "Infinity"),
    "inf": ("inf", "Infinity", "INF", "1e999", "-inf"),
    "Yes": ("Yes", "YES", "yes", " Yes", "Yes.", "'Yes'"),
    "1 2 3": ("1 2 3", "1  2 3", "1 2 3 ", "1\t2\t3", "1.0 2.00 3", "1 2", "1\n2\n3", "[1, 2, 3]"),
    "1 2\n3 4": ("1 2\n3 4", "1 2 \n 3 4\n", "1 2\n\n3 4", "1 2\n3 5", "3 4\n1 2", "1 2\n3 4\n5"),
    "": ("", "\n", " ", "0", "None"),
    "a b": ("a b", "a  b", "a\xa0b", "b a"),
    "-0": ("0", "-0.0", "00"),
}  # fmt: skip

READINGS = (
    "print(int(input()) * 2)",
    "import sys\nprint(int(sys.stdin.readline()) * 2)",
    "import sys\nprint(int(sys.stdin.read()) * 2)",
    "import sys\nprint(int(sys.stdin.readlines()[0]) * 2)",
    "import sys\nfor line in sys.stdin:\n    print(int(line) * 2)",
    "import sys\nprint(int(next(sys.stdin)) * 2)",
    "import sys\nprint(int(next(iter(sys.stdin.readline, ''))) * 2)",
    "print(int(open(0).read()) * 2)",
    "print(int(open('/dev/stdin').readline()) * 2)",
    "import sys\nprint(int(sys.stdin.buffer.read()) * 2)",
    "import sys\nsys.stdout.write(str(int(input()) * 2))",
    "import sys\nsys.stdout.buffer.write(str(int(input()) * 2).encode())",
    "import os\nos.write(1, str(int(input()) * 2).encode())",
    "import os\nprint(int(os.read(0, 9)) * 2)",
    "import sys\nprint(int(input()) * 2, file=sys.stderr)",
    "import sys\nprint(int(input()) * 2)\nprint('debug', file=sys.stderr)",
    "import sys\nprint(int(input()) * 2)\nsys.exit()",
    "import sys\nprint(int(input()) * 2)\nsys.exit(1)",
    "print(int(input()) * 2)\nexit()",
    "print(int(input()) * 2)\nquit()",
    "print(int(input()) * 2)\nraise SystemExit(3)",
    "import os\nprint(int(input()) * 2)\nos._exit(0)",
    "print(int(input()) * 2)\nraise ValueError",
    "print(int(input()) * 2)\nraise KeyboardInterrupt",
    "print(int(input()) * 2)\nraise GeneratorExit",
    "def main():\n    print(int(input()) * 2)\n\nif __name__ == '__main__':\n    main()",
    'def main():\n    print(int(input()) * 2)\n\nif __name__ == "__main__":\n    main()',
    "def main():\n    print(int(input()) * 2)\n\nif '__main__' == __name__:\n    main()",
    "def main():\n    print(int(input()) * 2)\n\nif __name__ == '__main__':\n    main()\nx = 1",
    "def main():\n    print(int(input()) * 2)\n\nif (__name__ == '__main__'):\n    main()\nelse:\n    print(1)",
    "def main():\n    print(int(input()) * 2)\n\nmain() if __name__ == '__main__' else None",
    "n = int(input())\ndef f():\n    return n * 2\nprint(f())",
    "n = 0\ndef f():\n    global n\n    n = int(input())\n    return n * 2\nprint(f())",
    "total = 0\ndef f(x):\n    global total\n    total += x\n    return total\nf(int(input()))\nprint(f(0) * 2)",
    "from math import *\nprint(int(fabs(int(input())) * 2))",
    "import numpy as np\nprint(np.int64(input()) * 2)",
    "import numpy as np\nprint(np.array([int(input())]) * 2)",
    "import numpy\nprint(*(numpy.array([int(input())]) * 2))",
    "import sys\nsys.setrecursionlimit(10**6)\ndef f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\nf(2000)\nprint(int(input()) * 2)",
    "def f(n):\n    return f(n + 1)\nprint(f(0))",
    "import threading\ndef main():\n    print(int(input()) * 2)\nt = threading.Thread(target=main)\nt.start()\nt.join()",
    "import subprocess\nprint(subprocess.run(['expr', input(), '*', '2'], capture_output=True, text=True).stdout)",
    "import os\nprint(os.getcwd() and int(input()) * 2)",
    "import os\nos.system('true')\nprint(int(input()) * 2)",
    "print(int(input()) * 2",
    "print(int(input()) * 2)\n  print(3)",
    "return 3",
    "import nothing_of_that_name\nprint(int(input()) * 2)",
    "",
    "pass",
    "# only words",
    "'''\nprint(3)\n'''",
    "print(input() and input())",
    "while True:\n    try:\n        print(int(input()) * 2)\n    except EOFError:\n        break",
    "try:\n    print(int(input()) * 2)\nexcept:\n    pass",
    "class Solution:\n    def f(self, x):\n        return x * 2\nprint(Solution().f(int(input())))",
    "class Solution:\n    def __init__(self, x):\n        self.x = x\nprint(Solution(int(input())).x * 2)",
    "print(heappop([int(input()) * 2]), end='')",
    "print(Counter([int(input())]).most_common(1)[0][0] * 2)",
    "import builtins\nbuiltins.print(int(input()) * 2)",
    "from sys import stdin, stdout\nstdout.write(str(int(stdin.readline()) * 2))",
    "from sys import stdin\ninput = stdin.readline\nprint(int(input()) * 2)",
    "input = lambda: '3'\nprint(int(input()) * 2)",
    "import sys\nsys.stdout.close()\nprint(int(input()) * 2)",
    "import sys\nsys.stdout = open('x', 'w')\nprint(int(input()) * 2)",
    "import sys, io\nsys.stdout = io.StringIO()\nprint(int(input()) * 2)",
    "import sys\nsys.stdin = None\nprint(6)",
    "@lambda f: f()\ndef main():\n    print(int(input()) * 2)",
    "async def main():\n    print(int(input()) * 2)\nimport asyncio\nasyncio.run(main())",
    "from __future__ import annotations\nprint(int(input()) * 2)",
    "x: int = int(input())\nprint(x * 2)",
    "print(sum(int(c) for c in input()) * 2 * (1 if int(open(0).read()) > 0 else -1))",
)

VALUES = {  # what is expected: the expression that is returned; np is numpy
    "6": ("6", "6.0", "6 + 0j", "'6'", "[6]", "(6,)", "True * 6", "None", "6.5", "-6", "[]", "{}", "np.int64(6)",
        "np.float32(6)", "np.array(6)", "np.array([6])", "np.array([[6]])", "np.array([6, 6])", "np.array([])",
        "np.array(['6'])", "np.complex64(6)", "np.bool_(1)", "Decimal(6)", "Fraction(6)", "Fraction(13, 2)",
        "iter([6])", "6 .__add__", "lambda: 6", "range(6)"),
    "1": ("True", "1.0", "np.bool_(True)", "'1'", "[1]"),
    "true": ("True", "1", "1.0", "'true'", "not []", "np.bool_(True)", "[True]"),
    "null": ("None", "0", "[]", "False", "'null'", "print('x')"),
    "0.1": ("0.1", "0.10000000000000001", "1 / 10", "0.1 + 1e-12", "Decimal('0.1')", "Decimal(0.1)",
        "Fraction(1, 10)", "Fraction(0.1)", "np.float32(0.1)", "'0.1'"),
    "0.30000000000000004": ("0.1 + 0.2", "0.3", "3 / 10"),
    "[1, 2]": ("[1, 2]", "(1, 2)", "[1.0, 2]", "[2, 1]", "{1, 2}", "[1]", "[1, 2, 3]", "range(1, 3)",
        "np.array([1, 2])", "deque([1, 2])", "list(map(int, '12'))", "map(int, '12')", "list(np.array([1, 2]))",
        "['1', '2']", "[True, 2]", "iter([1, 2])", "namedtuple('P', 'x y')(1, 2)", "{1: 1, 2: 2}.keys()",
        "[[1], [2]]", "'[1, 2]'"),
    "[[1, 2], [3]]": ("[[1, 2], [3]]", "[(1, 2), (3,)]", "((1, 2), (3,))", "([1, 2], [3])", "[[3], [1, 2]]",
        "[[1, 2], 3]", "[np.array([1, 2]), [3]]"),
    "[[1], [3]]": ("[np.array([1]), [3]]", "np.array([[1], [3]])"),
    "[]": ("[]", "()", "{}", "None", "''", "set()", "[[]]", "np.array([])", "range(0)"),
    "[6]": ("np.array([6])", "np.array(6)", "[6,]", "6", "(6,)"),
    '"ab"': ("'ab'", '"ab"', "'AB'", "'ab '", "b'ab'", "['a', 'b']", "str('ab')", "np.str_('ab')"),
    '["a"]': ("['a']", "('a',)", "'a'", "{'a'}", "[b'a']", "[np.str_('a')]"),
    '{"a": 1}': ("{'a': 1}", "OrderedDict(a=1)", "Counter('a')", "defaultdict(int, a=1)", "[('a', 1)]", "{'a': 2}"),
    '{"1": 1}': ("{'1': 1}", "{1: 1}"),
    "100000000000000000000000": ("10 ** 23", "1e23", "int(1e23)", "99999999999999991611392"),
    "1e400": ("float('inf')", "1e999", "10 ** 400"),
    "NaN": ("float('nan')", "nan"),
}  # fmt: skip

BODIES = (
    "class Solution:\n    def double(self, x):\n        return x * 2",
    "def double(x):\n    return x * 2",
    "class Other:\n    def double(self, x):\n        return x * 2",
    "class Solution:\n    def twice(self, x):\n        return x * 2",
    "class Solution:\n    def double(self, x, y):\n        return x * 2",
    "class Solution:\n    def double(self):\n        return 6",
    "class Solution:\n    @staticmethod\n    def double(x):\n        return x * 2",
    "class Solution:\n    def __init__(self, x):\n        pass\n    def double(self, x):\n        return x * 2",
    "class Solution:\n    def __init__(self):\n        self.n = 0\n    def double(self, x):\n        self.n += 1\n        return x * 2 * self.n",
    "class Solution:\n    def double(self, x: List[int]) -> Optional[int]:\n        return x * 2",
    "class Solution:\n    def double(self, x):\n        raise ValueError",
    "class Solution:\n    def double(self, x):\n        sys.exit()",
    "import sys\nclass Solution:\n    def double(self, x):\n        return x * 2\nsys.exit()",
    "class Solution:\n    def double(self, x):\n        return x * 2\nif __name__ == '__main__':\n    raise ValueError",
    "class Solution:\n    def double(self, x):\n        return x * 2\nprint(Solution().double(input()))",
    "class Solution:\n    def double(self, x):\n        return x * 2\nraise ValueError",
    "class Solution:\n    def double(self, x):\n        print(x)\n        return x * 2",
    "class Solution:\n    def double(self, x):\n        return 0 if x == 0 else 2 + self.double(x - 1) if x > 0 else -self.double(-x)",
    "class Solution:\n    def double(self, x):\n        return self.double(x + 1)",
    "class Solution:\n    double = lambda self, x: x * 2",
    "class Solution:\n    double = 6",
    "class Solution:\n    @cache\n    def double(self, x):\n        return x * 2",
    "class Solution:\n    def double(self, x):\n        yield x * 2",
    "class Solution:\n    async def double(self, x):\n        return x * 2",
    "memo = {}\nclass Solution:\n    def double(self, x):\n        memo[x] = len(memo)\n        return x * 2 if len(memo) < 2 else memo",
    "double = lambda x: x * 2\nclass Solution: pass",
    "# class Solution\ndef double(x):\n    return x * 2",
    "class Solution:\n    def double(self, x):\n        a = [x]\n        a.append(a)\n        return a",
    "",
)


EQUALS = "class {0}:\n    __eq__ = lambda self, other: {1}\nclass Solution:\n    def double(self, x):\n        return Own({2})"
STRICT = {  # what strict grading judges otherwise, and why: the outputs expected, the code
    "equals everything": (["6"], EQUALS.format("Own", "True", "")),
    "a number that equals everything": (["6"], EQUALS.format("Own(int)", "True", "x")),
    "the right number, which equals nothing": (["6"], EQUALS.format("Own(int)", "False", "2 * x")),
    "the right list, which equals nothing": (["[3]"], EQUALS.format("Own(list)", "False", "[x]")),
    "far longer than what is expected": ("6", "print('6' + ' ' * 2**21)"),
    "the alarm is silenced": ("6", "import signal, time\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\ntime.sleep(9)\nprint(6)"),
}  # fmt: skip


def pairs_of(table: dict[str, tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(wanted, given) for wanted, several in table.items() for given in several]


def strict_answers() -> list[dict[str, Any]]:
    rows = []
    for name, (outputs, code) in STRICT.items():
        calls = isinstance(outputs, list)
        tests = {"inputs": ["3"], "outputs": [*outputs], "fn_name": "double" if calls else None, "stdin_buffer": False}
        rows.append({"name": f"strict: {name}", "tests": tests, "code": code})
    return rows


def answers() -> list[dict[str, Any]]:
    """Every kind of answer once: ``name``, ``tests`` and ``code``."""
    numbers = {"inputs": ["3\n", "-4\n", "0"], "outputs": ["6\n", "-8", "0\n"], "fn_name": None, "stdin_buffer": False}
    calls = {"inputs": ["3", "-4", "0"], "outputs": ["6", "-8", "0"], "fn_name": "double", "stdin_buffer": False}
    rows = [
        {
            "name": f"printed-{n}",
            "tests": numbers | {"inputs": [""], "outputs": [wanted]},
            "code": f"print({text!r}, end='')",
        }
        for n, (wanted, text) in enumerate(pairs_of(PRINTED))
    ]
    rows += [{"name": f"reading-{n}", "tests": numbers, "code": code} for n, code in enumerate(READINGS)]
    imports = "from fractions import Fraction\nfrom decimal import Decimal\n"
    for n, (wanted, value) in enumerate(pairs_of(VALUES)):
        code = f"{imports}class Solution:\n    def double(self, x):\n        return {value}"
        code = code.replace("np.", "__import__('numpy').")  # only where it is needed
        rows.append({"name": f"value-{n}", "tests": calls | {"inputs": ["3"], "outputs": [wanted]}, "code": code})
    rows += [{"name": f"body-{n}", "tests": calls, "code": code} for n, code in enumerate(BODIES)]
    return rows + strict_answers()


def random_answers(count: int, seed: int) -> list[dict[str, Any]]:
    """Answers that print or return random values, which are somewhat like what is expected."""
    rng = random.Random(seed)
    rows = []
    for n in range(count):
        wanted = _value(rng, 0)
        given = wanted if rng.random() < 0.3 else _near(rng, wanted)
        if rng.random() < 0.5:
            code = f"class Solution:\n    def double(self, x):\n        return {given!r}"
            tests = {"inputs": ["3"], "outputs": [json.dumps(wanted)], "fn_name": "double"}
        else:
            expected = "\n".join(_line(rng, line) for line in wanted) if isinstance(wanted, list) else str(wanted)
            text = _reprint(rng, expected)
            code = f"print({text!r}, end={rng.choice(['', chr(10), ' '])!r})"
            tests = {"inputs": [""], "outputs": [expected], "fn_name": None}
        rows.append({"name": f"random-{seed}-{n}", "tests": tests | {"stdin_buffer": False}, "code": code})
    return rows


def _value(rng: random.Random, depth: int) -> Any:
    kinds = [
        lambda: rng.randint(-50, 50),
        lambda: round(rng.uniform(-9, 9), rng.randint(0, 6)),
        lambda: rng.random() < 0.5,
        lambda: "".join(rng.choices("abc 01.", k=rng.randint(0, 5))),
        lambda: rng.randint(-(10**25), 10**25),
        lambda: rng.uniform(-1, 1) * 10 ** rng.randint(-30, 30),
        lambda: [_value(rng, depth + 1) for _ in range(rng.randint(0, 4))],
        lambda: {str(i): _value(rng, depth + 1) for i in range(rng.randint(0, 3))},
    ]
    return rng.choice(kinds[: 6 if depth > 2 else 8])()


def _near(rng: random.Random, value: Any) -> Any:
    if isinstance(value, list):
        changed = [_near(rng, one) if rng.random() < 0.4 else one for one in value]
        return rng.choice([changed, tuple(changed), changed[::-1], changed + changed[:1]])
    if isinstance(value, dict):
        return {key: _near(rng, one) if rng.random() < 0.4 else one for key, one in value.items()}
    if isinstance(value, str):
        return rng.choice([value.strip(), value + " ", value.upper(), value])
    number = float(value)
    return rng.choice(
        [number, int(number), str(value), -value, value + 1, bool(value), complex(number), [value], value]
    )


def _line(rng: random.Random, value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _reprint(rng: random.Random, text: str) -> str:
    words = []
    for word in text.split(" "):
        try:
            number = float(word)
            forms = [word, f"{number:.3f}", f"{number:e}", f"{number!r}", f"+{word}", f"0{word}", f"{word}0", word]
            words.append(rng.choice(forms) if rng.random() < 0.5 else word)
        except ValueError:
            words.append(word)
    changes = [str, str.strip, str.upper, lambda t: t + "\n", lambda t: " " + t, lambda t: t.replace("\n", "\n\n")]
    return rng.choice(changes)(rng.choice([" ", "  ", "\t", " "]).join(words))
