"""Archives, checkpoints, data files and names of strangers: bounded, and confined to their target."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hostile_world import World
from pyarrow import parquet

from north_lightning.chat import NorthTokenizer
from north_lightning.cli import main
from north_lightning.data.decontamination import _repositories
from north_lightning.data.dedup import Duplicate
from north_lightning.data.filters import InvalidToolCall, SampleFilter, TruncatedEnding
from north_lightning.data.formats import OpenAIMessages, Trajectories
from north_lightning.data.instances import repository_of
from north_lightning.data.sources import SampleReader
from north_lightning.errors import CheckpointError, ConfigError, DataError, TaskError, TokenizerError
from north_lightning.model.checkpoint import check_replaceable, load_checkpoint, save_checkpoint
from north_lightning.model.config import NorthConfig
from north_lightning.model.decoder import NorthModel
from north_lightning.sandbox.layers import unpack_image
from north_lightning.sandbox.slots import Host
from north_lightning.synthesis import COUNTS, _print
from north_lightning.types import Conversation, Message, ToolCall, ToolSpec
from north_lightning.views.charts import bar_chart, share_bars

SIZES = {
    "vocab_size": 600,
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "sliding_window": 4,
    "max_position_embeddings": 32,
}


@contextmanager
def bounded(seconds: float = 20.0, mebibytes: int = 3000) -> Iterator[None]:
    """In so much CPU time and additional memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - started < seconds
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < mebibytes


# ---- images --------------------------------------------------------------------------------------------------------


def layout(world: World, *layers: bytes, size: int | None = None, **changes: Any) -> Path:
    """An OCI image in a directory."""
    root = world.root / "input" / "image"
    blobs = root / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def blob(kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        named = f"application/vnd.oci.image.{kind}"
        return {"mediaType": named, "digest": f"sha256:{digest}", "size": len(data) if size is None else size}

    packed = [blob("layer.v1.tar+gzip", layer) for layer in layers]
    config = blob("config.v1+json", json.dumps(changes.get("config", {"config": {}})).encode())
    manifest = blob("manifest.v1+json", json.dumps({"config": config, "layers": packed}).encode())
    (root / "index.json").write_text(json.dumps(changes.get("index", {"manifests": [manifest]})))
    return root


def layer(*members: tuple[str, bytes, str] | tuple[str, bytes, str, Any]) -> bytes:
    """Members: name, type and where a link leads or what a file holds."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, kind, content, *more in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind == tarfile.REGTYPE:
                info.size = len(content)
            else:
                info.linkname = content
            info.mtime = more[0] if more else 0
            tar.addfile(info, io.BytesIO(content.encode()) if kind == tarfile.REGTYPE else None)
    return buffer.getvalue()


FILE, LINK, HARD, FOLDER = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE


def relinked(world: World, path: str, target: object) -> Path:
    root = layout(world, layer(("a", FILE, "x")))
    found = next(root.glob(path))
    found.unlink()
    os.symlink(str(target), found)
    return root


def huge(world: World) -> Path:
    root = layout(world, layer(("a", FILE, "x")))
    (root / "index.json").write_text('{"manifests": [' + " " * (20 << 20) + "]}")
    return root


def with_fifo(world: World) -> Path:
    root = layout(world)
    (root / "index.json").unlink()
    os.mkfifo(root / "index.json")
    return root


def long_member(world: World) -> Path:
    header = tarfile.TarInfo("zeros")
    header.size = 1 << 45
    return layout(world, gzip.compress(header.tobuf(format=tarfile.GNU_FORMAT) + b"\0" * 4096))


IMAGES: dict[str, Callable[[World], Path]] = {
    "the index is a link": lambda world: relinked(world, "index.json", world.private),
    "a blob is a link": lambda world: relinked(world, "blobs/sha256/*", world.private),
    "a blob is a device": lambda world: relinked(world, "blobs/sha256/*", "/dev/zero"),
    "the index is a FIFO": with_fifo,
    "the index is huge": huge,
    "the index is deep": lambda world: layout(world, index=eval("[" * 90 + "]" * 90) and {"a": [[[[[[1]]]]]]}),
    "the index is a list": lambda world: layout(world, index=[]),
    "manifests are numbers": lambda world: layout(world, index={"manifests": [3]}),
    "manifests are a text": lambda world: layout(world, index={"manifests": "x"}),
    "a digest is a path": lambda world: layout(world, index={"manifests": [{"digest": "sha256:../../../outside"}]}),
    "the configuration is a list": lambda world: layout(world, layer(("a", FILE, "x")), config={"config": [1]}),
    "variables are numbers": lambda world: layout(world, layer(("a", FILE, "x")), config={"config": {"Env": [3]}}),
    "a member leads out": lambda world: layout(world, layer(("../../x", FILE, "x"))),
    "a file through a link": lambda world: layout(
        world, layer(("d", LINK, "../../../outside/work"), ("d/x", FILE, "x"))
    ),
    "a folder through a link": lambda world: layout(world, layer(("d", LINK, "/tmp"), ("d/x/y", FOLDER, ""))),
    "a hard link out": lambda world: layout(world, layer(("h", HARD, "../../outside/private/key.txt"))),
    "a hard link through a link": lambda world: layout(
        world, layer(("d", LINK, str(world.private.parent)), ("h", HARD, "d/key.txt"))
    ),
    "a hard link to nowhere": lambda world: layout(world, layer(("h", HARD, ""))),
    "a time that is none": lambda world: layout(world, layer(("a", FILE, "x", 1e300))),
    "a size that lies": lambda world: layout(world, gzip.compress(layer_of_zeros(120 << 20)), size=10**15),
    "a member without end": long_member,
    "no gzip": lambda world: layout(world, b"x" * 100),
}


def layer_of_zeros(size: int) -> bytes:
    info = tarfile.TarInfo("zeros")
    info.size = size
    return info.tobuf() + b"\0" * size


@pytest.mark.usefixtures("reads_are_noticed")
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_stays_in_its_destination(name: str, world: World) -> None:
    image = IMAGES[name](world)
    with bounded(), pytest.raises(ConfigError) as raised:
        unpack_image(image, world.target / "root")
    world.said += str(raised.value)


def test_whiteouts_remove_nothing_outside(world: World) -> None:
    first = layer(("d", LINK, str(world.outside / "work")))
    second = layer(
        ("d/.wh.notes.txt", FILE, ""), ("d/.wh..wh..opq", FILE, ""), (".wh...", FILE, ""), (".wh..", FILE, "")
    )
    unpack_image(layout(world, first, second), world.target / "root")
    assert os.readlink(world.target / "root" / "d") == str(world.outside / "work")


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_checkpoint(NorthModel(NorthConfig(**SIZES)), folder)
    return folder


CONFIGS: dict[str, Any] = {
    "a billion layers": {"num_hidden_layers": 10**9},
    "a billion experts": {"num_experts": 10**9},
    "a number of 4,000 digits": {"hidden_size": 10**4000},
    "a text as number": {"hidden_size": "8"},
    "a list as number": {"head_dim": [4]},
    "layer types that are a number": {"layer_types": 3},
    "layer types that are lists": {"layer_types": [["x"]]},
    "rope that is a list": {"rope_parameters": [1]},
    "rope that is a text": {"rope_theta": "fast"},
    "rope that is endless": {"rope_theta": 1e400},
    "a norm that is a list": {"rms_norm_eps": []},
    "first_k_dense_replace that is a text": {"first_k_dense_replace": "x"},
    "deep": {"x": None},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_other_values_is_named(name: str, checkpoint: Path, world: World) -> None:
    folder = world.root / "input" / "model"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | CONFIGS[name]
    config.pop("mlp_layer_types", None)
    text = json.dumps(config)
    if name == "deep":
        text = text[:-1] + ', "y": ' + "[" * 3000 + "]" * 3000 + "}"
    (folder / "config.json").write_text(text)
    with bounded(5), pytest.raises((ConfigError, CheckpointError)) as raised:
        load_checkpoint(folder)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": []},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "b"}},
        *(
            {"weight_map": {"model.embed_tokens.weight": one}}
            for one in ("../b.safetensors", "/etc/passwd", "..", "", "a\0b")
        ),
    ],
)
def test_an_index_names_files_of_its_folder(index: Any, checkpoint: Path, world: World) -> None:
    folder = world.root / "input" / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


@pytest.mark.usefixtures("reads_are_noticed")
@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "tokenizer_config.json"])
def test_files_that_are_carried_are_the_checkpoints_own(name: str, checkpoint: Path, world: World) -> None:
    folder = world.root / "input" / "model"
    shutil.copytree(checkpoint, folder)
    (folder / "tokenizer.json").write_text("{}")
    model = load_checkpoint(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(world.private)
    with pytest.raises(CheckpointError, match="leads out"):
        save_checkpoint(model, world.target / "saved", tokenizer_dir=folder)
    # Hugging Face's own cache links its files to a folder beside.
    cache = world.root / "input" / "models--a--b"
    (cache / "snapshots" / "1").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "x").write_text("{}")
    (cache / "snapshots" / "1" / "tokenizer.json").symlink_to("../../blobs/x")
    save_checkpoint(model, world.target / "saved", tokenizer_dir=cache / "snapshots" / "1")
    assert (world.target / "saved" / "tokenizer.json").read_text() == "{}"
    assert not (world.target / "saved" / "tokenizer.json").is_symlink()


def test_a_checkpoint_replaces_nothing_but_a_checkpoint(checkpoint: Path, world: World) -> None:
    model = load_checkpoint(checkpoint)
    (world.target / "results").mkdir()
    (world.target / "results" / "config.json").write_text("{}")
    (world.target / "results" / "data").mkdir()
    for folder in (world.outside, world.outside / "work", world.target / "results", world.target):
        with pytest.raises(CheckpointError, match="will not replace"):
            save_checkpoint(model, folder)
        with pytest.raises(CheckpointError, match="will not replace"):
            check_replaceable(folder)
    (world.target / "run" / "step-5").mkdir(parents=True)
    check_replaceable(world.target / "run")


@pytest.mark.parametrize(
    "vocabulary", [{"a": 4_000_000_000}, {"a": 50_000_000, "b": 1}, {}], ids=["a huge id", "a large id", "none"]
)
def test_ids_of_a_tokenizer_are_as_many_as_its_tokens(vocabulary: dict[str, int], world: World) -> None:
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    content = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    (world.root / "input" / "tokenizer.json").write_text(json.dumps({**content, "decoder": None, "model": model}))
    with bounded(5), pytest.raises(TokenizerError):
        NorthTokenizer.load(world.root / "input")


# ---- data ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Conversation]:
    return list(SampleReader([path], OpenAIMessages()))


SAMPLE = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def calling(arguments: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}


def nested(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    "suffix",
    [".jsonl.gz", ".json.gz", *(pytest.param(one, marks=pytest.mark.long) for one in (".jsonl.bz2", ".jsonl.xz"))],
)
def test_a_record_that_grows_without_end_is_named(suffix: str, world: World) -> None:
    path = world.root / "input" / f"rows{suffix}"
    program = {"gz": "gzip -1", "bz2": "bzip2 -1", "xz": "xz -0"}[suffix.rpartition(".")[2]]
    subprocess.run(
        ["bash", "-c", f"{{ echo '{json.dumps(SAMPLE)}'; head -c 120000000 /dev/zero; }} | {program} > {path}"],
        check=True,
    )
    assert path.stat().st_size < 2 << 20
    with (
        bounded(mebibytes=600),
        pytest.raises(DataError, match=r"rows\.json.*expected (a record of at most|a document of at most|JSON)"),
    ):
        read(path)


def test_lines_that_are_many_and_empty_are_named(world: World) -> None:
    path = world.root / "input" / "rows.jsonl.bz2"
    subprocess.run(["bash", "-c", f"yes '' | head -c 20000000 | bzip2 > {path}"], check=True)
    with (
        bounded(30),
        pytest.raises(DataError, match=r"rows.jsonl.bz2:\d+: expected a file that grows at most 250 times"),
    ):
        read(path)


@pytest.mark.parametrize(
    "line",
    [nested(200), nested(100_000), json.dumps(calling(nested(200))), json.dumps(calling(nested(50_000))), "9" * 5000,
     json.dumps({"messages": nested(3000)}), json.dumps({**SAMPLE, "tools": "[" * 3000})],
    ids=range(7),
)  # fmt: skip
def test_a_record_that_is_too_deep_names_its_line(line: str, world: World) -> None:
    path = world.root / "input" / "rows.jsonl"
    path.write_text(f"{json.dumps(SAMPLE)}\n{line}\n")
    with pytest.raises(DataError, match=r"rows.jsonl:2: "):
        read(path)


def test_times_of_parquet_are_texts_or_named(world: World) -> None:
    path = world.root / "input" / "rows.parquet"
    fine = pyarrow.array([1], pyarrow.timestamp("us", tz="UTC"))
    table = {"messages": [SAMPLE["messages"]], "created": fine}
    parquet.write_table(pyarrow.table(table), path)
    assert len(read(path)) == 1
    for unit, value in (("ms", 2**50), ("ns", 2**60 + 1), ("us", -(2**62))):
        created = pyarrow.array([value], pyarrow.timestamp(unit))
        parquet.write_table(pyarrow.table({**table, "created": created}), path)
        with pytest.raises(DataError, match="rows.parquet"):
            read(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="rows.parquet"):
        read(path)


def fault_of(schema: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    messages = (Message("user", "a"), Message("assistant", tool_calls=(ToolCall("0", "f", arguments),)))
    return InvalidToolCall().find_fault(Conversation(messages, (ToolSpec("f", "", schema),)))


def doubled(levels: int = 40, keyword: str = "allOf", last: str = "object") -> dict[str, Any]:
    definitions = {f"d{n}": {keyword: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(levels)}
    return {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{levels}": {"type": last}}}


SCHEMAS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nested repetition": ({"properties": {"a": {"pattern": "^(a+)+$"}}}, {"a": "a" * 60 + "!"}),
    "alternatives": ({"properties": {"a": {"pattern": "^(a|aa)+$"}}}, {"a": "a" * 200 + "!"}),
    "backward reference": ({"properties": {"a": {"pattern": r"(x+x+)+y\1"}}}, {"a": "x" * 80}),
    "many repetitions": ({"properties": {"a": {"pattern": ".*" * 12 + "b"}}}, {"a": "a" * 3000}),
    "references that double": (doubled(), {}),
    "a reference to itself": ({"$ref": "#"}, {}),
    "alternatives that double": (doubled(keyword="anyOf", last="null"), {}),
    "unique items": ({"properties": {"a": {"uniqueItems": True}}}, {"a": [{"n": n} for n in range(20_000)]}),
    "a pattern that is none": ({"properties": {"a": {"pattern": "(" * 5000}}}, {"a": "x"}),
    "a pattern that counts": ({"properties": {"a": {"pattern": "a{99999999999}"}}}, {"a": "x"}),
    "a number without a multiple": ({"properties": {"a": {"multipleOf": 1e-300}}}, {"a": 10**400}),
    "a reference to a file": ({"$ref": "file:///etc/passwd"}, {}),
    "a reference to the network": ({"$ref": "http://169.254.169.254/x"}, {}),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_of_a_tool_costs_a_bounded_time(name: str, world: World) -> None:
    with bounded(10):
        assert fault_of(*SCHEMAS[name]) is not None


def test_names_of_properties_are_not_matched_by_patterns(world: World) -> None:
    schema = {"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False, "required": ["b"]}
    with bounded(5):
        assert fault_of(schema, {"a" * 60 + "!": 1, "b": 1}) is None
        assert "required" in str(fault_of(schema, {"a": 1}))
    assert "multiple of" in str(fault_of({"properties": {"a": {"multipleOf": 2}}}, {"a": 3}))
    assert "does not match" in str(fault_of({"properties": {"a": {"pattern": "^b"}}}, {"a": "a"}))


FLOODS = {
    "new lines": "\n " * 100_000,
    "blanks": " \t" * 50 * 2_000 + "x",
    "underscores": "a__" * 50_000,
    "dashes": "a__b-" * 50_000,
    "clones": "git clone " * 20_000 + "github.com",
    "markers": "<|" * 100_000,
    "brackets": "【" * 50_000,
    "notes": "[^1" * 50_000,
    "semicolons": ";\n" * 100_000,
    "thoughts": "<think>" * 20_000,
    "ends of thoughts": "x</think>\n<think>" * 20_000,
    "calls": "<tool_call>" * 20_000,
    "responses": "<tool_response>" * 20_000,
    "instances": "a-__b_s_c_1776_" * 10_000,
    "addresses": "git+https://" * 20_000,
    "names": "github.com/a/b/" * 20_000,
    "tags": "<issue>" * 30_000,
    "tasks": "You are an AI assistant as JSON " + "\nTask Description:\n" * 20_000,
    "plans": "Analysis: " + "\nPlan: " * 20_000,
}


@pytest.mark.parametrize("name", FLOODS)
def test_our_own_patterns_take_a_bounded_time_on_any_text(name: str, world: World) -> None:
    text = FLOODS[name]
    with bounded(20):
        for message in (
            Message("assistant", text),
            Message("assistant", reasoning=text),
            Message("tool", text, tool_call_id="1"),
        ):
            sample = Conversation((Message("user", text), message), task_id=text[:3000])
            TruncatedEnding().find_fault(sample)
            for check in SampleFilter().filters:
                check.find_fault(sample)
            list(_repositories(sample))
            Duplicate().find_fault(sample)
        for role in ("user", "assistant", "tool"):
            messages = [{"role": "user", "content": text}, {"role": role, "content": text, "thinking": text}]
            Trajectories().convert({"messages": messages, "resolved": text})
        steps = [{"source": "user", "message": text}, {"source": "agent", "message": text}]
        Trajectories().convert({"schema_version": "ATIF-v1.7", "agent": {"name": "terminus-2"}, "steps": steps})
        assert repository_of("_" * 3000) == ""
        assert repository_of("a__b-1") == "a/b"


# ---- pages and terminals -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_of_strangers_are_drawn_as_they_are(world: World) -> None:
    names = [
        "$$",
        "$\\frac{",
        "_hidden",
        "<script>alert(1)</script>",
        "a" * 3000,
        "\x1b[2J\x00",
        "[/b]",
        "\\N{X}",
        "{x}",
        "&",
    ]
    svg = bar_chart(names, [("all $$", [0.5] * len(names))], xlabel="x") + share_bars(
        [("$$", {"_a$": 1.0})], xlabel="x"
    )
    assert "<script>" not in svg
    assert "\x1b" not in svg
    assert len(bar_chart([str(n) for n in range(50_000)], [("all", [0.5] * 50_000)], xlabel="x")) < 3_000_000


def test_messages_show_control_sequences_and_do_not_send_them(world: World) -> None:
    for kind in (TaskError, DataError, ConfigError, CheckpointError):
        text = str(kind("a\x1b[31m\x07\r\u202e\x9b b\n\tc é 字"))
        assert text == "a\\x1b[31m\\x07\\r\\u202e\\x9b b\n\tc é 字"


def test_families_are_no_markup_of_a_table(world: World) -> None:
    counts = dict.fromkeys(COUNTS, 1)
    families = {"[/b]\x1b": counts, "[link=x]y": counts}
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        _print({**counts, "by_harness": {}, "by_family": families, "dropped": {}}, Path("a"))
    assert "[/b]\\x1b" in shown.getvalue()
    assert "[link=x]y" in shown.getvalue()


# ---- configs, and other users of the machine -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "{class_path: os.system, init_args: {command: COMMAND}}",
        "{class_path: subprocess.Popen, init_args: {args: COMMAND, shell: true}}",
        "!!python/object/apply:os.system [COMMAND]",
        "{class_path: builtins.exec, init_args: {source: COMMAND}}",
        "os.system",
        "{class_path: north_lightning.sandbox.slots.Host, init_args: {root: /tmp}}",
    ],
)
def test_a_class_path_names_a_class_of_its_kind(value: str, world: World) -> None:
    path = world.root / "input" / "config.yaml"
    path.write_text(
        f"output_dir: {world.target}\npackages: {{a: '1'}}\n"
        f"sandboxes: {value.replace('COMMAND', json.dumps(world.command))}\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["tasks", "build", "--config", str(path)])
    assert ended.value.code == 2
    assert not world.marker.exists()


def test_a_folder_that_is_worked_in_shadows_no_package(world: World) -> None:
    for name in ("yaml", "jsonargparse", "torch", "httpx", "numpy", "lightning", "rich"):
        (world.target / f"{name}.py").write_text(f"open({str(world.marker)!r}, 'w')\n")
    command = [sys.executable, "-m", "north_lightning", "tasks", "check", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=world.target)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "0 of 1 ok"), done.stderr
    assert not world.marker.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
def test_a_sandboxs_files_are_closed_to_other_users(world: World) -> None:
    host = Host(None, 2, 700_000)
    slot = host.take(1 << 20, 100)
    try:
        (slot.directory / "work").mkdir(mode=0o777)
        (slot.directory / "work").chmod(0o777)
        (slot.directory / "work" / "reward.json").write_text("0")
        for script in (
            f"ls {slot.directory}",
            f"cat {slot.directory}/work/reward.json",
            f"echo 1 > {slot.directory}/work/reward.json",
        ):
            for user in (65534, 700_000 + slot.index + 1):
                words = ["setpriv", f"--reuid={user}", "--clear-groups", "bash", "-c", script]
                assert subprocess.run(words, capture_output=True).returncode != 0
        own = ["setpriv", f"--reuid={slot.uid}", "--clear-groups", "cat", f"{slot.directory}/work/reward.json"]
        assert subprocess.run(own, capture_output=True).stdout == b"0"
    finally:
        host.give_back(slot)
        host._finalizer()
