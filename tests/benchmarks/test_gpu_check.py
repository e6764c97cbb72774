"""The check for GPUs, dry-run at tiny sizes: every section says something, and none loses another."""

import json
import sys

import pytest
from benchmarks import gpu_check


@pytest.mark.parametrize("name", gpu_check.SECTIONS)
def test_every_section_reports_at_tiny_sizes(name):
    result = json.loads(json.dumps(gpu_check.SECTIONS[name](gpu_check.Bench(tiny=True))))
    if name == "kernels":
        measured = [one for one in result.values() if "not_measured" not in one]
        assert len(measured) >= 3
        assert all(one["within_bound"] for one in measured)
    elif name == "loss":
        assert result["largest_difference"] < 1e-4
    elif name == "step":
        assert result["ours"]["tokens_per_s"] > 0
    elif name == "push":
        assert "needs a GPU" in result["not_measured"]
    else:
        assert set(result) >= {"full", "offload"}


def test_a_section_that_fails_loses_nothing_of_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.BUDGETS_S, "kernels", 0.01)
    output = tmp_path / "gpu_check.json"
    arguments = ["gpu_check.py", "--tiny", "--only", "kernels", "push", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_check.main() == 1
    result = json.loads(output.read_text())
    assert result["sections"]["kernels"]["failed"] == "not done within 0.01 s"
    assert "not_measured" in result["sections"]["push"]
    assert result["machine"]["packages"]["torch"]


def test_the_sections_together_take_at_most_eight_minutes():
    assert sum(gpu_check.BUDGETS_S.values()) <= 480
    assert gpu_check.BUDGETS_S.keys() == gpu_check.SECTIONS.keys()
