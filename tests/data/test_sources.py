"""The conversation files: what is read back is what was written, and mistakes are named by file and line."""

import functools
import gzip
import http.server
import itertools
import json
import subprocess
import sys
import threading

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from north_lightning.data import SampleReader, Shard, read_samples, write_samples
from north_lightning.data.sources import sample_from_json, sample_to_json
from north_lightning.errors import ConfigError, DataError
from north_lightning.types import Conversation, Message, ToolCall, ToolSpec

text = st.text(st.characters(codec="utf-8"), max_size=12)
name = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
arguments = st.dictionaries(
    text, text | st.integers() | st.booleans() | st.none() | st.lists(text, max_size=2), max_size=3
)
assistant = st.builds(
    Message,
    role=st.just("assistant"),
    content=text,
    reasoning=text,
    tool_calls=st.lists(st.builds(ToolCall, id=name, name=name, arguments=arguments), max_size=2).map(tuple),
)
other = st.builds(Message, role=st.sampled_from(["system", "user"]), content=text)
result = st.builds(Message, role=st.just("tool"), content=text, tool_call_id=text)
conversation = st.builds(
    Conversation,
    messages=st.lists(assistant | other | result, min_size=1, max_size=5).map(tuple),
    tools=st.lists(st.builds(ToolSpec, name=name, description=text, parameters=arguments), max_size=2).map(tuple),
    source=text,
    harness=text,
    environment=text,
    repo=text,
    task_id=text,
    verified=st.sampled_from([None, True, False]),
)


@settings(deadline=None, max_examples=100)
@given(sample=conversation)
def test_a_sample_survives_the_way_to_json_and_back(sample):
    assert sample_from_json(json.loads(json.dumps(sample_to_json(sample)))) == sample


def test_files_are_read_back_in_order_and_equal(tmp_path):
    samples = [Conversation((Message("user", f"line one\nline {i}\u2028 é"),), source="s") for i in range(5)]
    assert write_samples(tmp_path / "new" / "a.jsonl", samples) == 5
    assert list(read_samples(tmp_path / "new" / "a.jsonl")) == samples
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.jsonl"]


def test_a_failing_writer_leaves_the_old_file_alone(tmp_path):
    old = [Conversation((Message("user", "old"),))]
    write_samples(tmp_path / "a.jsonl", old)

    def broken():
        yield Conversation((Message("user", "new"),))
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        write_samples(tmp_path / "a.jsonl", broken())
    assert list(read_samples(tmp_path / "a.jsonl")) == old
    assert len(list(tmp_path.iterdir())) == 1


def test_openai_messages_with_string_arguments_and_null_content_are_read():
    record = {
        "messages": [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "hm",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": {"y": [1]}}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": "ok"},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
        ],
    }
    sample = sample_from_json(record)
    assert sample.messages == (
        Message("user", "hi"),
        Message("assistant", reasoning="hm", tool_calls=(ToolCall("a", "f", {"x": {"y": [1]}}),)),
        Message("tool", "ok", tool_call_id="a"),
    )
    assert sample.tools == (ToolSpec("f", "d", {"type": "object"}),)


GOOD = '{"messages": [{"role": "user", "content": "x"}]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting property name .* at character"),
        ('{"messages": NaN}', "strict JSON, got NaN"),
        ("[]", r"\$: expected an object, got list"),
        ("{}", r"\$.messages: expected a list, got NoneType"),
        ('{"messages": []}', r"\$.messages: expected at least one"),
        ('{"messages": [{"role": "robot"}]}', r"messages\[0\].role: expected one of"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"messages\[0\].content: expected a string"),
        ('{"messages": [{"role": "user", "content": "x"}], "label": 1}', "got label"),
        ('{"messages": [{"role": "user", "thinking": "x"}]}', "got thinking"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "tool_call_id"),
        ('{"messages": [{"role": "user", "tool_call_id": "1"}]}', "tool_call_id"),
        ('{"messages": [{"role": "user", "reasoning_content": "x"}]}', "of an assistant only"),
        (
            '{"messages": [{"role": "assistant", "tool_calls": '
            '[{"id": "0", "function": {"name": "f", "arguments": "{"}}]}]}',
            r"tool_calls\[0\].function.arguments: expected JSON",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": '
            '[{"id": "0", "function": {"name": "f", "arguments": []}}]}]}',
            "arguments: expected an object",
        ),
        (
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]}',
            r"id: expected a non-empty string",
        ),
        ('{"messages": [{"role": "user"}], "tools": [{"name": "f"}]}', r"tools\[0\]: expected only"),
    ],
)
def test_a_line_that_is_no_sample_is_refused_with_file_and_line(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(DataError, match=r"bad.jsonl:3: .*" + message):
        list(read_samples(tmp_path / "bad.jsonl"))


def test_so_many_broken_lines_are_skipped_as_the_budget_allows_and_are_listed(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n{{\n{GOOD}\n[]\n{GOOD}\n")
    reader = SampleReader([tmp_path / "a.jsonl"], max_broken=2)
    assert len(list(reader)) == reader.num_read == 3
    assert [line.partition("a.jsonl")[2][:5] for line in reader.broken] == [":2: $", ":4: $"]
    with pytest.raises(
        DataError, match=r"a.jsonl:4: \$: expected an object, got list \(broken record 2 of at most 1\)"
    ):
        list(SampleReader([tmp_path / "a.jsonl"], max_broken=1))


def write_numbered(path, numbers):
    return write_samples(path, [Conversation((Message("user", str(number)),)) for number in numbers])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_are_disjoint_and_taking_turns_gives_the_whole_back(tmp_path, count):
    write_numbered(tmp_path / "a.jsonl", range(11))
    write_numbered(tmp_path / "b.jsonl", range(11, 17))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    parts = [[s.messages[0].content for s in SampleReader(files, shard=Shard(i, count))] for i in range(count)]
    turns = [number for row in itertools.zip_longest(*parts) for number in row if number is not None]
    assert turns == [str(number) for number in range(17)]


def test_workers_of_ranks_share_the_records_among_them():
    shards = {Shard.of_worker(rank, 4, worker, 3) for rank in range(4) for worker in range(3)}
    assert shards == {Shard(index, 12) for index in range(12)}
    with pytest.raises(ConfigError, match="index from 0 to 1"):
        Shard(2, 2)


def test_parquet_gzip_json_and_patterns_give_the_same_samples(tmp_path):
    samples = [Conversation((Message("user", f"é {i}"), Message("assistant", "a")), source="s") for i in range(5)]
    write_samples(tmp_path / "a.jsonl", samples)
    records = [sample_to_json(sample) for sample in samples]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=2)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    for name in ("a.jsonl", "a.parquet", "a.jsonl.gz", "a.json", "*.parquet", f"file://{tmp_path}/a.jsonl"):
        assert list(SampleReader([name if "://" in name else tmp_path / name])) == samples


def test_records_are_streamed_not_loaded(tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\nnot JSON\n")
    assert next(read_samples(tmp_path / "a.jsonl")).messages[0].content == "x"


def test_files_from_a_server_are_read_like_local_ones(tmp_path):
    write_numbered(tmp_path / "a.jsonl", range(3))
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        remote = list(SampleReader([f"http://127.0.0.1:{server.server_port}/a.jsonl"]))
        server.shutdown()
    assert remote == list(read_samples(tmp_path / "a.jsonl"))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): ...


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl"):
        next(read_samples(tmp_path / "none.jsonl"))


def test_reading_and_writing_samples_does_not_import_torch():
    code = "import sys, north_lightning.data as d; d.write_samples; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000])
@pytest.mark.parametrize("as_text", [True, False])
def test_numbers_and_depths_that_python_refuses_are_broken_lines(tmp_path, value, as_text):
    arguments = f'{{"a": {value}}}'
    call = f'{{"id": "1", "function": {{"name": "t", "arguments": {json.dumps(arguments) if as_text else arguments}}}}}'
    line = f'{{"messages": [{{"role": "assistant", "tool_calls": [{call}]}}]}}\n'
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"a\.jsonl:1: \$.*expected JSON"):
        list(read_samples(tmp_path / "a.jsonl"))


def test_damaged_compression_and_unknown_systems_are_named(tmp_path):
    content = gzip.compress(b'{"messages": [{"role": "user", "content": "q"}]}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(content[:-20])
    (tmp_path / "none.jsonl.gz").write_bytes(b"{}")
    for name in ("cut.jsonl.gz", "none.jsonl.gz"):
        with pytest.raises(DataError, match=rf"{name}: expected to read on"):
            list(read_samples(tmp_path / name))
    with pytest.raises(DataError, match="foo://x: expected a file of conversations, got: Protocol not known"):
        list(read_samples("foo://x"))
