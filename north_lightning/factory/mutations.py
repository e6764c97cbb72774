"""Procedural bugs: small changes of a Python file's syntax tree, each a mistake that people make.

In: the text of a module. Out: every place where a kind of bug could be planted, and what to write there. Only the
changed expression or statement is written anew; the rest of the file keeps its bytes. Nothing is run here.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Change = Callable[[ast.AST], ast.AST | None]
"""What a node becomes; None where this kind of bug cannot be planted."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """One place for a bug: bytes ``start:end`` of the file become ``written``."""

    kind: str
    function: str  # dotted name of the function it is in
    line: int
    start: int
    end: int
    written: str

    def planted(self, text: str) -> str | None:
        """The whole file with the bug; None if that is no Python (a ``continue`` that lost its loop, ...)."""
        source = text.encode()
        changed = (source[: self.start] + self.written.encode() + source[self.end :]).decode()
        try:
            compile(changed, "<planted>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return None
        return changed


def _shifted_comparison(node: ast.AST) -> ast.AST | None:
    pairs = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
    if isinstance(node, ast.Compare) and type(node.ops[0]) in pairs:
        node.ops[0] = pairs[type(node.ops[0])]()
        return node
    return None


def _inverted_comparison(node: ast.AST) -> ast.AST | None:
    pairs = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot}
    pairs[ast.IsNot] = ast.Is
    if isinstance(node, ast.Compare) and type(node.ops[0]) in pairs:
        node.ops[0] = pairs[type(node.ops[0])]()
        return node
    return None


def _negated_condition(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return node
    return None


def _wrong_operator(node: ast.AST) -> ast.AST | None:
    pairs: dict[type[ast.operator], type[ast.operator]] = {
        ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
        ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    }  # fmt: skip
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in pairs:
        is_formatting = isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant | ast.JoinedStr)
        node.op = pairs[type(node.op)]()
        return None if is_formatting else node
    return None


def _wrong_connective(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return node
    return None


def _shifted_number(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
        return node
    return None


def _flipped_flag(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
        return node
    return None


def _lost_negation(node: ast.AST) -> ast.AST | None:
    return node.operand if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub) else None


def _swapped_arguments(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and len(node.args) >= 2 and not any(isinstance(a, ast.Starred) for a in node.args):
        if ast.dump(node.args[0]) == ast.dump(node.args[1]):
            return None
        node.args[0], node.args[1] = node.args[1], node.args[0]
        return node
    return None


def _lost_argument(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and node.keywords and node.keywords[-1].arg:
        node.keywords.pop()
        return node
    return None


def _lost_bound(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and (node.slice.upper or node.slice.lower):
        if node.slice.upper is not None:
            node.slice.upper = None
        else:
            node.slice.lower = None
        return node
    return None


def _swapped_branches(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.IfExp):
        node.body, node.orelse = node.orelse, node.body
        return node
    return None


def _lost_statement(node: ast.AST) -> ast.AST | None:
    is_effect = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return ast.Pass() if is_effect or isinstance(node, ast.AugAssign) else None


def _lost_guard(node: ast.AST) -> ast.AST | None:
    leaves = (ast.Return, ast.Raise, ast.Continue)
    if isinstance(node, ast.If) and not node.orelse and len(node.body) == 1 and isinstance(node.body[0], leaves):
        return ast.Pass()
    return None


def _lost_result(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        return ast.Return(ast.Constant(None))
    return None


def _wrong_leap(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Break):
        return ast.Continue()
    return ast.Break() if isinstance(node, ast.Continue) else None


KINDS: dict[str, Change] = {
    "shifted_comparison": _shifted_comparison,
    "inverted_comparison": _inverted_comparison,
    "negated_condition": _negated_condition,
    "wrong_operator": _wrong_operator,
    "wrong_connective": _wrong_connective,
    "shifted_number": _shifted_number,
    "flipped_flag": _flipped_flag,
    "lost_negation": _lost_negation,
    "swapped_arguments": _swapped_arguments,
    "lost_argument": _lost_argument,
    "lost_bound": _lost_bound,
    "swapped_branches": _swapped_branches,
    "lost_statement": _lost_statement,
    "lost_guard": _lost_guard,
    "lost_result": _lost_result,
    "wrong_leap": _wrong_leap,
}


KNOWN_TO: dict[str, tuple[type[ast.stmt] | type[ast.expr], ...]] = {
    "shifted_comparison": (ast.Compare,),
    "inverted_comparison": (ast.Compare,),
    "negated_condition": (ast.IfExp,),
    "wrong_operator": (ast.BinOp, ast.AugAssign),
    "wrong_connective": (ast.BoolOp,),
    "shifted_number": (ast.Constant,),
    "flipped_flag": (ast.Constant,),
    "lost_negation": (ast.UnaryOp,),
    "swapped_arguments": (ast.Call,),
    "lost_argument": (ast.Call,),
    "lost_bound": (ast.Subscript,),
    "swapped_branches": (ast.IfExp,),
    "lost_statement": (ast.Expr, ast.AugAssign),
    "lost_guard": (ast.If,),
    "lost_result": (ast.Return,),
    "wrong_leap": (ast.Break, ast.Continue),
}
"""Which nodes a kind looks at: trees are large, and copying them is slow."""


def mutations(text: str) -> Iterator[Mutation]:
    """Every bug that can be planted in the functions of a module, in order of place and kind.

    Raises:
        SyntaxError: the text is no Python of this interpreter's version.
    """
    tree = ast.parse(text)
    source = text.encode()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for function, node in _nodes(tree, ()):
        start, end = (starts[line - 1] + column for line, column in _span(node))
        for kind, change in KINDS.items():
            if not isinstance(node, KNOWN_TO[kind]):
                continue
            changed = change(copy.deepcopy(node))
            if changed is None:
                continue
            written = ast.unparse(changed)
            if isinstance(changed, ast.expr):
                written = f"({written})" if not isinstance(changed, ast.Constant) else written
            if "\n" in written or (isinstance(node, ast.expr) and b"#" in source[start:end]):
                continue  # a statement's layout, or a comment, would be lost
            yield Mutation(kind, function, node.lineno, start, end, written)


def _nodes(node: ast.AST, path: tuple[str, ...], inside: bool = False) -> Iterator[tuple[str, ast.AST]]:
    """The statements and expressions within functions, each with the function's dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            is_function = not isinstance(child, ast.ClassDef)
            for statement in child.body:
                holder = ast.Module([statement], [])
                yield from _nodes(holder, (*path, child.name), inside or is_function)
        elif isinstance(child, ast.JoinedStr | ast.AnnAssign | ast.arg):
            continue  # positions within f-strings are not those of the file; annotations are not behaviour
        else:
            if inside and isinstance(child, ast.stmt | ast.expr):
                yield ".".join(path), child
            yield from _nodes(child, path, inside)


def _span(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    assert isinstance(node, ast.stmt | ast.expr)
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
