"""The SFT data pipeline on 10,000 fuzzed conversations: what it renders, what it trains, what it catches.

    python tests/benchmarks/bench_data_quality.py [--conversations 10000] [--output runs/bench/data_quality.json]

Every conversation is compared with melody byte for byte, parsed back, and its trained spans with the messages; then one
defect and one leak are planted in it. Exits with 1 if anything planted is missed, anything else is wrong, or more than
0.1% of the sound conversations are dropped. Times are of the process (CPU), for the whole of each check.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from data_fuzz import check_duplicates, check_quality

MAX_FALSE_POSITIVE_RATE = 0.001


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/data_quality.json"))
    arguments = parser.parse_args()
    started = time.process_time()
    with tempfile.TemporaryDirectory() as directory:
        quality = check_quality(arguments.conversations, Path(directory))
    quality_s = time.process_time() - started
    duplicates = check_duplicates(arguments.conversations)
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "quality": quality,
        "quality_cpu_s": quality_s,
        "duplicates": duplicates,
        "duplicates_cpu_s": time.process_time() - started - quality_s,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({**report, "quality": {**quality, "examples": "see the file"}}, indent=1))
    wrong = {kind: count for kind, count in quality["wrong"].items() if kind != "false_positives"}
    sound = (
        not wrong
        and quality["caught"] == quality["planted"]
        and quality["false_positive_rate"] <= MAX_FALSE_POSITIVE_RATE
        and duplicates["caught"] == duplicates["planted"]
        and duplicates["false_positives"] <= MAX_FALSE_POSITIVE_RATE * arguments.conversations
    )
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
