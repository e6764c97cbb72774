"""What the package ``swebench`` says of a repository or a log. A program of its own: a parser may never end on a log
that a stranger's code wrote, and the package itself starts Docker's and Modal's clients, which no verdict needs.

In: JSON on stdin, the columns of a row that decide, and its ``log``; or ``null``. Out: JSON on stdout, the package's
report on that row; or all its parsers, and what it knows of repositories.
"""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any


def load_without_clients() -> Any:
    """The module ``swebench.harness.grading``, imported past the ``__init__`` that imports all others."""
    package = importlib.import_module("swebench")
    harness = types.ModuleType("swebench.harness")
    harness.__path__ = [str(Path(str(package.__file__)).parent / "harness")]
    sys.modules["swebench.harness"] = harness
    return importlib.import_module("swebench.harness.grading")


def known(grading: Any) -> dict[str, Any]:
    """Names of parsers; repository -> (parser, kind of evaluation), for rows that do not say."""
    names = {parser: name for name, parser in reversed(grading.PARSER_REGISTRY.items())}
    fail_only = importlib.import_module("swebench.harness.constants").FAIL_ONLY_REPOS
    repositories = {}
    for language in ("c", "go", "java", "javascript", "php", "python", "ruby", "rust"):
        module = importlib.import_module(f"swebench.harness.log_parsers.{language}")
        for table in (value for name, value in vars(module).items() if name.startswith("MAP_REPO_TO_PARSER")):
            for repository, parser in table.items():
                if parser in names:
                    kind = "fail_only" if repository in fail_only else "pass_and_fail"
                    repositories[repository.lower()] = (names[parser], kind)
    return {"parsers": sorted(grading.PARSER_REGISTRY), "repositories": repositories}


def report(grading: Any, row: dict[str, Any]) -> dict[str, Any]:
    spec = importlib.import_module("swebench.types").TestSpec
    columns = ("instance_id", "image", "repo", "version", "FAIL_TO_PASS", "PASS_TO_PASS", "log_parser", "eval_type")
    prediction = {"instance_id": row["instance_id"], "model_patch": "", "model_name_or_path": ""}
    try:
        reports = grading.get_eval_report(
            spec(eval_script_list=[], **{name: row[name] for name in columns}), prediction, row["log"], True
        )
    except Exception as error:  # as in the package's own harness: a log that its parser cannot read resolves nothing
        return {"resolved": False, "error": f"{type(error).__name__}: {error}"}
    found: dict[str, Any] = reports[row["instance_id"]]
    return found


if __name__ == "__main__":
    answer, sys.stdout = sys.stdout, sys.stderr  # some parsers print
    request, graders = json.load(sys.stdin), load_without_clients()
    json.dump(known(graders) if request is None else report(graders, request), answer)
