"""Root file systems from OCI images: as the engine itself unpacks them, whatever a hostile layer tries."""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import tarfile

import pytest
from oci_images import layer_of, member, tar_of, write_oci_archive
from root_file_system import make_root_file_system

from north_lightning.errors import ConfigError
from north_lightning.harnesses import MiniSWEAgentHarness
from north_lightning.rollout.settings import AttemptSettings
from north_lightning.sandbox import BubblewrapProvider, layers
from north_lightning.sandbox.layers import unpack_image
from north_lightning.tasks import load_task
from north_lightning.verifiers import UnitTestVerifier

DIRECTORY = tarfile.DIRTYPE


def seen_in(root):
    """Path -> (kind, rights, content) of everything in a directory."""
    seen = {}
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            status = os.lstat(path)
            kind, rights = stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode)
            if stat.S_ISLNK(status.st_mode):
                content, rights = os.readlink(path), 0
            else:
                content = open(path, "rb").read() if stat.S_ISREG(status.st_mode) else ""  # noqa: SIM115
            seen[os.path.relpath(path, root)] = (kind, rights, content)
    return seen


@pytest.fixture(scope="session")
def small_root(tmp_path_factory):
    return make_root_file_system(tmp_path_factory.mktemp("small") / "root", with_python=False)


def test_an_image_is_unpacked_as_the_engine_unpacks_it(engine, small_root, tmp_path):
    docker = pytest.importorskip("docker")
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed: nothing writes an OCI archive")
    (small_root / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    (tmp_path / "Dockerfile").write_text(
        "FROM localhost/north-layers:base\nENV A=b=c\nWORKDIR /srv/app\n"
        "RUN mkdir -p a/b c && touch a/b/1 a/b/2 a/3 c/4 && ln c/4 c/5 && ln -s ../c a/link && chmod 750 a/b\n"
        "RUN rm a/b/1 && rm -r c && mkdir c && touch c/new && rm a/link && mkdir a/link && mv a/3 a/4\n"
        "RUN rm -r a/b && ln -s nowhere a/b && echo more >>a/4 && rm /usr/bin/yes\n"
    )
    podman = ["podman", "--remote", "--url", engine]
    for folder, tag in ((small_root, "base"), (tmp_path, "top")):
        subprocess.run(
            [*podman, "build", "-q", "--layers", "-t", f"localhost/north-layers:{tag}", str(folder)],
            check=True, capture_output=True,
        )  # fmt: skip
    archive = tmp_path / "image.tar"
    subprocess.run(
        [*podman, "save", "-q", "--format", "oci-archive", "-o", str(archive), "localhost/north-layers:top"], check=True
    )
    api = docker.APIClient(base_url=engine)
    container = api.create_container("localhost/north-layers:top", command="true")["Id"]
    (tmp_path / "exported.tar").write_bytes(b"".join(api.export(container)))
    api.remove_container(container)
    with tarfile.open(tmp_path / "exported.tar") as exported:
        exported.extractall(tmp_path / "exported", filter="fully_trusted")

    settings = unpack_image(archive, tmp_path / "ours")
    assert (settings.workdir, settings.variables["A"]) == ("/srv/app", "b=c")
    ours, theirs = seen_in(tmp_path / "ours"), seen_in(tmp_path / "exported")
    added_by_the_engine = {
        "dev",
        "proc",
        "sys",
        "run",
        "etc/hosts",
        "etc/hostname",
        "etc/resolv.conf",
        "run/.containerenv",
    }
    differing = {path for path in {*ours, *theirs} - added_by_the_engine if ours.get(path) != theirs.get(path)}
    assert differing == set()
    assert "usr/bin/yes" not in ours
    assert "srv/app/c/new" in ours


def unpacked(tmp_path, *layers_, **options):
    tmp_path.mkdir(exist_ok=True)
    unpack_image(write_oci_archive(tmp_path / "image.tar", layers_, **options), tmp_path / "out" / "root")
    return {path: content for path, (_, _, content) in seen_in(tmp_path / "out" / "root").items()}


FOLDER = member("f", type=DIRECTORY, mode=0o755)


@pytest.mark.parametrize("compress", [False, True])
def test_whiteouts_hide_what_lower_layers_hold_wherever_they_stand(tmp_path, compress):
    lower = layer_of(
        member("d/a", b"1"), member("d/b", b"1"), member("e/x", b"1"), member("f", b"1"), member("g/h", b"1")
    )
    upper = layer_of(
        member("d/.wh.a"),
        member("e/new", b"2"),
        member("e/.wh..wh..opq"),
        FOLDER,
        member("f/now", b"2"),
        member(".wh.g"),
        member("g/again", b"2"),
        *(member(name) for name in (".wh.never", "nowhere/.wh.x", "d/.wh...", "d/.wh..")),
    )
    assert unpacked(tmp_path, lower, upper, compress=compress) == {
        "d": "", "d/b": b"1", "e": "", "e/new": b"2", "f": "", "f/now": b"2", "g": "", "g/again": b"2",
    }  # fmt: skip


def test_rights_are_kept_and_set_ids_and_special_files_are_not(tmp_path):
    layer = layer_of(
        member("d", type=DIRECTORY, mode=0o2770), member("d/x", b"1", mode=0o6751),
        member("fifo", type=tarfile.FIFOTYPE), member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("also", type=tarfile.LNKTYPE, linkname="./d/x"),
    )  # fmt: skip
    unpacked(tmp_path, layer)
    found = {path: oct(rights) for path, (_, rights, _) in seen_in(tmp_path / "out" / "root").items()}
    assert found == {"d": "0o770", "d/x": "0o751", "also": "0o751"}


LINK = {"type": tarfile.SYMTYPE, "linkname": "../../outside"}


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ([member("../escaped", b"x")], "a path inside the image"),
        ([member("a/../../escaped", b"x")], "a path inside the image"),
        ([member("out", **LINK), member("out/escaped", b"x")], "without links"),
        ([member("out", **LINK), member("out/.wh.kept"), member("out/x")], "without links"),
        ([member("out", **LINK), member("out/.wh..wh..opq"), member("out/x")], "without links"),
        ([member("out", **LINK), member("mine", type=tarfile.LNKTYPE, linkname="out/kept")], "without links"),
        ([member("mine", type=tarfile.LNKTYPE, linkname="../../outside/kept")], "a path inside the image"),
        ([member("file", b"x"), member("file/below", b"x")], "without links or files"),
        (["deep"], "a path inside the image"),
    ],
)
def test_nothing_is_written_or_removed_outside(tmp_path, members, complaint):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    if members == ["deep"]:
        members = [member("/".join(["d"] * 200), b"x")]
    lower, upper = layer_of(*members[:1]), layer_of(*members[1:])
    with pytest.raises(ConfigError, match=complaint):
        unpacked(tmp_path, lower, upper)
    assert seen_in(tmp_path / "outside") == {"kept": (stat.S_IFREG, 0o644, b"kept")}
    assert not list(tmp_path.rglob("escaped"))


def test_an_absolute_name_is_one_inside(tmp_path):
    assert unpacked(tmp_path, layer_of(member("/etc/x", b"1"))) == {"etc": "", "etc/x": b"1"}


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "_FREE_BYTES", 1 << 20)
    with pytest.raises(ConfigError, match="grows more than 250 times"):
        unpacked(tmp_path / "ratio", layer_of(member("zeros", bytes(8 << 20))), compress=True)
    header = layer_of(member("x", b"", pax_headers={"comment": "y" * (2 << 20)}))
    with pytest.raises(ConfigError, match="headers of at most"):
        unpacked(tmp_path / "header", header)
    holes = tarfile.TarInfo("holes")
    holes.type, holes.size = tarfile.GNUTYPE_SPARSE, 0
    with pytest.raises(ConfigError, match="without holes"):
        unpacked(tmp_path / "sparse", layer_of((holes, b"")))
    monkeypatch.setattr(layers, "Limits", lambda: layers_limit(100, 3))
    with pytest.raises(ConfigError, match="more bytes or files"):
        unpacked(tmp_path / "bytes", layer_of(member("a", bytes(60))), layer_of(member("b", bytes(60))))
    with pytest.raises(ConfigError, match="more bytes or files"):
        unpacked(tmp_path / "files", layer_of(*(member(str(i)) for i in range(4))))


layers_limit = layers.Limits


def test_a_blob_must_be_what_its_digest_says(tmp_path):
    layer = layer_of(member("a", b"1"))
    blobs = {f"blobs/sha256/{hashlib.sha256(layer).hexdigest()}": layer_of(member("a", b"2"))}
    with pytest.raises(ConfigError, match="has another digest"):
        unpacked(tmp_path, layer, blobs=blobs)


def test_what_is_no_image_is_said_so(tmp_path):
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(ConfigError, match="cannot be unpacked as an OCI image"):
        unpack_image(tmp_path / "text", tmp_path / "a")
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "text", "text")
    with pytest.raises(ConfigError, match=r"there is no index.json in it"):
        unpack_image(tmp_path / "other.tar", tmp_path / "b")
    index = json.dumps({"manifests": [{"digest": "sha256:0", "platform": {"architecture": "other"}}]}).encode()
    with pytest.raises(ConfigError, match="no image for linux/"):
        unpacked(tmp_path, blobs={"index.json": index})


# ---- under bubblewrap


@pytest.fixture(scope="session")
def on_image(small_root, tmp_path_factory):
    """Bubblewrap with an OCI image under the name ``debian:12``: a small system, files in its WORKDIR, a marker."""
    files = layer_of(
        member("srv/app/given", b"given\n"), member("marker", b"image\n"), member("srv/app/out/old", b"old\n"),
        member("etc/os-release", b"NAME=ours\n"),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("image") / "image.tar"
    config = {"WorkingDir": "/srv/app", "Env": ["COLOUR=blue", "PATH=/usr/bin", "HOME=/root"]}
    write_oci_archive(path, [tar_of(small_root), files], config=config, compress=True)
    return BubblewrapProvider(images={"debian:12": path})


def write_task(folder, toml, test):
    folder.mkdir(exist_ok=True)
    (folder / "tests").mkdir()
    (folder / "task.toml").write_text(toml)
    (folder / "instruction.md").write_text("Do it.\n")
    (folder / "tests" / "test.sh").write_text(test)
    return load_task(folder)


def test_bubblewrap_runs_and_grades_a_task_on_the_image_it_names(on_image, tmp_path, solve):
    expected = "$(printf 'blue\\n/srv/app\\ngiven\\nimage\\nNAME=ours')"
    test = f'[ "$(cat answer)" = "{expected}" ] && echo 1 >/logs/verifier/reward.txt\n'
    task = write_task(tmp_path / "task", '[environment]\ndocker_image = "debian:12"\n', test)
    command = (
        "{ echo $COLOUR; pwd; cat /srv/app/given /marker /etc/os-release; } >answer; "
        "touch /var/tmp/x /home/agent/x /work/x; ! touch /marker /usr/x /srv/x 2>/dev/null && ls /srv/app/x /tmp/x"
    )
    rollout = solve(task, on_image, command)
    assert rollout.reward.value == 1.0, rollout.reward.details
    said = json.loads(next(message.content for message in rollout.messages if message.role == "tool"))
    assert said["output"] == "/srv/app/x\n/tmp/x\n"


def test_bubblewrap_grades_apart_on_an_image(on_image, tmp_path, solve):
    toml = 'artifacts = ["/srv/app/out"]\n[verifier]\nenvironment_mode = "separate"\n[environment]\n'
    toml += 'docker_image = "debian:12"\nworkdir = "/srv/app"\n'
    test = '[ "$(echo out/* *)" = "out/new given out" ] && echo 1 >/logs/verifier/reward.txt\n'
    rollout = solve(write_task(tmp_path / "task", toml, test), on_image, "rm out/old given; touch out/new note")
    assert rollout.reward.value == 1.0, rollout.reward.details


def test_a_directory_is_a_root_file_system_under_bubblewrap(small_root, tmp_path, solve):
    task = write_task(
        tmp_path / "task", '[environment]\ndocker_image = "mine"\n', "[ -e x ] && echo 1 >/logs/verifier/reward.txt\n"
    )
    provider = BubblewrapProvider(images={"mine": small_root})
    rollout = solve(task, provider, "[ ! -e /usr/share/doc ] && [ -e /usr/bin/tmux ] && touch x")
    assert rollout.reward.value == 1.0


def test_an_image_that_bubblewrap_has_not_is_named_before_anything_runs(on_image, tmp_path):
    settings = AttemptSettings(
        harnesses={"terminal": MiniSWEAgentHarness()}, verifier=UnitTestVerifier(), sandboxes=on_image
    )
    task = write_task(tmp_path / "task", '[environment]\ndocker_image = "other:1"\n', "true\n")
    with pytest.raises(ConfigError, match="images: expected an entry for 'other:1', which a task names, got debian:12"):
        settings.prepare([task])
