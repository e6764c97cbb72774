"""The late-write race: an attempt leaves a process running that writes answer and reward once grading has begun.

In: a provider and a folder. Out: the rewards, graded as this package grades and as it is done naively, in the
sandbox of the attempt. The right reward is 0: what the attempt itself left is the wrong answer.
"""

import asyncio
from pathlib import Path

from north_lightning.sandbox import Shell
from north_lightning.types import Rollout, Task
from north_lightning.verifiers import UnitTestVerifier

TEST = 'if [ "$(cat /work/answer)" = blue ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt\n'
LATE_WRITER = """setsid bash -c '
until [ -e /tests/test.sh ] || [ -e /tmp/tests/test.sh ]; do :; done
put() { echo $1 >$2.new && mv -f $2.new $2; }
while :; do put blue /work/answer; put 1 /logs/verifier/reward.txt; done' >/dev/null 2>&1 &
echo red >/work/answer"""


def make_task(folder: Path) -> Task:
    for name, text in (("environment/files/note", "blue\n"), ("tests/test.sh", TEST)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return Task("late", "terminal", "tiny", "copy note to answer", folder, 4)


async def graded(provider, task, folder):
    """The reward of one attempt, as an attempt is graded here: its processes ended, a snapshot, a fresh sandbox."""
    sandbox = await provider.open(task.directory / "environment" / "files")
    try:
        shell = Shell(sandbox)
        assert (await shell.run(LATE_WRITER, 30)).exit_code == 0
        await sandbox.snapshot(folder / "work")
    finally:
        await sandbox.close()
    rollout = Rollout(task.id, task.environment, task.family, 0, 0, 0)
    return (await UnitTestVerifier().verify(task, rollout, folder / "work", provider)).value


async def naively_graded(provider, task, folder):
    """The same attempt, its tests copied into the sandbox in which its processes still run."""
    logs = folder / "logs"
    logs.mkdir()
    logs.chmod(0o777)
    image = task.directory / "environment" / "files"
    tests = {"/grader": task.directory / "tests"}
    sandbox = await provider.open(image, read_only=tests, writable={"/logs/verifier": logs})
    try:
        shell = Shell(sandbox)
        assert (await shell.run(LATE_WRITER, 30)).exit_code == 0
        await sandbox.run("mkdir /tmp/tests; cp /grader/test.sh /tmp/tests; bash /tmp/tests/test.sh; sleep 0.2", 30)
    finally:
        await sandbox.close()
    return float((logs / "reward.txt").read_text().strip() or 0)


async def rewards(way, provider, folder: Path, count: int, at_once: int = 2) -> list[float]:
    task = make_task(folder / "task")
    gate = asyncio.Semaphore(at_once)

    async def one(number):
        async with gate:
            (folder / str(number)).mkdir()
            return await way(provider, task, folder / str(number))

    return await asyncio.gather(*(one(number) for number in range(count)))
