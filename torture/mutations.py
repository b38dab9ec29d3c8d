# SPDX-License-Identifier: Apache-2.0
"""Small faults in functions: each changes one expression or statement of a source file.

Left alone are type hints, decorators, `assert`, the texts of errors and warnings, strings with
spaces (texts for people), and code outside functions. A statement that is removed stands below `if
0:`, so that a function's variables stay what they are.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
NAMES = {"any": "all", "all": "any", "min": "max", "max": "min"}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


class Mutant(NamedTuple):
    """A fault: where it is, its kind, the code before and after, a name that moved code keeps."""

    file: str
    function: str
    line: int
    statement: int  # the line at which its statement begins
    kind: str
    before: str
    after: str
    name: str
    number: int  # among those of the file


class _Site(NamedTuple):
    function: FUNCTIONS
    path: str  # the function's qualified name
    line: int
    statement: int
    kind: str
    old: ast.AST
    new: ast.AST
    parent: Any
    field: str
    position: int | None


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Enumerate the faults of a file."""
    seen: Counter[str] = Counter()
    for number, site in enumerate(_sites(ast.parse(source))):
        before, after = _text(site.old), _text(site.new)
        text = f"{file} {site.path} {ast.unparse(site.function)} {site.kind} {before} {after}"
        seen[text] += 1
        name = hashlib.sha256(f"{text} {seen[text]}".encode()).hexdigest()[:16]
        yield Mutant(
            file, site.path, site.line, site.statement, site.kind, before, after, name, number
        )


def mutated(source: str, number: int) -> tuple[ast.Module, FUNCTIONS | None]:
    """Return a file's syntax tree with a fault, and the function whose default value it is in."""
    tree = ast.parse(source)
    site = next(site for at, site in enumerate(_sites(tree)) if at == number)
    if site.position is None:
        setattr(site.parent, site.field, site.new)
    else:
        getattr(site.parent, site.field)[site.position] = site.new
    return tree, site.function if _is_default(site) else None


def _is_default(site: _Site) -> bool:
    arguments = site.function.args
    defaults = (*arguments.defaults, *filter(None, arguments.kw_defaults))
    return any(site.new is node for default in defaults for node in ast.walk(default))


def _text(node: ast.AST) -> str:
    """Return code in a line: of a statement in place of another, and of the head of a handler."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Constant):
        return "; ".join(map(_text, node.orelse))
    if isinstance(node, ast.ExceptHandler):
        return f"except {ast.unparse(node.type)}" if node.type else "except"
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 100 else f"{text[:80]} … {text[-17:]}"


def _sites(
    node: ast.AST, function: FUNCTIONS | None = None, path: str = "", statement: int = 0
) -> Iterator[_Site]:
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "format_spec"):
            continue
        if field in ("exc", "cause") or _is_for_people(node):
            continue
        items = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for position, child in items:
            if not isinstance(child, ast.AST):
                continue
            inner, inner_path = function, path
            if isinstance(child, FUNCTIONS | ast.ClassDef):
                inner_path = f"{path}.{child.name}" if path else child.name
                inner = child if isinstance(child, FUNCTIONS) else function
            inner_statement = statement
            if isinstance(child, ast.arguments) and isinstance(node, FUNCTIONS):
                inner_statement = first_line(node)
            elif isinstance(child, ast.stmt | ast.ExceptHandler):
                inner_statement = child.lineno
            at = statement if isinstance(node, ast.arguments) else getattr(child, "lineno", 0)
            if function is not None:
                for kind, new in _alternatives(node, field, child):
                    ast.fix_missing_locations(ast.copy_location(new, child))
                    where = at, inner_statement
                    yield _Site(function, path, *where, kind, child, new, node, field, position)
            yield from _sites(child, inner, inner_path, inner_statement)


def first_line(function: FUNCTIONS) -> int:
    """Return the line that the interpreter says a function begins at."""
    return min(node.lineno for node in (function, *function.decorator_list))


def _is_for_people(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).endswith("warn")
    return isinstance(node, (ast.JoinedStr, ast.Assert))


def _is_for_readers(parent: ast.AST) -> bool:
    """Return True for the parent of a docstring, a type to `cast` to, or `strict=True` of `zip`."""
    if isinstance(parent, ast.Call):
        return ast.unparse(parent.func) == "cast"
    return isinstance(parent, ast.Expr) or getattr(parent, "arg", "") == "strict"


def _alternatives(parent: ast.AST, field: str, node: Any) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.stmt):
        yield from _of_statement(node)
    elif isinstance(node, ast.ExceptHandler):
        yield from _of_handler(node)
    elif isinstance(node, ast.Compare):
        for at, operator in enumerate(node.ops):
            ops = [*node.ops[:at], SWAPS[type(operator)](), *node.ops[at + 1 :]]
            yield "comparison", ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield "and/or", ast.BoolOp(SWAPS[type(node.op)](), node.values)  # type: ignore[arg-type]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "negation", node.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield "arithmetic", ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)  # type: ignore[arg-type]
    elif isinstance(node, ast.Constant):
        if not _is_for_readers(parent):
            yield from _of_constant(node)
    elif isinstance(node, ast.Name) and field == "func" and node.id in NAMES:
        yield "name", ast.Name(NAMES[node.id], ast.Load())
    if field in ("test", "ifs") and not isinstance(node, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
        yield "condition", ast.UnaryOp(ast.Not(), node)


def _of_constant(node: ast.Constant) -> Iterator[tuple[str, ast.AST]]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, (int, float)):
        yield "constant", ast.Constant(value + 1)
    elif isinstance(value, (str, bytes)) and value.split() == [value]:  # no space in it
        yield "constant", ast.Constant(value + ("x" if isinstance(value, str) else b"x"))


def _of_statement(node: ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    removed = _instead(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Await)):
        yield "removed call", removed
    elif isinstance(node, (ast.Delete, ast.Break, ast.Continue)):
        yield "removed statement", removed
    elif isinstance(node, ast.Assign):
        if all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            yield "removed assignment", removed
    elif isinstance(node, ast.AugAssign):
        yield "removed assignment", removed
        if type(node.op) in SWAPS:
            yield "arithmetic", ast.AugAssign(node.target, SWAPS[type(node.op)](), node.value)  # type: ignore[arg-type]
    elif isinstance(node, ast.Raise):
        yield "removed raise", removed
        if isinstance(node.exc, ast.Call):
            yield "wrong exception", _instead(node, _raise_other())
    elif isinstance(node, ast.Return):
        if node.value is not None and not _is_none(node.value):
            yield "returned None", _instead(node, ast.Return(ast.Constant(None)))
    elif isinstance(node, ast.With):
        for at, item in enumerate(node.items):
            if item.optional_vars is None:
                others = [*node.items[:at], *node.items[at + 1 :]]
                kept = [ast.With(others, node.body)] if others else node.body
                yield "removed context", _instead(node, *kept)


def _instead(node: ast.stmt, *others: ast.stmt) -> ast.If:
    return ast.If(ast.Constant(0), [node], list(others))


def _raise_other() -> ast.Raise:
    return ast.Raise(ast.Name("RuntimeError", ast.Load()), None)


def _of_handler(node: ast.ExceptHandler) -> Iterator[tuple[str, ast.AST]]:
    types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    for at in range(len(types) if node.type else 0):
        others = ast.Tuple([*types[:at], *types[at + 1 :]], ast.Load())  # type: ignore[list-item]
        yield "removed handler", ast.ExceptHandler(others, node.name, node.body)


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
