"""Files that the programs themselves wrote (``tests/fixtures/trajectories/make.py``): all of them load, whole."""

import importlib.util
import json
from pathlib import Path

import pytest

from north_lightning.data import SampleFilter, SampleReader
from north_lightning.data.formats import Trajectories
from north_lightning.harnesses.terminus_reply import read_reply

FOLDER = Path(__file__).parents[1] / "fixtures" / "trajectories"
spec = importlib.util.spec_from_file_location("make_trajectories", FOLDER / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
NO_TRAJECTORIES = (".py", ".replies.json", "_events.jsonl")
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file() and not path.name.endswith(NO_TRAJECTORIES))
FORMATS = {"mini": "mini_swe_agent", "swe": "swe_agent", "swesmith": "messages", "llamafactory": "messages"}


def read(path):
    importer = Trajectories()
    return list(SampleReader([path], importer)), importer.account()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_program_wrote_is_kept_and_understood(path):
    samples, account = read(path)
    fit = SampleFilter()
    sound = [True, False] if "inspect" in path.name else [True]  # the second answer is wrong
    assert [fit.passes(sample) for sample in samples] == sound, fit.examples
    assert account["not_understood"] == {}
    expected = {"swesmith_tool.jsonl": "swe_smith", "llamafactory_sharegpt.jsonl": "sharegpt"}
    kind = path.name.partition("_")[0].partition(".")[0]
    assert list(account["formats"]) == [expected.get(path.name, FORMATS.get(kind, kind))]
    for sample in samples:
        said = [message for message in sample.messages if message.role == "assistant"]
        assert said == [message for message in said if message.trained]
        assert sample.messages[-1] is said[-1]
        text = "\n".join(json.dumps(dict(call.arguments)) for turn in said for call in turn.tool_calls)
        text += "\n".join(turn.content + turn.reasoning for turn in said)
        assert make.LOOK.split()[-1] in text
        assert ("sed -i" in text or "a + b" in text) == ("llamafactory" not in path.name)
        assert any(make.TASK in message.content for message in sample.messages) == (path.name != "atif_swe_agent.json")
        seen = [message.content for message in sample.messages if message.role in ("tool", "user")]
        assert any("return a - b" in content for content in seen) == ("terminus" not in path.name)


@pytest.mark.parametrize("parser", ["json", "xml"])
def test_replies_of_terminus_2_say_what_the_model_said_and_raw_ones_are_the_same_bytes(parser):
    replies = json.loads((FOLDER / f"atif_terminus_{parser}.replies.json").read_text())
    told = {}
    for way in ("", "_raw"):
        (sample,), _ = read(FOLDER / f"atif_terminus_{parser}{way}.json")
        assert (sample.harness, sample.tools) == ("terminus2", ())
        told[way] = [message.content for message in sample.messages if message.role == "assistant"]
    assert told["_raw"] == replies
    assert told[""] == replies if parser == "xml" else True
    if parser == "json":
        assert [one if one == replies[1] else json.loads(one) for one in told[""]] == [
            one if one == replies[1] else json.loads(one) for one in replies
        ]
        assert [read_reply(one) for one in told[""]] == [read_reply(one) for one in replies]


def test_the_same_calls_come_out_of_mini_swe_agents_file_and_of_harbors_conversion_of_it():
    for kind in ("calls", "responses"):
        (own,), _ = read(FOLDER / f"mini_{kind}.traj.json")
        (converted,), _ = read(FOLDER / f"atif_mini_{kind}.json")
        assert own.harness == converted.harness == "mini_swe_agent"
        for sample in (own, converted):
            calls = [call for message in sample.messages for call in message.tool_calls]
            assert [call.arguments["command"] for call in calls] == [command for _, command in make.TURNS]
        assert [m.reasoning for m in own.messages] == [m.reasoning for m in converted.messages]
        assert [m.content for m in own.messages] == [m.content for m in converted.messages]


def test_an_inspect_log_is_the_same_in_both_its_forms_with_its_verdicts():
    plain, archive = (read(FOLDER / f"inspect.{kind}")[0] for kind in ("json", "eval"))
    assert [sample.verified for sample in plain] == [True, False]
    assert [sample.messages[2:] for sample in plain] == [sample.messages[2:] for sample in archive]
    assert plain[0].tools[0].description == "Run a command."
    assert plain[0].messages[2].reasoning == f"Hm.\n\n{make.TURNS[0][0]}"
