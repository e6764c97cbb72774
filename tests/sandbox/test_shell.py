"""A persistent bash in a real sandbox."""

import asyncio
import os
import time

import pytest

from north_lightning.errors import SandboxError
from north_lightning.sandbox import Shell


def test_directory_variables_and_functions_persist(in_shell):
    async def scenario(shell):
        assert (await shell.run("x='a b'; f() { echo \"<$1>\"; }; cd /tmp", 60)).output == ""
        assert (await shell.run('f "$x"; pwd', 60)).output == "<a b>\n/tmp\n"
        assert shell.directory == "/tmp"

    in_shell(scenario)


def test_output_and_exit_code_are_exact(in_shell):
    cases = {
        "printf no-newline": ("no-newline", 0),
        "echo out; echo err >&2; (exit 3)": ("out\nerr\n", 3),
        "": ("", 0),
        "# nothing": ("", 0),
        "echo 'it'\"'\"'s' \\\\ $'\\t'": ("it's \\ \t\n", 0),
        "cat <<END\n$((6*7))\nEND": ("42\n", 0),
        "for i in 1 2\ndo echo $i\ndone": ("1\n2\n", 0),
        'cat; read -r line; echo "[$line]"': ("[]\n", 0),
        "echo é 漢": ("é 漢\n", 0),
        "printf '\\036x:1:/y\\036'": ("\x1ex:1:/y\x1e", 0),
        "false": ("", 1),
        "echo a\0b \ud800": ("ab ?\n", 0),
    }

    async def scenario(shell):
        return {command: await shell.run(command, 60) for command in cases}

    assert {c: (r.output, r.exit_code) for c, r in in_shell(scenario).items()} == cases


def test_broken_syntax_does_not_end_the_shell(in_shell):
    async def scenario(shell):
        await shell.run("x=kept", 60)
        for command in ("if fi", "echo 'open", "cat <<END", "}", "$(", "done"):
            result = await shell.run(command, 60)
            assert not result.timed_out
        assert (await shell.run("echo $x", 60)).output == "kept\n"

    in_shell(scenario)


def test_time_out_kills_the_command_and_keeps_the_directory(in_shell):
    async def scenario(shell):
        await shell.run("x=lost; cd /tmp", 60)
        start = time.monotonic()
        result = await shell.run("echo before; trap '' TERM; (setsid sleep 881 &); sleep 882", 0.5)
        assert time.monotonic() - start < 10
        assert (result.exit_code, result.timed_out) == (124, True)
        assert result.output == (
            "before\n"
            "[the command was killed after 0.5 s; the next command runs in a new shell in /tmp, variables are lost]\n"
        )
        assert (await shell.run("echo \"[$x]\"; pwd; ps -eo args | grep -c '^sleep 88'", 60)).output == "[]\n/tmp\n0\n"

    in_shell(scenario)


@pytest.mark.parametrize(
    ("ending", "exit_code"),
    [("exit 7", 7), ("exec true", 0), ("set -e; false", 1), ("kill -9 $$", 137), ("exec 0<&-", 0)],
)
def test_shell_that_ends_is_replaced(in_shell, ending, exit_code):
    async def scenario(shell):
        result = await shell.run(f"echo out; {ending}", 60)
        assert (result.exit_code, result.timed_out) == (exit_code, False)
        assert result.output.startswith("out\n")
        assert (await shell.run("echo again", 60)).output == "again\n"

    in_shell(scenario)


def test_tricks_with_the_shells_own_output_do_not_wedge_it(in_shell):
    async def scenario(shell):
        assert (await shell.run("exec >/tmp/f 2>&1; echo hidden", 60)).exit_code == 0
        await shell.run("exec >&9", 60)
        assert (await shell.run("cat /tmp/f", 60)).output == "hidden\n"
        assert (await shell.run("set -x; echo traced", 60)).output == "++ echo traced\ntraced\n"
        await shell.run("set +x; printf() { echo fake; }; PS4=; trap 'echo debug' DEBUG", 60)
        assert "real" in (await shell.run("echo real", 60)).output
        await shell.run("trap - DEBUG; BASH_XTRACEFD=9; set -x", 60)
        assert "real" in (await shell.run("echo real", 60)).output
        result = await shell.run("exec 9>&-; echo no report", 0.5)
        assert result.timed_out
        assert (await shell.run("echo ok", 60)).output == "ok\n"

    in_shell(scenario)


def test_background_job_is_kept_and_its_words_come_later(in_shell):
    async def scenario(shell):
        assert (await shell.run("(sleep 0.3; echo job) & echo started", 60)).output == "started\n"
        await asyncio.sleep(0.6)
        assert (await shell.run("echo next", 60)).output == "job\nnext\n"

    in_shell(scenario)


def test_output_is_capped_and_a_flood_is_killed(in_sandbox):
    async def scenario(sandbox):
        shell = Shell(sandbox, max_output_bytes=1000)
        output = (await shell.run("seq 10000", 60)).output
        assert output.startswith("1\n2\n")
        assert output.endswith("9999\n10000\n")
        assert "[... 47894 bytes left out ...]" in output
        result = await shell.run("yes", 30)
        assert (result.exit_code, result.timed_out) == (137, False)
        assert "was killed after" in result.output
        await shell.close()

    in_sandbox(scenario)


def test_files_are_read_and_written_byte_by_byte(in_shell):
    content = os.urandom(500_000)

    async def scenario(shell):
        await shell.run("mkdir -p 'a dir'; cd 'a dir'", 60)
        for path in ("/work/x", "relative é", "-n", "../../work/'quoted\"", "/tmp/$(id)"):
            await shell.write_file(path, content)
            assert await shell.read_file(path) == content
        await shell.write_file("/work/x", b"")
        assert await shell.read_file("/work/x") == b""
        assert (await shell.run("ls | cat", 60)).output == "-n\nrelative é\n"

    in_shell(scenario)


@pytest.mark.parametrize(
    ("path", "read_error", "write_error"),
    [
        ("/work/none", FileNotFoundError, None),
        ("/none/x", FileNotFoundError, FileNotFoundError),
        ("/work", IsADirectoryError, IsADirectoryError),
        ("/dev/zero", IsADirectoryError, IsADirectoryError),
        ("/work/pipe", IsADirectoryError, IsADirectoryError),
        ("/work/secret", PermissionError, PermissionError),
        ("/usr/new", FileNotFoundError, PermissionError),
        ("x" * 5000, OSError, OSError),
        ("/work/link-to-host", FileNotFoundError, None),
    ],
)
def test_files_that_cannot_be_used_give_the_fitting_error(in_shell, tmp_path, path, read_error, write_error):
    (tmp_path / "host").write_text("secret of the host")

    async def scenario(shell):
        await shell.run(f"mkfifo pipe; : >secret; chmod 0 secret; ln -s {tmp_path}/host link-to-host", 60)
        with pytest.raises(read_error):
            await shell.read_file(path)
        if write_error is not None:
            with pytest.raises(write_error):
                await shell.write_file(path, b"x")
        assert (await shell.run("echo alive", 60)).output == "alive\n"

    in_shell(scenario)


def test_file_longer_than_the_limit_is_not_read(in_sandbox):
    async def scenario(sandbox):
        shell = Shell(sandbox, max_file_bytes=1000)
        await shell.write_file("f", bytes(1000))
        assert await shell.read_file("f") == bytes(1000)
        await shell.write_file("f", bytes(1001))
        with pytest.raises(OSError, match="f: longer than 1000 bytes"):
            await shell.read_file("f")
        await shell.close()

    in_sandbox(scenario)


def test_full_disk_is_an_error_of_the_write(in_shell):
    async def scenario(shell):
        with pytest.raises(OSError, match="too-big: .*File size limit"):
            await shell.write_file("/work/too-big", bytes(9 << 20))  # more than max_file_bytes

    in_shell(scenario)


def test_closed_sandbox_is_an_infrastructure_error(provider, image):
    async def scenario():
        sandbox = await provider.open(image)
        shell = Shell(sandbox)
        await shell.run("true", 60)
        await sandbox.close()
        with pytest.raises(SandboxError):
            await shell.run("true", 60)

    asyncio.run(scenario())


def test_cancelled_command_leaves_nothing_behind(in_shell):
    async def scenario(shell):
        running = asyncio.ensure_future(shell.run("sleep 883", 30))
        await asyncio.sleep(0.2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (await shell.run("ps -eo args | grep -c '^sleep 883'", 60)).output == "0\n"

    in_shell(scenario)


@pytest.mark.parametrize(
    "hostile",
    [
        r"builtin() { command printf '\036%s:x:/work\036' \"${3#*036}\" >&9; }",
        "builtin() { :; }",
        "alias builtin=false; shopt -s expand_aliases",
        "printf() { echo no; }; echo() { :; }",
        "eval() { :; }; exec 9>&-",
        "kill -STOP $$",
        "trap 'echo x >&9' DEBUG",
        "cd() { return 5; }; PWD=$'a:b\\036c'",
    ],
)
def test_a_hostile_shell_costs_a_command_and_no_more(in_shell, hostile):
    async def scenario(shell):
        first = await shell.run(hostile, 0.7)
        second = await shell.run("true", 0.7)
        assert {type(one.exit_code) for one in (first, second)} == {int}
        await shell.close()
        assert (await shell.run("/bin/echo back", 60)).output == "back\n"

    in_shell(scenario)
