"""Whether this machine can isolate commands, found out by trying, and what to change if it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from north_lightning.errors import SandboxUnavailableError
from north_lightning.sandbox.command import Launcher
from north_lightning.sandbox.cpu_waits import slowdown
from north_lightning.sandbox.processes import STARTED
from north_lightning.sandbox.slots import Slot


def program(name: str) -> str:
    """The path of an installed program, or ``SandboxUnavailableError`` with the package to install."""
    path = shutil.which(name)
    if path is None:
        package = {"bwrap": "bubblewrap", "setpriv": "util-linux"}[name]
        raise SandboxUnavailableError(f"{name} is not installed: apt-get install {package}")
    return path


def check_programs() -> None:
    """Whether what isolates is installed, and new enough."""
    if os.geteuid() == 0:
        program("setpriv")
    words = subprocess.run([program("bwrap"), "--version"], capture_output=True, text=True, check=False).stdout.split()
    version = tuple(int(part) for part in words[-1].split(".")[:2]) if words else (0, 0)
    if version < (0, 8):
        raise SandboxUnavailableError(
            f"bubblewrap {'.'.join(map(str, version))} is too old: expected 0.8 or newer (--disable-userns, --size)"
        )


# Run inside; every line that does not hold names itself. Its arguments are a file of the host and the user.
PROBE = r"""
[ "$(id -u):$(id -g)" = "$2:$2" ] || echo "the user is $(id), not $2"
[ ! -e "$1" ] || echo "the host's $1 is visible"
! ls /root/* /root/.[a-z]* >/dev/null 2>&1 || echo "/root can be read"
[ "$(tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ')" = lo ] || echo "there are network interfaces"
[ -z "$(tail -n +2 /proc/net/route)" ] || echo "there are network routes"
ps=0; for p in /proc/[0-9]*; do ps=$((ps + 1)); done; [ $ps -le 8 ] || echo "other processes are visible"
! (: >/usr/probe) 2>/dev/null || echo "/usr is writable"
! (: >/probe) 2>/dev/null || echo "/ is writable"
! unshare -U true 2>/dev/null || echo "user namespaces can be nested"
grep -q '^CapEff:[[:space:]]*0*$' /proc/self/status || echo "there are capabilities"
: >/work/probe || echo "/work is not writable"
"""


def probe(launcher: Launcher, slot: Slot) -> None:
    """Run a shell that looks for what it must not see; ``SandboxUnavailableError`` names it and the remedy."""
    secret = slot.directory.parent / "lock"
    filter_fd = launcher.open_filter()
    try:
        done = subprocess.run(
            launcher.argv(["/bin/bash", "-c", PROBE, "probe", str(secret), "1000"], filter_fd),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={},
            cwd="/",
            timeout=30 * slowdown(),
            check=False,
            pass_fds=() if filter_fd is None else (filter_fd,),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxUnavailableError(f"commands cannot be isolated here: {error}\n{_remedy()}") from error
    finally:
        if filter_fd is not None:
            os.close(filter_fd)
    if not done.stdout.startswith(STARTED):
        words = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise SandboxUnavailableError(f"commands cannot be isolated here: {words}\n{_remedy()}")
    leaks = (done.stdout[len(STARTED) :] + done.stderr).decode(errors="replace").split("\n")
    if slot.uid is not None and (slot.directory / "work" / "probe").lstat().st_uid != slot.uid:
        leaks.append(f"files do not belong to user id {slot.uid}")
    leaks = [leak for leak in leaks if leak]
    if leaks or done.returncode != 0:
        raise SandboxUnavailableError(
            f"bubblewrap does not isolate here: {'; '.join(leaks) or done.returncode}\n{_remedy()}"
        )


def _remedy() -> str:
    """What to change on this machine, from the kernel's own switches."""
    switches = {
        "/proc/sys/user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=15000"),
        "/proc/sys/kernel/unprivileged_userns_clone": ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0 (or allow bwrap 'userns' in an AppArmor profile)",
        ),
    }
    remedies = []
    for path, (bad, remedy) in switches.items():
        try:
            if Path(path).read_text().strip() == bad:
                remedies.append(remedy)
        except OSError:
            continue
    if remedies:
        return "Unprivileged user namespaces are switched off; as root: " + "; ".join(remedies)
    return (
        "Unprivileged user namespaces must be allowed. In a container, start it with --security-opt seccomp=unconfined "
        "--security-opt apparmor=unconfined --security-opt systempaths=unconfined, or use the Docker sandbox instead."
    )
