"""Plays the scenarios to the real mini-swe-agent and writes down what its model was shown.

    python -m venv peer && peer/bin/pip install mini-swe-agent==2.4.6
    peer/bin/python tests/harnesses/peers/record_mini_swe_agent.py tests/harnesses/peers/mini_swe_agent.json

Kept: the schema of the tool without its descriptions; per scenario the role of every message, the text of observations
(produced by our commands), and how it ended. The wording of its prompts and errors is left out.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import yaml
from minisweagent import __version__
from minisweagent.agents.default import DefaultAgent
from minisweagent.config import builtin_config_dir
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel
from scenarios import FILES, MINI_SWE_AGENT, kept, without_descriptions
from scripted_server import ScriptedServer

CONFIGS = {"json": "mini.yaml", "xml": "benchmarks/swebench.yaml"}


def record(turns, config, directory, timeout_s):
    for name, text in FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    templates = {key: config["model"][key] for key in ("observation_template", "format_error_template")}
    with ScriptedServer(turns) as server:
        kwargs = {"api_base": server.url, "api_key": "none"}
        model = LitellmModel(
            model_name="openai/scripted", model_kwargs=kwargs, cost_tracking="ignore_errors", **templates
        )
        environment = LocalEnvironment(cwd=str(directory), timeout=timeout_s, env=config["environment"]["env"])
        names = ("system_template", "instance_template")
        agent = DefaultAgent(model, environment, **{name: config["agent"][name] for name in names})
        end = agent.run("add must add")
        tools = server.requests[0]["tools"]
    messages = [
        {"role": message["role"]} | ({"content": kept(message["content"])} if message["role"] == "tool" else {})
        for message in agent.messages[2:-1]
    ]
    return messages, {"exit_status": end["exit_status"], "submission": end["submission"]}, tools


def main():
    os.environ["MSWEA_SILENT_STARTUP"] = "1"
    recorded = {"version": __version__, "scenarios": {}}
    for form, file in CONFIGS.items():
        config = yaml.safe_load((builtin_config_dir / file).read_text())
        for name, turns in MINI_SWE_AGENT.items():
            with tempfile.TemporaryDirectory() as directory:
                messages, end, tools = record(turns, config, Path(directory), 2 if name == "time-out" else 30)
            recorded["tools"] = without_descriptions([tool["function"] for tool in tools])
            recorded["scenarios"][f"{form}: {name}"] = {"messages": messages, **end}
    Path(sys.argv[1]).write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
