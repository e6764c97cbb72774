"""A small root file system made from this machine's own programs, so that a container engine has something to run.

No registry and no download: the programs, the libraries that ``ldd`` names, and the system's Python.
"""

import re
import shutil
import subprocess
from pathlib import Path

PROGRAMS = (
    *(
        "base64",
        "bash",
        "sh",
        "cat",
        "chmod",
        "chown",
        "cksum",
        "cp",
        "cut",
        "date",
        "dd",
        "dirname",
        "du",
        "echo",
        "env",
        "find",
    ),
    *(
        "grep",
        "head",
        "id",
        "kill",
        "ln",
        "ls",
        "mkdir",
        "mkfifo",
        "mknod",
        "mount",
        "mv",
        "nohup",
        "nproc",
        "ps",
        "pwd",
    ),
    *("python3", "readlink", "rm", "rmdir", "sed", "seq", "setsid", "sleep", "sort", "stat", "tail", "tar", "timeout"),
    *(
        "tmux",
        "touch",
        "tput",
        "tr",
        "true",
        "truncate",
        "uname",
        "unshare",
        "wc",
        "yes",
        "xargs",
        "hostname",
        "umount",
    ),
)
_SYSTEM_PATH = "/usr/bin:/usr/sbin:/bin:/sbin"
_LIBRARY = re.compile(r"(/\S+)\s+\(0x")


def make_root_file_system(destination: Path, *, with_python: bool = True) -> Path:
    """Fill the new directory ``destination``: some 50 MB, of which Python is the most."""
    for name in ("usr/bin", "usr/lib", "etc", "proc", "sys", "dev", "tmp", "work", "home/agent", "run", "var", "root"):
        (destination / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin"):
        (destination / name).symlink_to("usr/bin")
    for name in ("lib", "lib64"):
        (destination / name).symlink_to("usr/lib")
    (destination / "usr/lib64").symlink_to("lib")
    (destination / "var/tmp").symlink_to("/tmp")
    libraries: set[Path] = set()
    for name in PROGRAMS if with_python else sorted({*PROGRAMS} - {"python3"}):
        found = shutil.which(name, path=_SYSTEM_PATH)
        if found is not None:
            shutil.copy2(Path(found).resolve(), destination / "usr/bin" / name)
            libraries |= _libraries_of(Path(found))
    if with_python:
        libraries |= _copy_python(destination)
    for library in libraries:
        target = destination / "usr/lib" / library.name
        if library.parts[1] in ("usr", "lib", "lib64") and not target.exists():
            shutil.copy2(library.resolve(), target)
    for directory in ("/usr/lib/locale/C.utf8", "/lib/terminfo", "/usr/share/terminfo"):
        if Path(directory).is_dir():
            shutil.copytree(
                directory, destination / "usr" / Path(directory).relative_to(_top(directory)), symlinks=False
            )
    (destination / "etc/passwd").write_text("root:x:0:0::/root:/bin/bash\nagent:x:1000:1000::/home/agent:/bin/bash\n")
    (destination / "etc/group").write_text("root:x:0:\nagent:x:1000:\n")
    (destination / "etc/shadow").write_text("root:*:19000:0:99999:7:::\n")
    (destination / "etc/shadow").chmod(0o600)
    return destination


def _copy_python(destination: Path) -> set[Path]:
    """The standard library without its tests, and what its extension modules need."""
    libraries: set[Path] = set()
    python = Path(shutil.which("python3", path=_SYSTEM_PATH) or "/usr/bin/python3").resolve()
    standard = Path("/usr/lib") / python.name
    ignored = shutil.ignore_patterns("__pycache__", "test", "tests", "idlelib", "config-*", "ensurepip", "lib2to3")
    shutil.copytree(standard, destination / "usr/lib" / python.name, symlinks=False, ignore=ignored)
    for module in (standard / "lib-dynload").glob("*.so"):
        libraries |= _libraries_of(module)
    return libraries


def _top(directory: str) -> str:
    return "/usr" if directory.startswith("/usr/") else "/"


def _libraries_of(program: Path) -> set[Path]:
    words = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    return {Path(path) for path in _LIBRARY.findall(words)}
