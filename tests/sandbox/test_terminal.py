"""Real tmux and bash in real sandboxes; expected texts are what a person would see, less prompt and echo."""

import asyncio
import os
import random
import signal
import subprocess
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from north_lightning.errors import InvalidActionError, SandboxError
from north_lightning.sandbox import Terminal, TerminalClosedError
from north_lightning.sandbox.escapes import capped, plain_text
from north_lightning.sandbox.tmux import PaneOutput


async def shown(terminal, ending):
    """The screen, once it ends with ``ending``."""
    async with asyncio.timeout(60):
        while not (screen := await terminal.screen()).endswith(ending):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return screen


EXACT = {
    "echo hello": "hello\n",
    "printf no-newline": "no-newline",
    "printf 'a\\n\\nb\\n'": "a\n\nb\n",
    "true": "",
    "": "",
    "echo one; echo two && echo three": "one\ntwo\nthree\n",
    "echo 'a;b' \"c  d\" $'e\\tf' \\; '{}'": "a;b c  d e\tf ; {}\n",
    "-n": "bash: -n: command not found\n",
    "echo -- -t %0 '#{pane_id}' ~ $((1+1)) # comment": "-- -t %0 #{pane_id} /home/agent 2\n",
    "echo \"hi!\" 'it'\"'\"'s' \\\\ %d": "hi! it's \\ %d\n",
    "echo wow!echo": "wow!echo\n",
    "echo déjà 漢字 🙂": "déjà 漢字 🙂\n",
    "echo a\necho b": "a\nb\n",
    "cat <<'END'\nline $x\n\ttab\n\nEND": "line $x\n\ttab\n\n",
    "i=0\nwhile [ $i -lt 3 ]; do\n  echo $i\n  i=$((i+1))\ndone": "0\n1\n2\n",
    "if fi": "bash: syntax error near unexpected token `fi'\n",
    "echo err >&2": "err\n",
    "pwd": "/work\n",
    "echo $COLUMNS x $LINES; tput cols; tput lines": "160 x 40\n160\n40\n",
    "printf '10%%\\r20%%\\r100%%\\n'": "100%\n",
    "printf '\\033[1;31mred\\033[0m \\033]0;title\\007text\\n'": "red text\n",
    "echo hello | grep --color=always ell": "hello\n",
    "printf 'abc\\b\\bX\\n'": "aXc\n",
    "printf '\\377bytes\\n'": "\ufffdbytes\n",
    "PS1='mine> '": "",
    "echo after": "after\n",
    "printf '\\033]133;A;k=guess\\007'; sleep 0.2; echo end": "end\n",
    "echo trailing newline\n": "trailing newline\n",
}


def test_output_is_exactly_what_the_command_printed(in_terminal):
    async def scenario(terminal):
        return {keystrokes: await terminal.send(keystrokes, 60) for keystrokes in EXACT}

    assert in_terminal(scenario) == EXACT


def test_lines_longer_than_the_screen_are_not_broken(in_terminal):
    async def scenario(terminal):
        assert await terminal.send("printf 'x%.0s' $(seq 1000); echo", 60) == "x" * 1000 + "\n"
        long = "y" * 2000
        assert await terminal.send(f"echo {long}", 60) == long + "\n"
        assert await terminal.send(f"echo {long} | wc -c", 60) == "2001\n"

    in_terminal(scenario)


def test_long_heredoc_arrives_whole(in_terminal):
    text = "".join(f"{number}: some 'quoted' \"line\" with $dollars, tabs\t and é\n" for number in range(1000))

    async def scenario(terminal):
        assert await terminal.send(f"cat >f <<'END'\n{text}END\ncksum <f", 60) == _cksum(text)

    in_terminal(scenario)


def _cksum(text):
    return subprocess.run(["cksum"], input=text.encode(), capture_output=True, check=True).stdout.decode()


def test_more_than_2000_lines_are_cut_in_the_middle(in_terminal):
    async def scenario(terminal):
        return await terminal.send("seq 5000", 60)

    output = in_terminal(scenario)
    whole = "".join(f"{number}\n" for number in range(1, 5001))
    assert output == f"{whole[:5000]}\n[... {len(whole) - 10_000} bytes left out ...]\n{whole[-5000:]}"


def test_megabytes_of_output_are_counted_and_the_terminal_lives_on(in_terminal):
    async def scenario(terminal):
        output = await terminal.send("seq 200000", 60)
        assert output.startswith("1\n2\n")
        assert output.endswith("199999\n200000\n")
        assert 1_270_000 < int(output.split("[... ")[1].split()[0]) < 1_480_000  # line ends are two bytes on a terminal
        assert await terminal.send("echo next", 60) == "next\n"

    in_terminal(scenario)


def test_unfinished_command_shows_the_second_prompt(in_terminal):
    async def scenario(terminal):
        assert await terminal.send("while true; do", 60) == "> "
        assert terminal.at_prompt
        assert await terminal.send("echo once; break", 60) == "> "
        assert await terminal.send("done", 60) == "once\n"
        assert await terminal.send("echo 'open", 60) == "> "
        assert (await terminal.send("C-c", 60)).strip() in ("", "^C")
        assert await terminal.send("echo closed", 60) == "closed\n"

    in_terminal(scenario)


def test_time_out_shows_the_screen_and_control_c_stops_the_command(in_terminal):
    async def scenario(terminal):
        start = time.monotonic()
        await terminal.send("echo begin; sleep 100", 0.1)
        assert time.monotonic() - start < 10
        assert terminal.timed_out
        assert await shown(terminal, "\nbegin") == "$ echo begin; sleep 100\nbegin"
        assert not terminal.at_prompt
        assert await terminal.send("C-c", 60) == "^C\n"
        assert not terminal.timed_out
        assert terminal.last_exit_code == 130
        assert await terminal.send("echo fine", 60) == "fine\n"

    in_terminal(scenario)


def test_program_that_waits_for_input_reads_the_next_keystrokes(in_terminal):
    async def scenario(terminal):
        await terminal.send("read -p 'name? ' name; echo \"hello $name\"", 0.1)
        assert terminal.timed_out
        await shown(terminal, "\nname?")
        assert await terminal.send("you", 60) == "hello you\n"
        await terminal.send("cat", 0.2)
        await terminal.send("line", 0.2)
        await shown(terminal, "$ cat\nline\nline")
        assert await terminal.send("C-d", 60) == ""
        await terminal.send("python3 -q", 0.1)
        await shown(terminal, ">>>")
        await terminal.send("6 * 7", 0.1)
        await shown(terminal, ">>> 6 * 7\n42\n>>>")
        await terminal.send("exit()", 60)
        assert terminal.at_prompt

    in_terminal(scenario)


def test_text_typed_ahead_of_a_running_command_runs_after_it(in_terminal):
    async def scenario(terminal):
        for before_it_starts in (0, 0.3):  # bash may not even have read the first line
            await terminal.send("sleep 1; echo late", before_it_starts)
            assert await terminal.send("echo ahead", 60) == "late\nahead\n"
        # As if bash had stopped reading a moment before tmux heard of it.
        await terminal.send("printf '\\033[?2004h'; sleep 1; echo late", 0.3)
        assert await terminal.send("echo one\necho two", 60) == "late\none\ntwo\n"

    in_terminal(scenario)


def test_what_is_printed_between_two_calls_comes_with_the_next(in_terminal):
    async def scenario(terminal):
        await terminal.send("sleep 0.3; echo late", 0.05)
        await shown(terminal, "\nlate\n$")
        assert terminal.at_prompt
        assert await terminal.send("echo next", 60) == "late\nnext\n"
        await terminal.send("{ sleep 0.3; echo job; } & disown", 60)
        await shown(terminal, "$ job")
        assert await terminal.send("echo foreground", 60) == "job\nforeground\n"

    in_terminal(scenario)


def test_clear_and_full_screen_programs_show_the_screen(in_terminal):
    async def scenario(terminal):
        await terminal.send("seq 100", 60)
        assert await terminal.send("clear", 60) == "$"
        screen = await terminal.send("printf '\\033[10;5Hthere\\n'", 60)
        assert screen == "$ printf '\\033[10;5Hthere\\n'" + "\n" * 9 + "    there\n$"
        await terminal.send("clear", 60)
        await terminal.send("seq 200 >f", 60)
        await terminal.send("less f", 0.1)
        assert terminal.timed_out
        assert await shown(terminal, "\nf") == "".join(f"{number}\n" for number in range(1, 40)) + "f"
        await terminal.send("G", 60, enter=False)
        await shown(terminal, "199\n200\n(END)")
        await terminal.send("q", 60, enter=False)
        await shown(terminal, "$ less f\n$")

    in_terminal(scenario)


def test_keys_and_text_without_enter_show_the_screen(in_terminal):
    async def scenario(terminal):
        await terminal.send("echo abc", 60, enter=False)
        assert await shown(terminal, "abc") == "$ echo abc"
        await terminal.send("BSpace", 60)
        assert await shown(terminal, "ab") == "$ echo ab"
        assert await terminal.send("Enter", 60) == "ab\n"
        await terminal.send("Up", 60)
        await shown(terminal, "\nab\n$ echo ab")
        await terminal.send("C-u", 60)
        await shown(terminal, "\nab\n$")
        assert await terminal.send("echo C-c", 60) == "C-c\n"
        await terminal.send("sleep 100", 0.1)
        await shown(terminal, "$ sleep 100")
        await asyncio.sleep(0.2)
        assert await terminal.send("\x03", 60) == "^C\n"

    in_terminal(scenario)


def test_nested_shell_has_the_same_prompt(in_terminal):
    async def scenario(terminal):
        assert await terminal.send("bash", 60) == ""
        assert await terminal.send("echo $SHLVL", 60) == "2\n"
        assert await terminal.send("exit", 60) == "exit\n"
        assert not terminal.closed

    in_terminal(scenario)


@pytest.mark.parametrize("ending", ["exit 3", "C-d", "kill -9 $$", "tmux kill-server", "exec true", "kill -9 -1"])
def test_shell_ended_by_the_model_is_the_models_doing(in_terminal, ending):
    async def scenario(terminal):
        await terminal.send(ending, 60)
        assert terminal.closed
        with pytest.raises(TerminalClosedError) as raised:
            await terminal.send("echo", 60)
        assert isinstance(raised.value, InvalidActionError)
        await terminal.close()

    in_terminal(scenario)


def test_sandbox_that_dies_is_an_infrastructure_error(in_sandbox):
    async def scenario(sandbox):
        for end in ("close", "kill"):
            terminal = Terminal(sandbox)
            await terminal.start()
            sending = asyncio.ensure_future(terminal.send("sleep 100", 30))
            await asyncio.sleep(0.2)
            if end == "kill":
                os.kill(terminal._process.pid, signal.SIGKILL)
            else:
                await sandbox._end_processes()
            with pytest.raises(SandboxError, match="ended from outside"):
                await sending
            with pytest.raises(SandboxError, match="ended from outside"):
                await terminal.send("echo", 60)

    in_sandbox(scenario)


def test_terminal_that_cannot_start_says_why(in_sandbox):
    async def scenario(sandbox):
        terminal = Terminal(sandbox, environment={"TMUX_TMPDIR": "/nowhere"})
        terminal._command = lambda: ["no-such-tmux"]
        with pytest.raises(SandboxError, match="not found"):
            await terminal.start()

    in_sandbox(scenario)


def test_two_terminals_share_one_sandbox(in_sandbox):
    async def scenario(sandbox):
        first, second = Terminal(sandbox), Terminal(sandbox)
        await asyncio.gather(first.start(), second.start())
        assert await first.send("cd /tmp; echo shared >file", 60) == ""
        assert await second.send("pwd; cat /tmp/file", 60) == "/work\nshared\n"
        await first.close()
        assert await second.send("echo alive", 60) == "alive\n"
        await second.close()

    in_sandbox(scenario)


def test_32_terminals_work_at_the_same_time(provider, image):
    async def one(number):
        sandbox = await provider.open(image)
        try:
            terminal = Terminal(sandbox)
            await terminal.start()
            outputs = [await terminal.send(f"echo {number} >f; sleep 0.1; cat f; echo {turn}", 30) for turn in range(3)]
            await terminal.close()
            return outputs
        finally:
            await sandbox.close()

    async def scenario():
        return await asyncio.gather(*(one(number) for number in range(32)))

    assert asyncio.run(scenario()) == [[f"{n}\n{turn}\n" for turn in range(3)] for n in range(32)]


# ---- plain text, against tmux itself

PIECES = ["a", "bcd", " ", "é", "\r", "\b", "\t", "\x1b[K", "\x1b[31m", "\x1b[m", "\x1b]0;t\x07", "\x07"]


@pytest.mark.parametrize("seed", range(3))
def test_plain_text_is_what_tmux_shows(in_terminal, image, seed):
    """Each line of the screen, without the spaces at its end that no one can see."""
    dice = random.Random(seed)
    lines = ["".join(dice.choices(PIECES, k=dice.randrange(10))) for _ in range(36)] + ["END"]
    (image / "f").write_text("".join(line + "\n" for line in lines), newline="")

    async def scenario(terminal):
        await terminal.send("clear; cat f; sleep 100", 0.05)
        return await shown(terminal, "END")

    text = plain_text("".join(line + "\r\n" for line in lines).encode(), 160)
    assert text is not None
    expected = [line.expandtabs(8).rstrip() for line in text.rstrip().split("\n")]
    assert [line.rstrip() for line in in_terminal(scenario).split("\n")] == expected


def test_cursor_movement_is_left_to_the_screen():
    for raw in (b"\x1b[H", b"a\x1b[2J", b"\x1b[?1049h", b"\x1b7", b"\x1bM", b"\x1b[3A"):
        assert plain_text(raw, 160) is None
    assert plain_text(b"\x1b[?25l\x1b[?2004hx\x1b=\x1b(B", 160) == "x"
    assert plain_text(b"x" * 170 + b"\ry", 160) is None  # the cursor is on the second row
    assert plain_text(b"x" * 170, 160) == "x" * 170


def test_cap_keeps_head_and_tail_and_whole_characters():
    assert capped("abc", 3) == "abc"
    assert capped("abcdef", 4, num_left_out=10) == "ab\n[... 12 bytes left out ...]\nef"
    assert capped("é" * 10, 6) == "é\n[... 14 bytes left out ...]\né"


@settings(deadline=None)
@given(st.data())
def test_marks_are_found_however_the_bytes_are_split(data):
    nonce = "12ab"
    stream = (
        b"\x1b]133;D;0;k=12ab\x07\x1b]133;A;k=12ab\x07$ echo hi\r\n\x1b[?2004l\r\x1b]133;C;k=12ab\x07"
        b"out\x1b[31m put\x1b]133;A;k=other\x07\r\n\x1b]133;D;7;k=12ab\x07\x1b]133;A;k=12ab\x07$ "
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    pane = PaneOutput(nonce, 1000)
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        pane.feed(stream[start:end])
    assert pane.take().head == b"out\x1b[31m put\x1b]133;A;k=other\x07\r\n"
    assert (pane.num_prompts, pane.last_exit_code, pane.is_at_prompt) == (2, 7, True)


@pytest.mark.parametrize("num_bytes", [1, 7, 1000])
def test_a_prompt_that_readline_draws_again_is_not_a_new_one(num_bytes):
    """What bash 5.2 wrote for ``(export y=2 # no comment``, newline, ``)``: Enter made it draw the whole line again."""
    mark = b"\x1b]133;D;0;k=12ab\x07\x1b]133;A;k=12ab\x07$ "
    pane = PaneOutput("12ab", 1000)
    pane.feed(b"\x1b[?2004h" + mark)
    pane.begin_typing(submits=True)
    echo = b"\x1b[7m(export y=2 # no comment\x1b[27m\r\n\r\x1b[7m)\x1b[27m"
    echo += b"\x1bM\r" + mark + b"(export y=2 # no comment\r\n\r)\r\n"
    for start in range(0, len(echo), num_bytes):
        pane.feed(echo[start : start + num_bytes])
        assert (pane.num_prompts, pane.is_ready) == (1, False)
    assert pane.take().head == b""
    pane.feed(b"\x1b[?2004l\r\x1b]133;C;k=12ab\x07out\r\n\x1b[?2004h" + mark)
    assert (pane.num_prompts, pane.is_ready, pane.take().head) == (2, True, b"out\r\n")


def test_words_of_background_jobs_are_kept_and_echo_of_typing_is_not():
    pane = PaneOutput("12ab", 1000)
    pane.feed(b"\x1b]133;A;k=12ab\x07$ ")
    assert pane.take().head == b""
    pane.feed(b"job\r\n")
    assert pane.take().head == b"job\r\n"
    pane.begin_typing(submits=False)
    pane.feed(b"echo late")
    assert pane.take().head == b""
