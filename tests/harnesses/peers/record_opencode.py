"""Plays the scenarios to the real OpenCode and writes down what its model was shown.

    npm install opencode-ai@1.18.33
    python tests/harnesses/peers/record_opencode.py node_modules/opencode-linux-x64/bin/opencode OUT.json [SCENARIO...]

ripgrep must be on the path. Kept: schemas of the tools without descriptions, and per scenario the role of every message
with the text of observations. Standard library only.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scenarios import FILES, OPENCODE, kept, without_descriptions
from scripted_server import ScriptedServer


def placed(turns, directory):
    """The turns with WORK replaced by the directory."""
    return json.loads(json.dumps(turns).replace("WORK", str(directory)))


def record(program, turns, directory, home):
    for name, text in FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    commit = "git init -q && git add -A && git -c user.name=n -c user.email=n@localhost commit -qm initial"
    subprocess.run(commit, shell=True, cwd=directory, check=True)
    with ScriptedServer(placed(turns, directory), only_with_tools=True) as server:
        model = {"name": "scripted", "tool_call": True, "limit": {"context": 1_000_000, "output": 8000}}
        options = {"baseURL": server.url, "apiKey": "none"}
        provider = {"npm": "@ai-sdk/openai-compatible", "name": "s", "options": options, "models": {"scripted": model}}
        config = {"autoupdate": False, "share": "disabled", "provider": {"scripted": provider}}
        (home / "opencode.json").write_text(json.dumps(config))
        environment = {"HOME": str(home), "PATH": os.environ["PATH"], "OPENCODE_CONFIG": str(home / "opencode.json")}
        command = [program, "run", "--dangerously-skip-permissions", "-m", "scripted/scripted", "add must add"]
        settings = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 900}
        done = subprocess.run(command, cwd=directory, env=environment, **settings)
        requests = server.requests
    messages = []
    for message in requests[-1]["messages"][2:]:
        observed = kept(str(message["content"]).replace(str(directory), "/work"))
        messages.append({"role": message["role"]} | ({} if message["role"] == "assistant" else {"content": observed}))
    return messages, requests[0]["tools"], done


def main():
    program = str(Path(sys.argv[1]).resolve())
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    output = Path(sys.argv[2])
    recorded = json.loads(output.read_text()) if output.exists() else {"scenarios": {}}
    recorded["version"] = version
    with tempfile.TemporaryDirectory() as home:
        for name in sys.argv[3:] or OPENCODE:
            turns = OPENCODE[name]
            with tempfile.TemporaryDirectory() as directory:
                messages, tools, done = record(program, turns, Path(directory), Path(home))
            print(name, done.returncode, len(messages), done.stderr[-300:])
            recorded["tools"] = without_descriptions([tool["function"] for tool in tools])
            recorded["scenarios"][name] = messages
            output.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
