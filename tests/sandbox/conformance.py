"""What every sandbox does, whatever isolates it: forty cases, written once.

Each is a coroutine that takes a ``World`` and fails by an assertion. ``run_cases`` runs them all on one provider.
"""

import asyncio
import contextlib
import os
import stat
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest

from north_lightning.errors import SandboxError, TreeTooLargeError
from north_lightning.interfaces import SandboxProvider
from north_lightning.sandbox import Shell, Terminal

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@dataclass
class World:
    """A provider (64 MiB of files, 5000 files, 8 MiB a file, 64 processes), and a folder for each case."""

    provider: SandboxProvider
    folder: Path

    @property
    def image(self):
        image = self.folder / "image"
        image.mkdir(exist_ok=True)
        return image

    @contextlib.asynccontextmanager
    async def sandbox(self, **mounts):
        sandbox = await self.provider.open(self.image, **mounts)
        try:
            yield sandbox
        finally:
            await sandbox.close()

    async def output(self, command, timeout_s=30.0):
        async with self.sandbox() as sandbox:
            return (await sandbox.run(command, timeout_s)).output


async def run_cases(provider, folder, cases=CASES, at_once=4):
    """The traceback of every case that failed, by name."""
    failed = {}
    gate = asyncio.Semaphore(at_once)

    async def one(name, function):
        async with gate:
            own = folder / name
            own.mkdir()
            try:
                async with asyncio.timeout(120):
                    await function(World(provider, own))
            except Exception:
                failed[name] = traceback.format_exc()

    await asyncio.gather(*(one(*item) for item in cases.items()))
    return failed


def processes_with(text):
    """Host pids whose command line contains ``text``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def resident_bytes(pid):
    """Memory that the process of this host pid holds; 0 once it has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


# ---- commands


@case
async def a_command_runs_in_work(world):
    assert await world.output("pwd") == "/work\n"


@case
async def stderr_joins_stdout_in_order(world):
    assert await world.output("echo a; echo b >&2; echo c") == "a\nb\nc\n"


@case
async def the_exit_code_is_the_commands(world):
    async with world.sandbox() as sandbox:
        assert (await sandbox.run("exit 3", 30)).exit_code == 3


@case
async def a_signal_is_128_and_its_number(world):
    async with world.sandbox() as sandbox:
        assert (await sandbox.run("kill -TERM $$; sleep 5", 30)).exit_code == 143


@case
async def a_killed_command_is_137_and_no_failure_of_the_sandbox(world):
    async with world.sandbox() as sandbox:
        assert (await sandbox.run("kill -9 $$", 30)).exit_code == 137


@case
async def a_syntax_error_is_the_commands(world):
    async with world.sandbox() as sandbox:
        assert (await sandbox.run("echo 'open", 30)).exit_code == 2


@case
async def a_command_has_no_input(world):
    assert await world.output("cat; echo end") == "end\n"


@case
async def bytes_that_are_no_text_are_replaced(world):
    assert await world.output("printf '\\377ok'") == "\ufffdok"


@case
async def text_that_no_program_can_be_given_is_not_a_crash(world):
    assert await world.output("echo a\0b \ud800") == "ab ?\n"


@case
async def a_command_of_300_kilobytes_arrives_whole(world):
    assert await world.output("cat <<'END' | wc -c\n" + "x" * 300_000 + "\nEND\n") == "300001\n"


@case
async def output_without_a_newline_is_kept(world):
    assert await world.output("printf x") == "x"


@case
async def the_environment_is_small_and_says_where_home_is(world):
    words = dict(line.split("=", 1) for line in (await world.output("env")).splitlines())
    assert words["HOME"] == "/home/agent"
    assert words["LANG"] == "C.UTF-8"
    assert len(words) < 20


@case
async def bash_is_the_shell(world):
    assert await world.output("a=(1 2 3); echo ${#a[@]}") == "3\n"


# ---- files


@case
async def work_is_a_copy_of_the_image(world):
    (world.image / "a").write_text("original\n")
    assert await world.output("cat a; echo changed >a; cat a") == "original\nchanged\n"
    assert (world.image / "a").read_text() == "original\n"


@case
async def modes_and_links_of_the_image_are_kept(world):
    (world.image / "run.sh").write_text("#!/bin/sh\necho ran\n")
    (world.image / "run.sh").chmod(0o755)
    (world.image / "link").symlink_to("run.sh")
    assert await world.output("./run.sh; readlink link") == "ran\nrun.sh\n"


@case
async def files_belong_to_the_user(world):
    (world.image / "d").mkdir()
    (world.image / "d" / "f").write_text("x")
    assert await world.output('find . ! -user "$(id -u)" | wc -l; echo y >>d/f; cat d/f') == "0\nxy\n"


@case
async def files_of_one_command_are_seen_by_the_next(world):
    async with world.sandbox() as sandbox:
        await sandbox.run("echo w >/work/f; echo t >/tmp/f; echo h >~/f", 30)
        assert (await sandbox.run("cat /work/f /tmp/f ~/f", 30)).output == "w\nt\nh\n"


@case
async def two_sandboxes_share_nothing(world):
    async with world.sandbox() as first, world.sandbox() as second:
        await first.run("echo x >/work/f; echo x >/tmp/f", 30)
        assert (await second.run("ls /work /tmp", 30)).output == "/tmp:\n\n/work:\n"


@case
async def a_read_only_mount_is_read_only(world):
    tests = world.folder / "tests"
    tests.mkdir()
    (tests / "t").write_text("expected\n")
    async with world.sandbox(read_only={"/tests": tests}) as sandbox:
        result = await sandbox.run("cat /tests/t; touch /tests/x", 30)
    assert result.output.startswith("expected\n")
    assert result.exit_code == 1
    assert os.listdir(tests) == ["t"]


@case
async def one_file_can_be_mounted(world):
    (world.folder / "one").write_text("1\n")
    async with world.sandbox(read_only={"/grader/one": world.folder / "one"}) as sandbox:
        assert (await sandbox.run("cat /grader/one; echo 2 >/grader/one", 30)).output.startswith("1\n")
    assert (world.folder / "one").read_text() == "1\n"


@case
async def a_writable_mount_keeps_what_is_written(world):
    logs = world.folder / "logs"
    logs.mkdir()
    async with world.sandbox(writable={"/logs/verifier": logs}) as sandbox:
        assert (await sandbox.run("echo 1 >/logs/verifier/reward.txt", 30)).exit_code == 0
    assert (logs / "reward.txt").read_text() == "1\n"


@case
async def a_mount_needs_an_absolute_path(world):
    with pytest.raises(ValueError, match="absolute path inside the sandbox, got 'tests'"):
        await world.provider.open(world.image, read_only={"tests": world.image})


@case
async def a_missing_image_is_a_sandbox_error(world):
    with pytest.raises(SandboxError):
        await world.provider.open(world.folder / "nowhere")


# ---- snapshots


@case
async def a_snapshot_copies_links_as_links_and_leaves_special_files_out(world):
    async with world.sandbox() as sandbox:
        await sandbox.run("ln -s /etc/passwd link; ln -s / root; mkfifo pipe; mkdir d; echo x >d/f", 30)
        await sandbox.snapshot(world.folder / "copy")
    copy = world.folder / "copy"
    assert sorted(os.listdir(copy)) == ["d", "link", "root"]
    assert os.readlink(copy / "link") == "/etc/passwd"
    assert (copy / "d" / "f").read_text() == "x\n"


@case
async def a_snapshot_ends_every_process_first(world):
    async with world.sandbox() as sandbox:
        writer = await sandbox.spawn(["bash", "-c", "echo early >late; echo up; while :; do echo late >>late; done"])
        assert await writer.stdout.readline() == b"up\n"
        await sandbox.snapshot(world.folder / "copy")
        assert writer.returncode is not None
        assert (await sandbox.run("wc -c <late", 30)).output.strip() == str((world.folder / "copy/late").stat().st_size)


@case
async def a_snapshot_drops_set_user_id_bits(world):
    async with world.sandbox() as sandbox:
        await sandbox.run("echo >s; chmod 6755 s", 30)
        await sandbox.snapshot(world.folder / "copy")
    assert stat.S_IMODE((world.folder / "copy" / "s").stat().st_mode) == 0o755


@case
async def a_snapshot_that_outgrows_a_sandbox_is_the_attempts_failure(world):
    async with world.sandbox() as sandbox:
        await sandbox.run("head -c 8000000 /dev/zero >f; for i in $(seq 20); do ln f f$i; done", 30)
        with pytest.raises(TreeTooLargeError):
            await sandbox.snapshot(world.folder / "copy")


@case
async def a_snapshot_is_the_image_of_the_next_sandbox(world):
    async with world.sandbox() as sandbox:
        await sandbox.run("mkdir -p a/b; echo x >a/b/c; chmod 700 a", 30)
        await sandbox.snapshot(world.folder / "copy")
    second = await world.provider.open(world.folder / "copy")
    try:
        assert (await second.run("cat a/b/c", 30)).output == "x\n"
    finally:
        await second.close()


# ---- time and processes


@case
async def a_time_out_is_124_and_keeps_the_output(world):
    async with world.sandbox() as sandbox:
        start = time.monotonic()
        result = await sandbox.run("echo before; sleep 100", 1.0)
        assert (result.output, result.exit_code, result.timed_out) == ("before\n", 124, True)
        assert time.monotonic() - start < 20


@case
async def a_time_out_kills_inside(world):
    async with world.sandbox() as sandbox:
        await sandbox.run("sleep 8801 & (setsid sleep 8802 &); trap '' TERM INT; sleep 8803", 1.0)
        assert not [pid for seconds in (8801, 8802, 8803) for pid in processes_with(f"sleep\0{seconds}")]


@case
async def a_sandbox_lives_on_after_a_time_out(world):
    async with world.sandbox() as sandbox:
        await sandbox.run("echo kept >f; sleep 100", 1.0)
        assert (await sandbox.run("cat f", 30)).output == "kept\n"


@case
async def background_processes_end_with_their_command(world):
    async with world.sandbox() as sandbox:
        await sandbox.run("setsid nohup sleep 8804 >/dev/null 2>&1 & disown", 30)
        assert not processes_with("sleep\x008804")


@case
async def output_is_capped_in_the_middle_and_says_so(world):
    output = await world.output("echo first; head -c 5000000 /dev/zero | tr '\\0' x; echo; echo last")
    assert output.startswith("first\nxxx")
    assert output.endswith("xxx\nlast\n")
    assert f"\n[... {5_000_012 - (1 << 20)} bytes left out ...]\n" in output


@case
async def a_program_talks_over_pipes(world):
    async with world.sandbox() as sandbox:
        process = await sandbox.spawn(["bash", "-c", 'read a; echo "<$a>"; cat; exit 5'])
        output, _ = await process.communicate(b"hello\nmore")
        assert output == b"<hello>\nmore"
        assert await process.wait() == 5


@case
async def a_killed_program_is_gone_when_wait_returns(world):
    async with world.sandbox() as sandbox:
        process = await sandbox.spawn(["bash", "-c", "setsid sleep 8805 & echo up; wait"])
        assert await process.stdout.readline() == b"up\n"
        process.kill()
        await process.wait()
        assert process.was_killed
        assert not processes_with("sleep\x008805")


@case
async def a_shell_keeps_its_directory_and_variables(world):
    async with world.sandbox() as sandbox:
        shell = Shell(sandbox)
        await shell.run("cd /tmp; x=3", 30)
        assert (await shell.run("echo $x $PWD", 30)).output == "3 /tmp\n"
        await shell.write_file("f", bytes(range(256)))
        assert await shell.read_file("f") == bytes(range(256))
        await shell.close()


@case
async def a_terminal_works(world):
    async with world.sandbox() as sandbox:
        terminal = Terminal(sandbox)
        await terminal.start()
        assert await terminal.send("cd /tmp; echo $COLUMNS x $LINES", 30) == "160 x 40\n"
        assert await terminal.send("pwd", 30) == "/tmp\n"
        await terminal.send("sleep 100", 0.3)
        assert terminal.timed_out
        assert await terminal.send("C-c", 30) == "^C\n"
        assert await terminal.send("echo déjà", 30) == "déjà\n"
        await terminal.close()


@case
async def a_terminal_whose_shell_the_model_ends_is_closed(world):
    async with world.sandbox() as sandbox:
        terminal = Terminal(sandbox)
        await terminal.start()
        await terminal.send("exit 3", 30)
        assert terminal.closed
        assert not terminal._sandbox_died()
        await terminal.close()


@case
async def closing_twice_is_fine_and_then_nothing_runs(world):
    sandbox = await world.provider.open(world.image)
    await sandbox.spawn(["sleep", "8806"])
    await sandbox.close()
    await sandbox.close()
    assert not processes_with("sleep\x008806")
    with pytest.raises(SandboxError, match="closed"):
        await sandbox.run("true", 30)


@case
async def eight_commands_run_at_the_same_time(world):
    async with world.sandbox() as sandbox:
        results = await asyncio.gather(*(sandbox.run(f"sleep 0.2; echo {n}", 60) for n in range(8)))
        assert [result.output for result in results] == [f"{n}\n" for n in range(8)]
