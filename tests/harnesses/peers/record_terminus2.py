"""Asks Terminus 2's own parser how it reads our replies; its loop caps every duration at a minute.

    pip download --no-deps harbor==0.25.0, unpack, and then
    cd tests/harnesses/peers
    python record_terminus2.py .../harbor/agents/terminus_2/terminus_json_plain_parser.py terminus2.json

Kept: commands, completion, whether there is an error, and how many warnings. Not its wording.
"""

import importlib.util
import json
import sys
from pathlib import Path

from terminus_replies import REPLIES


def main():
    spec = importlib.util.spec_from_file_location("peer", sys.argv[1])
    peer = importlib.util.module_from_spec(spec)
    sys.modules["peer"] = peer
    spec.loader.exec_module(peer)
    recorded = {}
    for name, text in REPLIES.items():
        result = peer.TerminusJSONPlainParser().parse_response(text)
        recorded[name] = {
            "commands": [[command.keystrokes, min(command.duration, 60)] for command in result.commands],
            "complete": bool(result.is_task_complete),
            "is_error": bool(result.error),
            "num_warnings": len(result.warning.splitlines()),
        }
    Path(sys.argv[2]).write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
