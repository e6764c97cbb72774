"""Dockerfiles built under bubblewrap, against the same ones built by a container engine."""

import asyncio
import os
import shutil

import pytest

from north_lightning.errors import ConfigError
from north_lightning.sandbox import BubblewrapProvider, DockerProvider
from north_lightning.types import RootFileSystem

BASE = "localhost/north-base:latest"
LIST = (
    "for d in /opt /srv /etc/own /usr/local; do [ ! -e $d ] || find $d -printf '%P %m %y %l\\n' | sort; done;"
    " find /opt /srv /etc/own -type f -exec cksum {} + 2>/dev/null | sort -k3;"
    " env | grep -E '^(PATH|GREETING|EMPTY|OLD|BOTH|LEVEL|PYTHONPATH)=' | sort; pwd; ls -A"
)
DOCKERFILES = {
    "run": "RUN mkdir -p /opt/a/b && echo hello >/opt/a/b/c && chmod 640 /opt/a/b/c && ln -s b/c /opt/a/link",
    "exec form": 'RUN ["/bin/sh", "-c", "echo $0 >/opt/$1", "zero", "one"]',
    "several lines": "RUN mkdir /opt/x && \\\n    # a comment\n    touch /opt/x/1 \\\n      /opt/x/2",
    "copy a file": "COPY files/one.txt /opt/one.txt\nCOPY files/one.txt /opt/folder/\nCOPY files/one.txt /opt",
    "copy a folder": "COPY files /opt/files\nCOPY files/sub /srv/",
    "copy several": "COPY files/one.txt files/two.sh /opt/both/\nCOPY files/*.txt /srv/texts/",
    "copy by chmod": "COPY --chmod=600 files/one.txt /opt/secret\nCOPY --chmod=755 files/sub /opt/sub",
    "copy in exec form": 'COPY ["files/with space.md", "/opt/with space.md"]',
    "add": "ADD files/two.sh /opt/two.sh\nADD . /srv/all",
    "work directories": "WORKDIR /opt\nWORKDIR inner\nRUN pwd >where && touch here\nCOPY files/one.txt .\n"
    "COPY files/sub sub",
    "variables": "ENV GREETING='hello there' LEVEL=3\nENV OLD old style\n"
    "ENV BOTH=${GREETING}-$LEVEL-${NONE:-none} EMPTY=\n"
    'RUN echo "$GREETING $LEVEL $BOTH" >/opt/said\nENV PATH=/opt/bin:$PATH',
    "arguments": 'ARG NAME=file\nARG BLANK\nRUN echo "$NAME-$BLANK" >/opt/$NAME\nCOPY files/one.txt /opt/${NAME}.copy\n'
    "ENV LEVEL=$NAME",
    "over what is there": "RUN mkdir /opt/d && echo a >/opt/d/one.txt\nCOPY files /opt/d\nRUN rm /opt/d/two.sh",
    "through a link": "RUN mkdir /opt/real && ln -s real /opt/link\nCOPY files/one.txt /opt/link/one.txt",
    "what means nothing": 'LABEL a=b\nEXPOSE 80\nCMD ["bash"]\nENTRYPOINT ["sh"]\nRUN touch /opt/end',
}


@pytest.fixture(scope="module")
def bubblewrap(root_file_system):
    return BubblewrapProvider(images={BASE: root_file_system})


@pytest.fixture(scope="module")
def docker(engine, root_file_system):
    from north_lightning.sandbox.docker_engine import Engine

    connected = Engine(engine)
    connected.api.tag(connected.image(str(root_file_system)), "localhost/north-base", "latest")
    return DockerProvider(BASE, engine=engine)


def dockerfile(folder, text):
    files = folder / "files"
    (files / "sub" / "deep").mkdir(parents=True)
    (files / "one.txt").write_text("one\n")
    (files / "two.sh").write_text("#!/bin/sh\necho two\n")
    (files / "with space.md").write_text("words\n")
    (files / "sub" / "deep" / "three").write_text("3\n")
    (files / "sub" / "link").symlink_to("deep/three")
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
    (files / "two.sh").chmod(0o755)
    (folder / "Dockerfile").write_text(f"FROM {BASE}\n{text}\n")
    return folder / "Dockerfile"


def listing(provider, path):
    async def main():
        sandbox = await provider.open(None, root=RootFileSystem(path))
        try:
            return (await sandbox.run(LIST, 30)).output
        finally:
            await sandbox.close()

    return asyncio.run(main())


@pytest.mark.parametrize("first", range(3))
def test_what_is_built_is_what_the_engine_builds(first, bubblewrap, docker, tmp_path):
    """Every third of them in one file: an engine takes seconds for each."""
    path = dockerfile(tmp_path, "\n".join(["RUN mkdir -p /opt /srv", *list(DOCKERFILES.values())[first::3]]))
    ours, theirs = listing(bubblewrap, path), listing(docker, path)
    assert len(theirs.splitlines()) > 20
    assert ours.splitlines() == theirs.splitlines()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("RUN true\nRUN echo before; exit 3", r"Dockerfile:3: RUN echo before; exit 3: exit code 3: before$"),
        ("COPY nowhere /opt/", r":2: COPY nowhere /opt/: nowhere is not in the build"),
        ("COPY ../x /opt/", r":2: COPY ../x /opt/: ../x leads out of the build context"),
        (
            "RUN python3 -c 'import socket; socket.create_connection((\"10.0.0.1\", 80), 2)'",
            "there is no network while",
        ),
        ("RUN chown 1234 /etc", r":2: RUN chown 1234 /etc: exit code 1"),
        ("USER nobody", r":2: USER nobody: not supported"),
    ],
)
def test_what_cannot_be_done_names_the_line(text, message, bubblewrap, tmp_path):
    with pytest.raises(ConfigError, match=message):
        bubblewrap.check_root(RootFileSystem(dockerfile(tmp_path, text)))


def test_what_is_not_there_is_named(bubblewrap, tmp_path):
    path = dockerfile(tmp_path, "RUN true")
    with pytest.raises(ConfigError, match=rf"images: expected an entry for '{BASE}', .*got none"):
        BubblewrapProvider().check_root(RootFileSystem(path))
    (tmp_path / ".dockerignore").write_text("*\n")
    with pytest.raises(ConfigError, match=r"\.dockerignore: not read under bubblewrap"):
        bubblewrap.check_root(RootFileSystem(path))


def test_a_build_reaches_nothing_of_this_machine_and_leaves_nothing(bubblewrap, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret\n")
    context = tmp_path / "context"
    context.mkdir()
    attack = (
        f"cat {secret} /root/.bashrc >/opt/stolen 2>&1; touch /run/context/new {tmp_path}/new /proc/sys/x 2>/dev/null;"
        " ls /proc | grep -c '^[0-9]' >/opt/processes; id -u >/opt/user; (setsid sleep 7741 &); ip addr >/opt/net 2>&1;"
        " mknod /opt/device b 8 0 2>/dev/null; mount -t tmpfs none /mnt 2>/dev/null && touch /opt/mounted; true"
    )
    path = dockerfile(context, f"RUN mkdir -p /opt; {attack}")
    before = set(os.listdir(context))

    async def main():
        sandbox = await bubblewrap.open(None, root=RootFileSystem(path))
        try:
            return (await sandbox.run("cat /opt/stolen; cat /opt/processes /opt/user; ls /opt", 30)).output
        finally:
            await sandbox.close()

    said = asyncio.run(main())
    assert "secret\n" not in said.replace(str(secret), "")
    assert "device" not in said.split()
    assert "mounted" not in said.split()
    assert set(os.listdir(context)) == before
    assert not (tmp_path / "new").exists()
    from conformance import processes_with

    assert not processes_with("sleep\x007741")


def test_a_command_that_does_not_end_is_killed(bubblewrap, tmp_path, monkeypatch):
    from conformance import processes_with

    from north_lightning.sandbox import root_files

    monkeypatch.setattr(root_files, "BUILD_TIMEOUT_S", 1.0)
    with pytest.raises(ConfigError, match=r":2: RUN sleep 7742: did not end within 1 s"):
        bubblewrap.check_root(RootFileSystem(dockerfile(tmp_path, "RUN sleep 7742")))
    assert not processes_with("sleep\x007742")


def test_a_build_is_bounded_in_memory_files_and_processes(bubblewrap, tmp_path):
    tries = {
        "bytearray(9 << 30)": "MemoryError",
        "[subprocess.Popen(['sleep', '7743']) for _ in range(400)]": "BlockingIOError",
        "os.posix_fallocate(os.open('/opt/f', os.O_CREAT | os.O_RDWR), 0, 5 << 30)": "exit code",
    }
    for number, (code, error) in enumerate(tries.items()):
        (folder := tmp_path / str(number)).mkdir()
        path = dockerfile(folder, f'RUN mkdir -p /opt; python3 -c "import os, subprocess; {code}"')
        with pytest.raises(ConfigError, match=error):
            bubblewrap.check_root(RootFileSystem(path))
    from conformance import processes_with

    assert not processes_with("sleep\x007743")


def test_a_build_is_made_once_for_all_sandboxes_of_a_process(bubblewrap, tmp_path):
    path = dockerfile(tmp_path, "RUN mkdir -p /opt && date +%N >/opt/made")
    first = listing(bubblewrap, path)
    shutil.rmtree(tmp_path / "files")
    assert listing(bubblewrap, path) == first


@pytest.mark.parametrize("level", ["bubblewrap", "docker"])
def test_a_place_of_the_image_that_everybody_may_write_to_is_read_only_all_the_same(level, request, tmp_path):
    provider = request.getfixturevalue(level)
    path = dockerfile(tmp_path, "RUN mkdir -p /open && chmod 777 /open")

    async def main():
        sandbox = await provider.open(None, root=RootFileSystem(path))
        try:
            return (await sandbox.run("touch /open/x; ls /open", 30)).output
        finally:
            await sandbox.close()

    assert "Read-only file system" in asyncio.run(main())
