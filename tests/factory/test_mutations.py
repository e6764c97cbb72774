"""Every kind of planted bug against the text it should make; what is not changed keeps its bytes."""

from dataclasses import replace

import pytest

from north_lightning.factory.mutations import KINDS, mutations

EXAMPLES = {
    "shifted_comparison": ("return a < b", "return (a <= b)"),
    "inverted_comparison": ("return a  in b", "return (a not in b)"),
    "negated_condition": ("return 'x' if a else 'y'", "return ('x' if not a else 'y')"),
    "wrong_operator": ("return a  + b", "return (a - b)"),
    "wrong_connective": ("return a and b", "return (a or b)"),
    "shifted_number": ("return a[7]", "return a[8]"),
    "flipped_flag": ("a = True", "a = False"),
    "lost_negation": ("return not a", "return (a)"),
    "swapped_arguments": ("return a(b, 'ü', 'z')", "return (a('ü', b, 'z'))"),
    "lost_argument": ("return a(b, key=c)", "return (a(b))"),
    "lost_bound": ("return a[b:c]", "return (a[b:])"),
    "swapped_branches": ("return a if b else c", "return (c if b else a)"),
    "lost_statement": ("a.append(b)", "pass"),
    "lost_guard": ("if a: return b", "pass"),
    "lost_result": ("return a.b", "return None"),
    "wrong_leap": ("for c in a: break", "for c in a: continue"),
}


def test_there_are_at_least_ten_kinds_with_an_example_each() -> None:
    assert KINDS.keys() == EXAMPLES.keys()
    assert len(KINDS) >= 10


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_kind_of_bug_makes_this_of_that(kind: str) -> None:
    before, after = EXAMPLES[kind]
    module = "# Ünïcode\nX = {}  # left   alone\n\nclass K:\n    def f(self, a, b, c):\n        {}\n\n\ny = 1\n"
    text = module.format("1 + 1", before)
    found = list(mutations(text))
    assert (kind, module.format("1 + 1", after)) in [(one.kind, one.planted(text)) for one in found]
    for one in found:
        assert (one.function, one.line) == ("K.f", 6)  # nothing outside of functions
        assert one.planted(text) != text


def test_a_bug_that_would_be_no_python_is_not_planted() -> None:
    text = "def f(a):\n    return a[1:2]\n"
    (one,) = (one for one in mutations(text) if one.kind == "lost_bound")
    assert replace(one, written="(").planted(text) is None


def test_strings_with_fields_comments_and_annotations_are_left_alone() -> None:
    module = 'def f(a: int = 1):\n    b: "x < 1" = 2\n    return f"{a + 1}"\n'
    assert [one.kind for one in mutations(module)] == ["lost_result"]
    assert not list(mutations("def f(a):\n    pass\n"))
    kinds = {one.kind for one in mutations("def f(a):\n    return (a  # why\n            + 1)\n")}
    assert "wrong_operator" not in kinds
