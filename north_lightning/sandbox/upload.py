"""Files into a running sandbox, through a program inside.

In: a tree on this machine, which a sandboxed program may have written. Out: its copy inside. Written from inside, so
that no link in either tree leads anywhere but to the sandbox's own files.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import stat
from collections.abc import Iterable
from pathlib import Path

from north_lightning.errors import SandboxError, UploadRefusedError
from north_lightning.interfaces import Sandbox

_NOT_FOUND = 127  # a shell's exit code where a program is missing


async def upload(
    sandbox: Sandbox, source: Path, inside: str, exclude: Iterable[str] = (), *, replace: bool = False
) -> None:
    """Put the content of the directory ``source`` into the directory ``inside``, or any other file at ``inside``, which
    has its name. A link is put there as a link. ``inside`` is an absolute path.

    Args:
        exclude: What of a directory is left out; patterns as of GNU tar.
        replace: Remove what is at ``inside`` first; otherwise the files are laid over those that are there.

    Raises:
        UploadRefusedError: what is inside already does not let itself be written over, or there is no room.
        SandboxError: the files cannot be read here; there is no tar inside.
    """
    is_directory = stat.S_ISDIR(os.lstat(source).st_mode)
    quoted, folder = shlex.quote(inside), shlex.quote(inside if is_directory else str(Path(inside).parent))
    words = ["-C", str(source), "."] if is_directory else ["-C", str(source.parent), "--", source.name]
    packed = await asyncio.create_subprocess_exec(
        "tar", "-cSf", "-", *(f"--exclude={pattern}" for pattern in exclude), *words,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    archive, said = await packed.communicate()
    if packed.returncode != 0:
        raise SandboxError(f"{source} cannot be read: {said.decode(errors='replace')[-300:]}")
    clear = ""
    if replace:
        clear = f"shopt -s dotglob nullglob; rm -rf -- {quoted}/*; " if inside == "/work" else f"rm -rf -- {quoted} && "
    script = f"{clear}mkdir -p {folder} && cd {folder} && tar -xf - --no-same-owner"
    unpacking = await sandbox.spawn(["bash", "-c", script])
    said, _ = await unpacking.communicate(archive)
    code = await unpacking.wait()
    complaint = said.decode(errors="replace")[-300:]
    if code == _NOT_FOUND:
        raise SandboxError(f"{inside} cannot be written in the sandbox: {complaint}")
    if code != 0:
        raise UploadRefusedError(f"{inside} cannot be written in the sandbox: {complaint}")
