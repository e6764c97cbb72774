"""What of an attempt is graded, against the rule written down by hand."""

import os
from pathlib import Path

import pytest

from north_lightning.verifiers.graded_tree import Allowance, UngradableTree, build_graded_tree

PRISTINE = {
    "calc.py": "old",
    "pkg/__init__.py": "",
    "pkg/deep/a.py": "a",
    "pkg/deep/tests/test_a.py": "test a",
    "test_calc.py": "test calc",
    "tests/test_more.py": "test more",
    "tests/data/table.csv": "1,2",
    "setup.cfg": "[tool]",
    ".git/config": "clean",
    "gone.py": "gone",
    "lib/only.py": "only",
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def read(root: Path) -> dict[str, str]:
    """Files and links, as text."""
    found = {}
    for directory, _, names in os.walk(root, followlinks=False):
        for name in names:
            path = Path(directory, name)
            found[str(path.relative_to(root))] = "-> " + os.readlink(path) if path.is_symlink() else path.read_text()
    return found


@pytest.fixture
def graded(tmp_path):
    def build(attempt: Path, **limits: int) -> dict[str, str]:
        pristine = write(tmp_path / "pristine", PRISTINE)
        allowance = Allowance(**{"size_bytes": 10_000, **limits})
        build_graded_tree(pristine, attempt, tmp_path / "graded", allowance)
        assert read(pristine) == PRISTINE
        return read(tmp_path / "graded")

    return build


GRADED = {name: text for name, text in PRISTINE.items() if not name.startswith(".git")}


def test_an_untouched_attempt_is_the_pristine_tree_without_its_history(graded, tmp_path):
    assert graded(write(tmp_path / "attempt", PRISTINE)) == GRADED


def test_changed_added_and_deleted_files_are_taken_over(graded, tmp_path):
    files = {**PRISTINE, "calc.py": "new", "added/b.py": "b"}
    del files["gone.py"]
    del files["pkg/deep/a.py"]
    expected = {**GRADED, "calc.py": "new", "added/b.py": "b"}
    del expected["gone.py"]
    del expected["pkg/deep/a.py"]
    assert graded(write(tmp_path / "attempt", files)) == expected


def test_tests_and_what_decides_how_they_run_cannot_be_changed_added_or_deleted(graded, tmp_path):
    attempt = {
        "calc.py": "old",
        "pkg/__init__.py": "",
        "test_calc.py": "weaker",
        "tests/test_more.py": "weaker",
        "tests/conftest.py": "patch",
        "pkg/test/__init__.py": "added",
        "pkg/deep/a.py": "a",
        "setup.cfg": "[weaker]",
        ".git/config": "[core] fsmonitor = evil",
        ".git/hooks/post-checkout": "evil",
        "gone.py": "gone",
        "lib/only.py": "only",
        "__pycache__/calc.cpython-311.pyc": "stale",
    }
    protected = (
        "conftest.py",
        "sitecustomize.py",
        "usercustomize.py",
        "x.pth",
        "pytest.ini",
        "tox.ini",
        "pyproject.toml",
    )
    for name in protected:
        attempt |= {name: "evil", f"pkg/{name}": "evil"}
    assert graded(write(tmp_path / "attempt", attempt)) == GRADED


def test_an_attempt_that_deletes_everything_keeps_only_what_it_may_not_delete(graded, tmp_path):
    (tmp_path / "attempt").mkdir()
    kept = ("pkg/deep/tests/test_a.py", "test_calc.py", "tests/test_more.py", "tests/data/table.csv", "setup.cfg")
    assert graded(tmp_path / "attempt") == {name: PRISTINE[name] for name in kept}
    assert not (tmp_path / "graded" / "lib").exists()


def test_links_stay_links_and_nothing_is_read_or_written_through_them(graded, tmp_path):
    outside = write(tmp_path / "outside", {"secret": "secret", "deep/a.py": "outside"})
    attempt = write(tmp_path / "attempt", {"calc.py": "new"})
    (attempt / "leak").symlink_to(outside / "secret")
    (attempt / "pkg").symlink_to(outside)
    (attempt / "tests").symlink_to(outside)
    result = graded(attempt)
    assert result["leak"] == f"-> {outside}/secret"
    assert result["tests/test_more.py"] == "test more"
    assert (tmp_path / "graded" / "pkg").is_symlink()
    assert "secret" not in {text for text in result.values() if not text.startswith("->")}
    assert read(outside) == {"secret": "secret", "deep/a.py": "outside"}


def test_special_files_are_left_out_and_modes_kept(graded, tmp_path):
    attempt = write(tmp_path / "attempt", {"run.sh": "echo"})
    (attempt / "run.sh").chmod(0o755)
    os.mkfifo(attempt / "pipe")
    assert "pipe" not in graded(attempt)
    assert os.access(tmp_path / "graded" / "run.sh", os.X_OK)


def test_files_and_directories_may_trade_places(graded, tmp_path):
    result = graded(write(tmp_path / "attempt", {"calc.py/inner.py": "inner", "pkg": "a file now"}))
    assert result["calc.py/inner.py"] == "inner"
    assert result["pkg"] == "a file now"


@pytest.mark.parametrize("limits", [{"size_bytes": 99}, {"num_entries": 9}, {"depth": 4}])
def test_an_attempt_beyond_its_allowance_is_not_graded(limits, graded, tmp_path):
    attempt = write(tmp_path / "attempt", {f"{i}": "x" * 10 for i in range(9)})
    write(attempt / "a/b/c/d/e/f", {"g": "x" * 10})
    with pytest.raises(UngradableTree):
        graded(attempt, **limits)
