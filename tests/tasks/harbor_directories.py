"""Task directories that are, or are not quite, what Harbor takes; as files, by name. Standard library only."""

from __future__ import annotations

from pathlib import Path

BASE = {
    "task.toml": "",
    "instruction.md": "Do it.\n",
    "environment/Dockerfile": "FROM debian:12\n",
    "tests/test.sh": "#!/bin/bash\n",
    "solution/solve.sh": "#!/bin/bash\n",
}
STEP = {"steps/one/instruction.md": "One.\n", "steps/two/instruction.md": "Two.\n"}
STEPS = '[[steps]]\nname = "one"\n[[steps]]\nname = "two"\n'
GONE = None

FULL = """
schema_version = "1.4"
source = "somewhere"
multi_step_reward_strategy = "final"
artifacts = ["/work/a.txt", {source = "/work/b", destination = "b", exclude = ["*.o"], service = "db"}]
[task]
name = "org/name"
version = "2"
description = "words"
authors = [{name = "A", email = "a@b"}]
keywords = ["x"]
[metadata]
anything = [1, {b = 2}]
[agent]
timeout_sec = 60
user = 1000
network_mode = "allowlist"
allowed_hosts = ["*.pypi.org", "10.0.0.0/8", "::1", "192.0.2.1"]
[verifier]
timeout_sec = 30.5
user = "root"
environment_mode = "separate"
env = {KEY = "${VAR:-default}"}
[[verifier.collect]]
command = "true"
service = "db"
[environment]
network_mode = "no-network"
build_timeout_sec = 60
docker_image = "debian:12"
os = "Linux"
cpus = 1.5
memory_mb = 2048
storage_mb = 10240
gpus = 1
gpu_types = ["H100"]
workdir = "/work"
skills_dir = "/skills"
env = {A = "b"}
healthcheck = {command = "true", retries = 2}
tpu = {type = "v6e", topology = "2x4"}
[[environment.mcp_servers]]
name = "m"
transport = "http"
url = "http://localhost"
[solution]
env = {B = "c"}
"""


def toml(text: str, **files: str | None) -> dict[str, str | None]:
    return {"task.toml": text, **files}


DIRECTORIES: dict[str, dict[str, str | None]] = {
    "empty configuration": {},
    "version 1.0": toml('version = "1.0"\n[metadata]\ndifficulty = "easy"\n'),
    "version 1.1": toml('schema_version = "1.1"\n[task]\nname = "a/b"\n'),
    "version 1.3": toml('schema_version = "1.3"\n' + STEPS, **STEP),
    "all fields": toml(FULL),
    "older spellings": toml('[environment]\nallow_internet = false\nmemory = "2G"\nstorage = "512M"\n'),
    "unknown keys": toml('new = 1\n[task]\nname = "a/b"\nmore = 2\n[other]\nx = 1\n'),
    "image instead of environment": toml(
        '[environment]\ndocker_image = "debian"\n', **{"environment/Dockerfile": GONE}
    ),
    "no environment": {"environment/Dockerfile": GONE},
    "no configuration": {"task.toml": GONE},
    "no instruction": {"instruction.md": GONE},
    "no tests": {"tests/test.sh": GONE},
    "tests for another system": {"tests/test.sh": GONE, "tests/test.bat": "rem\n"},
    "windows": toml('[environment]\nos = "windows"\n', **{"tests/test.sh": GONE, "tests/test.bat": "rem\n"}),
    "windows without its script": toml('[environment]\nos = "windows"\n'),
    "no solution": {"solution/solve.sh": GONE},
    "not TOML": toml("[task\n"),
    "name without organisation": toml('[task]\nname = "b"\n'),
    "name with dots": toml('[task]\nname = "a/b..c"\n'),
    "task without name": toml('[task]\nversion = "1"\n'),
    "empty version": toml('[task]\nname = "a/b"\nversion = ""\n'),
    "time as text": toml('[agent]\ntimeout_sec = "soon"\n'),
    "time as number in text": toml('[agent]\ntimeout_sec = "60"\n'),
    "hosts without a mode": toml('[agent]\nallowed_hosts = ["a.b"]\n'),
    "hosts without the allowlist": toml('[environment]\nallowed_hosts = ["a.b"]\n'),
    "no hosts without the allowlist": toml("[environment]\nallowed_hosts = []\n"),
    "host is a URL": toml('[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["https://a.b"]\n'),
    "host with a port": toml('[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["a.b:80"]\n'),
    "star in the middle": toml('[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["a.*.b"]\n'),
    "star before an address": toml('[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["*.192.0.2.1"]\n'),
    "network with host bits": toml('[environment]\nnetwork_mode = "allowlist"\nallowed_hosts = ["10.0.0.1/8"]\n'),
    "unknown mode": toml('[environment]\nnetwork_mode = "some"\n'),
    "sizes contradict": toml('[environment]\nmemory = "2G"\nmemory_mb = 1\n'),
    "size without unit": toml('[environment]\nmemory = "2048"\n'),
    "cpus not finite": toml("[environment]\ncpus = inf\n"),
    "shared with an environment": toml('[verifier]\nenvironment_mode = "shared"\n[verifier.environment]\ncpus = 1\n'),
    "separate": toml('[verifier]\nenvironment_mode = "separate"\n'),
    "separate, tests in the image": toml(
        '[verifier]\nenvironment_mode = "separate"\n', **{"tests/test.sh": GONE, "tests/Dockerfile": "FROM debian\n"}
    ),
    "separate, image named": toml('[verifier.environment]\ndocker_image = "v"\n', **{"tests/test.sh": GONE}),
    "separate without tests": toml("[verifier.environment]\ncpus = 1\n", **{"tests/test.sh": GONE}),
    "steps": toml(STEPS, **STEP, **{"instruction.md": GONE}),
    "steps with their own tests": toml(
        STEPS, **STEP, **{"tests/test.sh": GONE, "steps/one/tests/test.sh": "a\n", "steps/two/tests/test.sh": "b\n"}
    ),
    "a step without tests": toml(STEPS, **STEP, **{"tests/test.sh": GONE, "steps/one/tests/test.sh": "a\n"}),
    "a step without instruction": toml(STEPS, **{"steps/one/instruction.md": "1", "steps/two/x": "2"}),
    "a step without directory": toml(STEPS, **{"steps/one/instruction.md": "1"}),
    "a step named twice": toml('[[steps]]\nname = "one"\n[[steps]]\nname = "ONE"\n', **STEP),
    "a step that climbs": toml('[[steps]]\nname = ".."\n', **STEP),
    "a step named as a device": toml('[[steps]]\nname = "nul.txt"\n', **{"steps/nul.txt/instruction.md": "1"}),
    "reward per key": toml('[[steps]]\nname = "one"\nmin_reward = {a = 0.5}\n', **STEP),
    "unknown strategy": toml('multi_step_reward_strategy = "best"\n'),
    "artifact that climbs": toml('artifacts = [{source = "/a/../b"}]\n'),
    "artifact to an absolute place": toml('artifacts = [{source = "/a", destination = "/b"}]\n'),
    "artifact over the manifest": toml('artifacts = [{source = "/a", destination = "manifest.json"}]\n'),
    "relative artifact of a service": toml('artifacts = [{source = "a", service = "db"}]\n'),
    "service with a space": toml('[[verifier.collect]]\ncommand = "a"\nservice = "a b"\n'),
    "healthcheck without command": toml("[environment]\nhealthcheck = {retries = 1}\n"),
    "server without url": toml('[[environment.mcp_servers]]\nname = "m"\n'),
    "server without command": toml('[[environment.mcp_servers]]\nname = "m"\ntransport = "stdio"\n'),
    "unknown topology": toml('[environment]\ntpu = {type = "v6e", topology = "2xN"}\n'),
    "environment of another type": toml("environment = 3\n"),
    "variables that are no text": toml("[environment]\nenv = {A = 1}\n"),
    "user as number": toml("[verifier]\nuser = 0\n"),
    "instruction that is no text": {"instruction.md": "\udcff"},
    "link to the outside": {"tests/out": "-> ../../../outside"},
    "link to the inside": {"tests/in": "-> ../instruction.md"},
}


def write_directory(name: str, parent: Path) -> Path:
    """Make the directory of this name below ``parent``; a file that is ``GONE`` is left out."""
    root = parent / "task"
    for path, text in {**BASE, **DIRECTORIES[name]}.items():
        if text is None:
            continue
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            (root / path).symlink_to(text[3:])
        else:
            (root / path).write_bytes(text.encode(errors="surrogateescape"))
    return root
