"""A real terminal (tmux, 160x40) in a sandbox, for a model that types and reads.

In: keystrokes. Out: what a command newly printed, as plain text, or the screen where that is what counts. One tmux in
control mode serves all of an attempt: no process per action. Bash announces its prompts and the start and end of
commands by shell integration sequences (OSC 133, with a number that is new for every terminal), so nothing polls and no
stale command can be taken for a finished one. Does not know tools, tasks or observation formats.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections import deque
from collections.abc import Mapping

from north_lightning.errors import InvalidActionError, SandboxError
from north_lightning.interfaces import Sandbox
from north_lightning.sandbox.escapes import capped, plain_text
from north_lightning.sandbox.processes import CappedOutput
from north_lightning.sandbox.tmux import ControlStream, PaneOutput, quoted

_START_TIMEOUT_S = 60.0
_QUIET_S = 0.1
_RAW_BYTES = 1 << 17
_PANE = "%0"
_KEY = re.compile(
    r"(?:[CMS]-)+\S|Enter|Escape|Tab|BTab|BSpace|Up|Down|Left|Right|Home|End|PageUp|PageDown|F(?:[1-9]|1[0-2])"
)
_SUBMITTING_KEYS = frozenset({"C-c", "C-d", "C-j", "C-m", "C-z", "C-\\", "Enter"})
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class TerminalClosedError(InvalidActionError):
    """The model ended its own shell, and types on."""


class Terminal:
    """One tmux session with one bash in ``/work``; prompt ``$ ``, no history expansion, ``PAGER=cat``.

    Args:
        sandbox: where it runs; bash (5.1 or newer) and tmux (3.2 or newer) must be installed there.
        columns, rows: size of the screen.
        max_output_bytes: longest answer of ``send``; more is cut out of the middle, and a line says so.
        environment: variables on top of the sandbox's.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        columns: int = 160,
        rows: int = 40,
        max_output_bytes: int = 10_000,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.closed = False  # the shell has ended
        self.timed_out = False  # the last ``send`` returned before the prompt did
        self._sandbox = sandbox
        self._columns = columns
        self._rows = rows
        self._max_output_bytes = max_output_bytes
        self._environment = {"PAGER": "cat", "GIT_PAGER": "cat", **(environment or {})}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._replies: deque[asyncio.Future[list[str]]] = deque()
        self._pane = PaneOutput(secrets.token_hex(4), _RAW_BYTES)
        self._stray = CappedOutput(4000)  # what tmux said outside its protocol: why it did not start

    @property
    def at_prompt(self) -> bool:
        """Whether bash waits for a command (or for the rest of one)."""
        return self._pane.is_at_prompt and not self.closed

    @property
    def last_exit_code(self) -> int | None:
        """Exit status of the last command that ended; None before the first prompt."""
        return self._pane.last_exit_code

    async def start(self) -> None:
        """Return at the first prompt; ``SandboxError`` if there is none within a minute."""
        assert self._process is None, "a terminal starts once"
        self._process = await self._sandbox.spawn(self._command())
        self._reader = asyncio.ensure_future(self._read())
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while not (self._pane.num_prompts or self.closed):
                    await self._change()
        except TimeoutError:
            await self.close()
            raise SandboxError(f"no prompt within {_START_TIMEOUT_S} s of starting tmux") from None
        self._pane.take()
        if self.closed:
            words = self._stray.text().strip()
            await self.close()
            raise SandboxError(
                f"tmux did not start: {words or 'no message'} (are tmux and bash installed in the sandbox?)"
            )

    async def send(self, keystrokes: str, timeout_s: float, *, enter: bool = True) -> str:
        """Type, press Enter, and return what is new once the prompt is back, or the screen at the time-out.

        The echo of what was typed and the prompt are not part of the answer; what background jobs printed since the
        last call comes first. The name of a key alone (``C-c``, ``C-d``, ``Up``, ``Escape``, as tmux spells them)
        presses that key, without Enter. One newline at the end counts as the Enter. With ``enter`` false, or after a
        key that submits nothing, the answer is the screen as soon as it is quiet. A program that waits for input runs
        into the time-out; the next ``send`` types into it.

        Raises ``TerminalClosedError`` if the shell had ended before, ``SandboxError`` if the sandbox is gone.
        """
        if self.closed:
            await self._raise_closed()
        self.timed_out = False
        pane = self._pane
        pending = pane.take()
        was_ready, num_prompts = pane.is_ready, pane.num_prompts
        typed, submits = self._type(keystrokes, enter)
        pane.begin_typing(submits=submits)
        try:
            async with asyncio.timeout(timeout_s):
                if submits:
                    await self._prompt_after(num_prompts, needs_quiet=not was_ready)
                else:
                    await self._quiet()
        except TimeoutError:
            self.timed_out = submits
        if self.closed and self._sandbox_died():
            await self._raise_closed()
        return await self._answer(pending, typed if not was_ready else "", show_screen=not submits or self.timed_out)

    async def press(self, keystrokes: str, duration_s: float) -> None:
        """Send keystrokes as they are, and return once a prompt is back and quiet, or after ``duration_s``.

        The name of a key alone presses that key; no Enter is added, and an empty text only waits. Nothing is returned:
        ``lines`` shows what the terminal shows. Raises as ``send`` does.
        """
        if self.closed:
            await self._raise_closed()
        pane = self._pane
        pane.take()
        num_prompts, was_ready = pane.num_prompts, pane.is_ready
        submits = "\n" in keystrokes or "\r" in keystrokes or keystrokes in _SUBMITTING_KEYS
        if _KEY.fullmatch(keystrokes):
            self._control(f"send-keys -t {_PANE} -- {quoted(keystrokes)}")
        elif keystrokes:
            self._control(f"send-keys -l -t {_PANE} -- {quoted(keystrokes)}")
        if keystrokes:
            pane.begin_typing(submits=submits)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                if submits or not was_ready:
                    await self._prompt_after(num_prompts, needs_quiet=True)
                await self._quiet()
        if self.closed and self._sandbox_died():
            await self._raise_closed()

    async def lines(self, *, history: bool) -> list[str]:
        """All rows of the screen, blank ones too, after what has scrolled off with ``history``; none once closed."""
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                return await self._control(f"capture-pane -p {'-S - ' if history else ''}-t {_PANE}")
        except TimeoutError:
            raise SandboxError(f"tmux did not answer within {_START_TIMEOUT_S} s") from None

    async def screen(self) -> str:
        """The screen's lines, without blank lines at its end; empty once the shell has ended."""
        return "\n".join(await self.lines(history=False)).rstrip()

    async def close(self) -> None:
        """End the session. May be called twice; the sandbox stays open."""
        self.closed = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            await self._reader

    # ---- starting and ending

    def _command(self) -> list[str]:
        nonce = self._pane.nonce
        prompts = (
            rf"PS1='\[\e]133;D;$?;k={nonce}\a\e]133;A;k={nonce}\a\]$ '"
            rf" PS2='\[\e]133;P;k={nonce}\a\]> ' PS0='\e]133;C;k={nonce}\a'"
        )
        command = ["tmux", "-L", f"terminal-{nonce}", "-f", "/dev/null", "-C", "start-server"]
        # The history limit is read when a pane is made.
        for option, value in (
            ("history-limit", "10000"),
            ("status", "off"),
            ("automatic-rename", "off"),
            ("escape-time", "0"),
        ):
            command += [";", "set-option", "-g", option, value]
        command += [";", "new-session", "-x", str(self._columns), "-y", str(self._rows), "-c", "/work"]
        for name, text in {"PROMPT_COMMAND": prompts, "HISTFILE": "", **self._environment}.items():
            command += ["-e", f"{name}={text}"]
        return [*command, "--", "bash", "--noprofile", "--norc", "+H", "-i"]

    def _sandbox_died(self) -> bool:
        """Whether somebody outside ended the session; the model's processes cannot kill the namespace's init."""
        process = self._process
        if process is None or process.returncode is None:
            return False
        return process.returncode < 0 or getattr(process, "was_killed", False)

    async def _raise_closed(self) -> None:
        assert self._process is not None, "start() comes first"
        if self._sandbox_died():
            raise SandboxError(f"the terminal was ended from outside (exit code {self._process.returncode})")
        raise TerminalClosedError("the terminal is closed: its shell has ended")

    # ---- typing

    def _type(self, keystrokes: str, enter: bool) -> tuple[str, bool]:
        """Queue the keystrokes; the text typed, and whether they hand something to the shell or program."""
        if _KEY.fullmatch(keystrokes):
            self._control(f"send-keys -t {_PANE} -- {quoted(keystrokes)}")
            return "", keystrokes in _SUBMITTING_KEYS
        text = keystrokes.replace("\r\n", "\n")
        has_control = _CONTROL.search(text) is not None
        if text.endswith("\n"):
            text, enter = text[:-1], True
        if text:
            # A bracketed paste reaches bash as one edit: newlines and tabs are text, and nothing is echoed twice.
            self._control(f"set-buffer -b typed -- {quoted(text)}")
            self._control(f"paste-buffer -d {'' if has_control else '-p '}-b typed -t {_PANE}")
            if has_control and not _CONTROL.sub("", text):
                return "", True
        if enter:
            self._control(f"send-keys -t {_PANE} Enter")
        return text + "\n" * enter, enter

    async def _prompt_after(self, num_prompts: int, *, needs_quiet: bool) -> None:
        """Wait for a prompt later than ``num_prompts``; ``needs_quiet`` if bash may still read what was typed ahead."""
        pane = self._pane
        while not self.closed:
            if pane.num_prompts > num_prompts and pane.is_at_prompt:
                if not (needs_quiet or pane.is_continuation):
                    return
                num_marks = pane.num_marks
                await self._quiet()
                if pane.num_marks == num_marks:
                    return
            else:
                await self._change()

    async def _quiet(self) -> None:
        """Wait until nothing has been printed for a moment."""
        try:
            while not self.closed:
                async with asyncio.timeout(_QUIET_S):
                    await self._change()
        except TimeoutError:
            return

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    # ---- reading

    async def _answer(self, pending: CappedOutput, echo: str, *, show_screen: bool) -> str:
        output = self._pane.take()
        if not show_screen or self.closed:
            before, text = self._plain(pending), self._plain(output)
            if text is not None and before is not None:
                text = _without_echo(text, echo)
                if self.at_prompt and self._pane.is_continuation:
                    text += "> "
                num_left_out = pending.num_left_out + output.num_left_out
                return capped(before + text, self._max_output_bytes, num_left_out)
        return capped(await self.screen(), self._max_output_bytes)

    def _plain(self, output: CappedOutput) -> str | None:
        head = plain_text(output.head, self._columns)
        tail = plain_text(output.tail, self._columns)
        if head is None or tail is None:
            return None
        return head + (f"\n[... {output.num_left_out} bytes left out ...]\n" if output.num_left_out else "") + tail

    def _control(self, line: str) -> asyncio.Future[list[str]]:
        """Send one tmux command; its answer comes in order, empty if tmux is gone."""
        assert self._process is not None, "start() comes first"
        assert self._process.stdin is not None
        reply: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        if self.closed:
            reply.set_result([])
        else:
            self._replies.append(reply)
            self._process.stdin.write(line.encode() + b"\n")
        return reply

    async def _read(self) -> None:
        """Take in everything tmux says until it ends."""
        assert self._process is not None
        assert self._process.stdout is not None
        control = ControlStream(_PANE)
        rest = b""
        while chunk := await self._process.stdout.read(1 << 18):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                kind, value = control.feed(line)
                if kind == "output":
                    self._pane.feed(value)
                elif kind == "stray":
                    self._stray.add(value + b"\n")
                elif kind == "reply" and self._replies:
                    reply = self._replies.popleft()
                    if not reply.done():
                        reply.set_result([text.decode(errors="replace") for text in control.reply])
            self._changed.set()
        await self._process.wait()
        self.closed = True
        for reply in self._replies:
            if not reply.done():
                reply.set_result([])
        self._changed.set()


def is_key(keystrokes: str) -> bool:
    """Whether these are the name of a key (``C-c``, ``Up``) and not text."""
    return _KEY.fullmatch(keystrokes) is not None


def _without_echo(text: str, typed: str) -> str:
    """``text`` without the terminal's own echo of what was typed ahead at its start.

    tmux pastes in brackets for as long as it believes that bash is reading, and then the brackets are echoed too.
    """
    body = typed.removesuffix("\n")
    bracketed = f"^[[200~{body}^[[201~{typed[len(body) :]}"
    for echo in (typed, bracketed):
        if typed and text.startswith(echo):
            return text[len(echo) :]
    return text
