"""Tasks of several steps, and tasks whose verifier has an environment of its own; as files, by name, each with its
solution. Standard library only."""

from __future__ import annotations

from pathlib import Path

_TWO = '[[steps]]\nname = "one"\n{one}[[steps]]\nname = "two"\n{two}'
_REWARD = "reward() { echo $1 >/logs/verifier/reward.txt; }\n"
_NUMBERS = 'numbers() { echo "$1" >/logs/verifier/reward.json; }\n'
_SAME = _REWARD + 'if [ "$(cat /work/answer)" = "$(cat /tests/expected)" ]; then reward 1; else reward 0; fi\n'


def _steps(one: str = "", two: str = "", top: str = "", **files: str) -> dict[str, str]:
    return {
        "task.toml": top + _TWO.format(one=one, two=two),
        "steps/one/instruction.md": "Begin.\n",
        "steps/two/instruction.md": "Go on.\n",
        "environment/Dockerfile": "FROM debian:12\n",
        "environment/files/given": "given\n",
        "steps/one/solution/solve.sh": "echo one >>done\n",
        "steps/two/solution/solve.sh": "echo two >>done\n",
        **files,
    }


def _tests(one: str, two: str) -> dict[str, str]:
    return {"steps/one/tests/test.sh": _REWARD + _NUMBERS + one, "steps/two/tests/test.sh": _REWARD + _NUMBERS + two}


def _apart(toml: str, solution: str, test: str, **files: str) -> dict[str, str]:
    return {
        "task.toml": toml,
        "instruction.md": "Do it.\n",
        "environment/Dockerfile": "FROM debian:12\n",
        "environment/files/out/old": "old\n",
        "solution/solve.sh": solution,
        "tests/test.sh": _REWARD + test,
        **files,
    }


_SEPARATE = '[verifier]\nenvironment_mode = "separate"\n'

TRIALS: dict[str, dict[str, str]] = {
    "mean of the steps": _steps(**_tests("reward 1", "reward 0.5")),
    "mean, said": _steps(top='multi_step_reward_strategy = "mean"\n', **_tests("reward 0", "reward 1")),
    "the last step": _steps(top='multi_step_reward_strategy = "final"\n', **_tests("reward 1", "reward 0.25")),
    "below the gate": _steps(one="min_reward = 0.6\n", **_tests("reward 0.5", "reward 1")),
    "at the gate": _steps(one="min_reward = 0.5\n", **_tests("reward 0.5", "reward 1")),
    "below the gate, the last step": _steps(
        one="min_reward = 0.6\n", top='multi_step_reward_strategy = "final"\n', **_tests("reward 0.5", "reward 1")
    ),
    "below the gate of the last step": _steps(two="min_reward = 1\n", **_tests("reward 1", "reward 0")),
    "below a number's gate": _steps(
        one="min_reward = {reward = 0.5, style = 0.5}\n",
        **_tests("""numbers '{"reward": 1, "style": 0.4}'""", "reward 1"),
    ),
    "a number of a gate is missing": _steps(one="min_reward = {style = 0.1}\n", **_tests("reward 1", "reward 1")),
    "numbers that only one step says": _steps(
        **_tests("""numbers '{"reward": 1, "style": 1}'""", """numbers '{"reward": 0.5, "speed": 3}'""")
    ),
    "a step goes on where the last ended": _steps(
        **_tests(
            '[ "$(cat /work/done)" = one ] && reward 1', '[ "$(cat /work/done | tr "\\n" -)" = one-two- ] && reward 1'
        )
    ),
    "files and setup of a step": _steps(
        **_tests(
            "[ ! -e /work/more ] && [ -e /work/given ] && reward 1",
            '[ "$(cat /work/more /work/made /work/given)" = "$(printf "more\\nmore\\nnew")" ] && reward 1',
        ),
        **{
            "steps/two/workdir/more": "more\n",
            "steps/two/workdir/given": "new\n",
            "steps/two/workdir/setup.sh": "cp more made\n",
        },
    ),
    "a setup that fails": _steps(
        **_tests("reward 1", "reward 1"), **{"steps/two/workdir/setup.sh": "echo broken; exit 3\n"}
    ),
    "a healthcheck that fails": _steps(
        two='healthcheck = {command = "test -e /work/nothing", retries = 1, interval_sec = 0.01}\n',
        **_tests("reward 1", "reward 1"),
    ),
    "a healthcheck that succeeds": _steps(
        two='healthcheck = {command = "test -e /work/done"}\n', **_tests("reward 0", "reward 1")
    ),
    "tests of a step over those of the task": _steps(
        **{
            "tests/test.sh": _SAME,
            "tests/expected": "one\n",
            "steps/two/tests/expected": "two\n",
            "steps/one/solution/solve.sh": "echo one >answer\n",
            "steps/two/solution/solve.sh": "echo two >answer\n",
        }
    ),
    "tests of the last step are gone": _steps(
        **_tests("reward 1", "[ ! -e /tests/secret ] && reward 1"), **{"steps/one/tests/secret": "x\n"}
    ),
    "variables of a step": _steps(
        top='[verifier.env]\nA = "1"\nB = "1"\n',
        two='verifier = {env = {B = "2"}}\n',
        **_tests('[ "$A$B" = 11 ] && reward 1', '[ "$A$B" = 12 ] && reward 1'),
    ),
    "artifacts and nothing else": _apart(
        'artifacts = ["/work/answer"]\n' + _SEPARATE,
        "echo yes >answer; echo no >note",
        "[ -e /work/answer ] && [ ! -e /work/note ] && [ -e /work/out/old ] && reward 1",
    ),
    "a directory is replaced": _apart(
        'artifacts = ["/work/out"]\n' + _SEPARATE,
        "rm out/old; mkdir out/deep; echo new >out/deep/new",
        '[ "$(cd /work/out && echo * */*)" = "deep deep/new" ] && reward 1',
    ),
    "what is excluded": _apart(
        'artifacts = [{source = "/work/out", exclude = ["*.o", "deep"]}]\n' + _SEPARATE,
        "mkdir out/deep out/other; touch out/a.o out/a.c out/deep/b.c out/other/c.o out/other/d",
        '[ "$(cd /work/out && echo * */*)" = "a.c old other other/d" ] && reward 1',
    ),
    "no artifacts": _apart(
        _SEPARATE, "echo yes >answer; rm out/old", "[ ! -e /work/answer ] && [ -e /work/out/old ] && reward 1"
    ),
    "an artifact that is not there": _apart(
        'artifacts = ["/work/answer", "/work/out/old"]\n' + _SEPARATE, "rm out/old", "[ -e /work/out/old ] && reward 1"
    ),
    "a collect command": _apart(
        'artifacts = ["/work/state"]\n' + _SEPARATE + '[[verifier.collect]]\ncommand = "wc -l <note >state; exit 3"\n',
        "seq 4 >note",
        '[ "$(cat /work/state)" = 4 ] && [ ! -e /work/note ] && reward 1',
    ),
    "artifacts of a step": _steps(
        top='artifacts = ["/work/done"]\n' + _SEPARATE,
        two='artifacts = ["/work/extra"]\n',
        **_tests(
            "[ -e /work/done ] && [ ! -e /work/extra ] && reward 1",
            '[ "$(cat /work/done | tr "\\n" -)" = one-two- ] && [ -e /work/extra ] && reward 1',
        ),
        **{"steps/one/solution/solve.sh": "echo one >>done; touch extra\n"},
    ),
    "only one step apart": _steps(
        one='verifier = {environment_mode = "separate"}\n',
        **_tests("[ ! -e /work/done ] && reward 1", "[ -e /work/done ] && reward 1"),
    ),
}


def write_trial(name: str, parent: Path) -> Path:
    """Make the task directory of this name below ``parent``."""
    root = parent / "task"
    for path, text in TRIALS[name].items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root
