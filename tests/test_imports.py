"""Which part may import which: a file imports only from lines above its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "north_lightning"

ORDER = [
    "types",
    "errors",
    "config_files",
    "seeds",
    "signals",
    "durable",
    "untrusted",
    "interfaces",
    "history",
    "run_folders",
    "chat",
    "model",
    "parallel",
    "losses",
    "data",
    "sandbox",
    "tasks",
    "harnesses",
    "verifiers",
    "factory",
    "sampling",
    "rollout",
    "faults",
    "modules",
    "evaluation",
    "callbacks",
    "synthesis",
    "export",
    "planning",
    "views",
    "human_evaluation",
    "parser",
    "conformance",
    "doctor",
    "recipe",
    "preflight",
    "trainer_flags",
    "run_loggers",
    "lightning_cli",
    "cli",
    "__main__",
]

TORCH_FREE = [
    "north_lightning.chat",
    "north_lightning.sandbox",
    "north_lightning.tasks",
    "north_lightning.harnesses",
    "north_lightning.verifiers",
    "north_lightning.rollout",
    "north_lightning.faults",
    "north_lightning.sampling.client",
    "north_lightning.cli",
    "north_lightning.recipe",
    "north_lightning.doctor",
    "north_lightning.views.report",
    "north_lightning.human_evaluation.prepare",
    "north_lightning.human_evaluation.serve",
    "north_lightning.planning.command",
    "north_lightning.factory.build",
    "north_lightning.conformance.command",
    "north_lightning.conformance.rewards",
]


def files_of_the_package() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(file: Path) -> list[str]:
    """Every absolute module name a file imports anywhere, functions and ``TYPE_CHECKING`` blocks included."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            if module == "north_lightning":
                names += [f"{module}.{alias.name}" for alias in node.names]
            else:
                names.append(module)
    return names


def test_every_part_has_its_line() -> None:
    parts = {part_of(file) for file in files_of_the_package()} - {"__init__"}
    assert parts <= set(ORDER)


@pytest.mark.parametrize("file", files_of_the_package(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lines_above_its_own(file: Path) -> None:
    part = part_of(file)
    if part == "__init__":
        return
    own = [name.split(".")[1] for name in imported_modules(file) if name.startswith("north_lightning.")]
    below = sorted({other for other in own if other != part and ORDER.index(other) >= ORDER.index(part)})
    assert not below, f"{part} imports {below}"


@pytest.mark.parametrize("file", files_of_the_package(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_the_core_never_imports_plugins(file: Path) -> None:
    assert not [name for name in imported_modules(file) if name.split(".")[0] == "plugins"]


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_the_rollout_process_and_the_utilities_import_needs_no_torch(module: str) -> None:
    program = (
        f"import sys, {module}; print(sorted({{'torch', 'lightning', 'vllm', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
