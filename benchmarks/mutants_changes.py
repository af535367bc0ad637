# Copyright Contributors to the pyro_bnn project.
# SPDX-License-Identifier: Apache-2.0
"""The small changes that ``mutants.py`` makes to a source file."""

import ast
import difflib
import random
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """One change of one file: the text from ``start`` to ``stop`` (in bytes) becomes ``text``."""

    path: str
    line: int
    start: int
    stop: int
    text: str
    kind: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.stop :]

    def diff(self, source: bytes) -> str:
        old, new = (s.decode().splitlines(keepends=True) for s in (source, self.apply(source)))
        return "".join(difflib.unified_diff(old, new, self.path, self.path, n=1))

    def lines(self, source: bytes) -> tuple[str, str]:
        """The changed lines before and after, without indentation: what names a mutant, wherever its line moves."""
        old, new = (s.decode().splitlines() for s in (source, self.apply(source)))
        changes = [o for o in difflib.SequenceMatcher(None, old, new).get_opcodes() if o[0] != "equal"]
        before = "\n".join(line.strip() for _, i, j, _, _ in changes for line in old[i:j])
        return before, "\n".join(line.strip() for _, _, _, i, j in changes for line in new[i:j])


OPERATORS: dict[type, list[type]] = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div, ast.Add], ast.Div: [ast.Mult], ast.Pow: [ast.Mult],
    ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.And: [ast.Or], ast.Or: [ast.And],
}  # fmt: skip
RENAMED = {
    "sum": "mean", "mean": "sum", "sqrt": "square", "rsqrt": "sqrt", "square": "abs", "min": "max", "max": "min",
    "amin": "amax", "amax": "amin", "any": "all", "all": "any", "zeros": "ones", "ones": "zeros", "new_zeros": "new_ones",
    "zeros_like": "ones_like", "ones_like": "zeros_like", "log1p": "log", "expm1": "exp", "exp": "expm1",
    "argmax": "argmin", "argmin": "argmax", "cumsum": "cumprod",
}  # fmt: skip
#: Methods whose call is left out.
DROPPED = {
    "sqrt", "rsqrt", "square", "exp", "log", "log1p", "abs", "neg", "reciprocal", "clamp", "detach", "sigmoid", "tanh",
    "transpose", "t", "flip", "cumsum", "logsumexp", "softmax", "log_softmax", "clone", "masked_fill", "sort", "expand",
    "movedim", "triu", "tril",
}  # fmt: skip
#: Arguments of which another value changes the cost, or is as good: sizes of chunks, seeds, limits of iterations; and
#: ``strict``, an assertion.
INDIFFERENT = {
    "validate_args", "default", "chunk_size", "block_size", "budget", "seed", "stacklevel", "max_steps", "max_iter",
    "max_rounds", "oversampling", "strict",
}  # fmt: skip
TRANSPOSES = {"mT", "T", "mH", "H"}


def wrapped(node: ast.AST) -> str:
    return f"({ast.unparse(node)})"


class Finder(ast.NodeVisitor):
    """Collects the mutants of a file."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.found = path, []  # type: tuple[str, list[Mutant]]
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.visit(ast.parse(source))

    def add(self, node: Any, text: str, kind: str) -> None:
        start = self.starts[node.lineno - 1] + node.col_offset
        stop = self.starts[node.end_lineno - 1] + node.end_col_offset
        self.found.append(Mutant(self.path, node.lineno, start, stop, text, kind))

    def skip(self, node: ast.AST) -> None:
        """Messages, types and statements for the type checker are no mathematics."""

    visit_Raise = visit_Assert = visit_JoinedStr = visit_Import = visit_ImportFrom = skip

    def visit_arg(self, node: ast.arg) -> None:
        """Without the annotation."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        plain = [*node.args.posonlyargs, *node.args.args]
        defaults = [*zip(reversed(plain), reversed(node.args.defaults), strict=False)]
        for arg, value in [
            *reversed(defaults),
            *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
        ]:
            if value is not None and arg.arg not in INDIFFERENT:
                self.visit(value)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in INDIFFERENT:
            self.visit(node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add(node, str(not value), "constant")
        elif isinstance(value, (int, float)):
            for new in {value + 1, value - 1, value * 2} - {value}:
                self.add(node, repr(new) if new >= 0 else f"({new!r})", "constant")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            value = -node.operand.value
            for new in {value + 1, value - 1, -value}:
                self.add(node, repr(new) if new >= 0 else f"({new!r})", "constant")
            return
        if isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
            self.add(node, wrapped(node.operand), "sign" if isinstance(node.op, ast.USub) else "condition")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        for other in OPERATORS.get(type(node.op), []):
            self.add(node, wrapped(ast.BinOp(node.left, other(), node.right)), "operator")
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
            self.add(node, wrapped(node.left), "dropped term")
            self.add(node, wrapped(node.right), "dropped term")
        if isinstance(node.op, (ast.Mult, ast.Div, ast.MatMult)):
            self.add(node, f"(-{wrapped(node)})", "sign")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for i, op in enumerate(node.ops):
            for other in OPERATORS.get(type(op), []):
                ops = [*node.ops[:i], other(), *node.ops[i + 1 :]]
                self.add(node, wrapped(ast.Compare(node.left, ops, node.comparators)), "comparison")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        (other,) = OPERATORS[type(node.op)]
        self.add(node, wrapped(ast.BoolOp(other(), node.values)), "condition")
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            self.add(node, wrapped(ast.BoolOp(node.op, rest) if len(rest) > 1 else rest[0]), "condition")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.add(node, wrapped(node.body), "branch")
        self.add(node, wrapped(node.orelse), "branch")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.add(node.test, f"(not {wrapped(node.test)})", "branch")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if name.endswith("manual_seed"):
            self.visit(node.func)
            return
        if name.startswith("logger."):
            return
        if name in ("warnings.warn", "cast", "super", "TypeVar", "Literal"):
            return
        if isinstance(node.func, ast.Attribute):
            attribute = node.func.attr
            if attribute in DROPPED and not ast.unparse(node.func.value).startswith("torch"):
                self.add(node, ast.unparse(node.func.value), "dropped call")
            if attribute in RENAMED:
                func = ast.Attribute(node.func.value, RENAMED[attribute])
                self.add(node, ast.unparse(ast.Call(func, node.args, node.keywords)), "renamed call")
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in TRANSPOSES:
            self.add(node, ast.unparse(node.value), "transpose")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        for other in OPERATORS.get(type(node.op), []):
            self.add(node, ast.unparse(ast.AugAssign(node.target, other(), node.value)), "operator")
        self.add(node, "pass", "dropped statement")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node.value, ast.Call) and not ast.unparse(node.value.func).startswith(
            ("super", "warnings", "logger")
        ):
            self.add(node, "pass", "dropped statement")
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        if not isinstance(node.slice, ast.Constant) or not isinstance(node.slice.value, str):
            self.visit(node.slice)


def draw(root: Path, paths: Iterable[Path], seed: int) -> Iterator[Mutant]:
    """One mutant of each line that can be changed, lines in random order."""
    lines: dict[tuple[str, int], list[Mutant]] = {}
    for path in sorted(paths):
        name = str(path.relative_to(root))
        for mutant in Finder(name, path.read_bytes()).found:
            lines.setdefault((name, mutant.line), []).append(mutant)
    source = random.Random(seed)
    for name, line in source.sample(sorted(lines), len(lines)):
        text = (root / name).read_bytes()
        some = source.sample(lines[name, line], len(lines[name, line]))
        found = next((mutant for mutant in some if is_change(mutant, text)), None)
        if found is not None:
            yield found


def is_change(mutant: Mutant, source: bytes) -> bool:
    """Whether a mutant compiles and is another program."""
    with suppress(SyntaxError):
        return ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    return False
