"""A release served by its own ``serve.sh``: chat with tools and reasoning, and the real OpenCode and mini-SWE-agent.

A random model of 0.1M parameters calls no tool, so for the agents its outputs are forced (``forced_outputs``), token by
token, inside the real server: chat template, parsers, streaming and HTTP are vLLM's, and the agents are unmodified.
That the model is also served without force is a test of its own.

The agents are not installed by anything here. ``NORTH_OPENCODE`` names the program of ``npm install
opencode-ai@1.18.33``, ``NORTH_MINI_SWE_AGENT`` the ``mini`` of ``pip install mini-swe-agent==2.4.6``; both are looked
for on the path too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from releases import SERVABLE, make_checkpoint

from north_lightning.chat import ChatFormat, NorthTokenizer
from north_lightning.chat.controls import CHATBOT
from north_lightning.export.command import export_checkpoint
from north_lightning.sampling.sidecar import free_port
from north_lightning.types import AssistantAction, ToolCall

CONTEXT = 60_000
TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def release(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("agents")
    shape = SERVABLE | {"max_position_embeddings": CONTEXT}
    export_checkpoint(make_checkpoint(inputs, folder / "checkpoint", shape), folder / "north", check=False)
    return folder / "north"


@pytest.fixture(scope="module")
def script(release: Path) -> Callable[..., None]:
    """``script(action, ...)``: what the served model says from now on, turn by turn; without any, what it wants to."""
    chat = ChatFormat(NorthTokenizer.load(release), reasoning=True)
    file = release.parent / "forced.json"

    def play(*turns: AssistantAction) -> None:
        content = {
            "tool": '"name": "bash"',
            "turn": chat.tokenizer.control_id(CHATBOT),
            "other": chat.encode_action(AssistantAction(reasoning="A title.", content="A title")),
            "turns": [chat.encode_action(turn) for turn in turns],
        }
        file.write_text(json.dumps(content))

    play()
    return play


@contextmanager
def served(release: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """Run ``serve.sh``; the URL once it answers."""
    port = free_port()
    command = [str(release / "serve.sh"), "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    log = release.parent / f"serve-{port}.log"
    variables = os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables | environment,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + 500
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                httpx.get(f"{url}/models", timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def endpoint(release: Path, script: Callable[..., None]) -> Iterator[str]:
    """A server whose model says what ``script`` was given."""
    here = str(Path(__file__).parent)
    with served(
        release,
        "--logits-processors=forced_outputs:ForcedOutputs",
        PYTHONPATH=here,
        FORCED_OUTPUTS=str(release.parent / "forced.json"),
    ) as url:
        yield url


def ask(url: str, messages: list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    body = {"model": "north", "messages": messages, "max_tokens": 200, **settings}
    answer: dict[str, Any] = httpx.post(f"{url}/chat/completions", json=body, timeout=120).raise_for_status().json()
    return answer


LOOK = AssistantAction("I look first.", tool_calls=(ToolCall("0", "bash", {"command": "cat question.txt"}),))
WRITE = AssistantAction("I write it.", tool_calls=(ToolCall("1", "bash", {"command": "echo 42 > answer.txt"}),))
DONE = AssistantAction("All done.", content="The answer is 42.")


def test_calls_reasoning_and_answers_come_out_of_the_served_release(endpoint: str, script: Callable[..., None]) -> None:
    script(LOOK, DONE)
    user = {"role": "user", "content": "What is the answer?"}
    message = ask(endpoint, [user], tools=[TOOL])["choices"][0]["message"]
    (call,) = message["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == (
        "bash",
        {"command": "cat question.txt"},
    )
    assert message["reasoning"] == "I look first."
    assert not message["content"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "What is the answer?"}
    choice = ask(endpoint, [user, message, result], tools=[TOOL])["choices"][0]
    assert choice["message"]["content"] == "The answer is 42."
    assert choice["message"]["reasoning"] == "All done."
    assert choice["finish_reason"] == "stop"


def test_the_random_model_itself_is_served(endpoint: str, script: Callable[..., None]) -> None:
    script()
    answer = ask(endpoint, [{"role": "user", "content": "hello"}], max_tokens=8, temperature=0)
    again = ask(endpoint, [{"role": "user", "content": "hello"}], max_tokens=8, temperature=0)
    assert answer["usage"]["completion_tokens"] in range(1, 9)
    assert answer["choices"] == again["choices"]
    assert answer["model"] == "north"


# ---- the real agents -------------------------------------------------------------------------------------------------


def program(variable: str, name: str) -> str:
    found = os.environ.get(variable) or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed: see the head of this file, then set {variable}")
    return found


def test_the_real_opencode_completes_a_task_with_tool_calls(
    endpoint: str, script: Callable[..., None], tmp_path: Path
) -> None:
    opencode = program("NORTH_OPENCODE", "opencode")
    script(LOOK, WRITE, DONE)
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    (work / "question.txt").write_text("What is six times seven?")
    models = {"north": {"limit": {"context": CONTEXT, "output": 4096}}}
    config = {
        "provider": {
            "north": {
                "npm": "@ai-sdk/openai-compatible",
                "options": {"baseURL": endpoint, "apiKey": "none"},
                "models": models,
            }
        },
        "model": "north/north",
        "autoupdate": False,
        "share": "disabled",
        "permission": {"*": "allow"},
    }
    (work / "opencode.json").write_text(json.dumps(config))
    variables = {
        "HOME": str(home),
        "XDG_DATA_HOME": str(home),
        "PATH": os.environ["PATH"],
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
    }
    command = [opencode, "run", "--format", "json", "Answer question.txt in answer.txt."]
    done = subprocess.run(
        command, cwd=work, env=variables, capture_output=True, text=True, timeout=400, stdin=subprocess.DEVNULL
    )
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    told = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, told
    used = [event["part"] for event in events if event["type"] == "tool_use"]
    assert [part["state"]["input"]["command"] for part in used] == ["cat question.txt", "echo 42 > answer.txt"], told
    assert "six times seven" in used[0]["state"]["output"]
    assert [event["part"]["text"] for event in events if event["type"] == "text"] == ["The answer is 42."], told
    assert (work / "answer.txt").read_text() == "42\n"


def test_the_real_mini_swe_agent_completes_a_task_with_tool_calls(
    endpoint: str, script: Callable[..., None], tmp_path: Path
) -> None:
    mini = program("NORTH_MINI_SWE_AGENT", "mini")
    submit = {"command": "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"}
    script(LOOK, WRITE, AssistantAction("I am done.", tool_calls=(ToolCall("2", "bash", submit),)))
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    (work / "question.txt").write_text("What is six times seven?")
    variables = {
        "HOME": str(home),
        "PATH": os.environ["PATH"],
        "OPENAI_API_KEY": "none",
        "MSWEA_CONFIGURED": "true",
        "MSWEA_GLOBAL_CONFIG_DIR": str(home),
        "MSWEA_COST_TRACKING": "ignore_errors",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    settings = [f"model.model_kwargs.api_base={endpoint}", "model.model_kwargs.temperature=1.0"]
    options = ["--model", "openai/north", "--yolo", "--exit-immediately", "--output", str(home / "trajectory.json")]
    command = [mini, *options, "--task", "Answer question.txt in answer.txt.", "-c", "mini.yaml"]
    done = subprocess.run(
        [*command, *(word for setting in settings for word in ("-c", setting))],
        cwd=work,
        env=variables,
        capture_output=True,
        text=True,
        timeout=400,
        stdin=subprocess.DEVNULL,
    )
    told = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, told
    trajectory = json.loads((home / "trajectory.json").read_text())
    assert trajectory["info"]["exit_status"] == "Submitted", told
    calls = [call for message in trajectory["messages"] for call in message.get("tool_calls") or ()]
    assert [json.loads(call["function"]["arguments"])["command"] for call in calls] == [
        "cat question.txt",
        "echo 42 > answer.txt",
        submit["command"],
    ]
    assert (work / "answer.txt").read_text() == "42\n"
