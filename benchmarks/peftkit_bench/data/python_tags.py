"""Python tags: what the names in code stand for. Labelled text that is on every machine, taken from syntax trees.

A row is the beginning of a function of the standard library: its header and the whole statements after it that fit.
Names are tagged by what the file binds them to:

- PARAM: a parameter, where it is declared and where it is used; LOCAL: a variable of a function.
- FUNC: the function that is called, with the modules before it (`os . path . join`); CLASS: a class, likewise.
- MODULE: an imported module whose attribute is read; KEYWORD: the name of an argument in a call.

The mark beside a name does not decide: `name =` begins a LOCAL, a KEYWORD or a PARAM with a default, `name (` a FUNC, a
CLASS or a PARAM that is called. A PARAM is known by the header, often many tokens away. Attributes, methods, `self` and
`cls` are no entities: the dot alone would tell.

Files are parsed, never imported. Comments and docstrings go, strings are "". Splits are made of whole files, and
windows that nearly repeat another are dropped over all splits together.
"""

from __future__ import annotations

import ast
import builtins
import io
import platform
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from peftkit_bench.data.dataset import SPLITS, DataError, Dataset, Example, default_cache, kept
from peftkit_bench.data.docstrings import rank, without_duplicates
from peftkit_bench.record import digest
from peftkit_bench.tasks.contract import Task

VERSION = 1
"""Raised whenever the same sources would give other rows; part of the cache's key."""
FEWEST, MOST = 8, 48
"""Tokens of a window."""
PER_FILE = 20
"""At most this many windows of one file, so that no file decides the result."""

_SKIPPED = {"test", "tests", "testing", "__pycache__", "site-packages", "dist-packages", "idlelib", "lib2to3",
            "turtledemo", "ensurepip", "pydoc_data"}  # fmt: skip
_DROPPED = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
_CAPITAL = re.compile(r"_*[A-Z]\w*[a-z]\w*")
_IMPLICIT = ("self", "cls")
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_BUILTINS = {name: "class" if isinstance(getattr(builtins, name), type) else "function"
             for name in dir(builtins) if callable(getattr(builtins, name))}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PythonTags:
    """Tokens of the standard library's functions, and what its names stand for."""

    name: ClassVar[str] = "python-tags"
    tasks: ClassVar[tuple[str, ...]] = ("token-cls",)
    train: int
    """Rows; likewise the others."""
    tune: int
    stop: int
    test: int

    def dataset(self, task: Task) -> Dataset:
        """See `Source`."""
        made = python_tags({name: getattr(self, name) for name in SPLITS})
        splits = {
            name: tuple(replace(example, fields=task.read(example.fields)) for example in examples)
            for name, examples in made.splits.items()
        }
        return replace(made, splits=splits)


def python_tags(sizes: Mapping[str, int], *, root: Path | None = None, cache: Path | None = None) -> Dataset:
    """The data set; the same for the same sources.

    Args:
        sizes: rows by split, in the order of SPLITS.
        root: folder of sources; None: the standard library.
        cache: folder for finished data sets; None: `default_cache()`.

    Raises:
        DataError: a size is not positive, or there are too few functions.
    """
    for name, size in sizes.items():
        if size <= 0:
            raise DataError(f"{name}: expected a positive number of rows, found {size}")
    folder = root or Path(sysconfig.get_paths()["stdlib"])
    version = platform.python_version() if root is None else "given"
    files = sorted(f for f in folder.rglob("*.py") if not _SKIPPED & set(f.relative_to(folder).parts[:-1]))
    stamp = [VERSION, version, sizes, [(f.relative_to(folder).as_posix(), f.stat().st_size) for f in files]]
    path = (cache or default_cache()) / f"python-tags-{digest(stamp)}.json"
    return kept(path, lambda: _build(folder, files, sizes, version))


def _build(folder: Path, files: Sequence[Path], sizes: Mapping[str, int], version: str) -> Dataset:
    # Half more than what is needed, where there is so much: near duplicates take some away.
    wanted = {name: 1.5 * size for name, size in sizes.items()}
    missing = dict(wanted)
    pool: list[tuple[str, Example]] = []
    for group, path in enumerate(sorted(files, key=lambda file: rank(file.relative_to(folder).as_posix()))):
        # A whole file goes where most is missing for its size.
        split = max(wanted, key=lambda name: missing[name] / wanted[name])
        if missing[split] <= 0:
            break
        source = path.relative_to(folder).as_posix()
        found = sorted(windows(path.read_bytes()), key=lambda window: rank(" ".join(window[1])))[:PER_FILE]
        missing[split] -= len(found)
        for line, tokens, tags in found:
            fields = {"tokens": tokens, "tags": tags}
            pool.append((split, Example(fields=fields, group=group, source=f"{source}:{line}")))
    pool.sort(key=lambda pair: rank(f"{pair[1].source} {' '.join(pair[1].fields['tokens'])}"))
    pool = [pool[index] for index in without_duplicates([" ".join(e.fields["tokens"]) for _, e in pool])]
    splits = {name: tuple(example for split, example in pool if split == name)[:size] for name, size in sizes.items()}
    if any(len(splits[name]) < size for name, size in sizes.items()):
        asked = ", ".join(f"{name} {size}" for name, size in sizes.items())
        there = ", ".join(f"{name} {len(splits[name])}" for name in sizes)
        raise DataError(f"expected different functions for {asked}, found {there}; ask for fewer rows")
    return Dataset(name="python tags", splits=splits, versions={"python": version})


# From a source file to windows --------------------------------------------------------------------------------------


@dataclass
class _Source:
    """The tokens of a file that are kept, and where they stand."""

    words: list[str]
    lines: list[tuple[int, int]]
    """First token and the one after the last of each logical line."""
    rows: list[int]
    """Line of the file of each token."""
    starts: dict[tuple[int, int], int]
    """Token by line and byte where it begins; likewise where it ends."""
    ends: dict[tuple[int, int], int]


def windows(code: bytes) -> list[tuple[int, list[str], list[str]]]:
    """Line, tokens and tags of the beginning of every function in a source file; none when it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(code)
        source = _tokens(code)
    except (SyntaxError, ValueError, RecursionError, tokenize.TokenError):
        return []
    tags = ["O"] * len(source.words)
    _Tagger(source, tags).visit(tree)
    last_row = {node.lineno: node.end_lineno or 0 for node in ast.walk(tree) if isinstance(node, _FUNCTION)}
    found = []
    after = 0
    for place, (first, end) in enumerate(source.lines):
        row = source.rows[first]
        if first < after or row not in last_row or source.words[first] not in ("def", "async"):
            continue
        for _, stop in source.lines[place + 1 :]:
            if stop - first > MOST or source.rows[stop - 1] > last_row[row]:
                break
            end = stop
        if FEWEST <= end - first <= MOST:
            found.append((row, source.words[first:end], tags[first:end]))
            after = end
    return found


def _tokens(code: bytes) -> _Source:
    made = _Source([], [], [], {}, {})
    begun, strings = 0, 0
    for token in tokenize.tokenize(io.BytesIO(code).readline):
        kind = tokenize.tok_name[token.type]
        # From Python 3.12 on, a formatted string is many tokens between two marks.
        if kind in ("FSTRING_START", "TSTRING_START"):
            strings += 1
        inside = strings > 0
        if kind in ("FSTRING_END", "TSTRING_END"):
            strings -= 1
        if token.type in _DROPPED:
            continue
        if token.type == tokenize.NEWLINE:
            if made.words[begun:] == ['""']:  # a docstring, or a string that nobody uses
                del made.words[begun:], made.rows[begun:]
            if len(made.words) > begun:
                made.lines.append((begun, len(made.words)))
            begun = len(made.words)
            continue
        if inside or token.type == tokenize.STRING:
            if made.words[begun:] and made.words[-1] == '""':
                continue
            word = '""'
        else:
            word = token.string
            line = token.line
            row, column = token.start
            made.starts[row, len(line[:column].encode())] = len(made.words)
            made.ends[token.end[0], len(line[: token.end[1]].encode())] = len(made.words)
        made.words.append(word)
        made.rows.append(token.start[0])
    return made


# What names stand for -----------------------------------------------------------------------------------------------


class _Scope(ast.NodeVisitor):
    """What the names of one function, or of a module, are bound to: "param", "local", "function", "class", ..."""

    def __init__(self, node: ast.AST) -> None:
        self.names: dict[str, str] = {}
        self.elsewhere: set[str] = set()
        self.variable = "global" if isinstance(node, ast.Module) else "local"
        if isinstance(node, _FUNCTION | ast.Lambda):
            for argument in _arguments(node.args):
                self.names[argument.arg] = "param"
        body = getattr(node, "body", None)
        for child in body if isinstance(body, list) else ast.iter_child_nodes(node):
            if not isinstance(child, ast.arguments):
                self.visit(child)
        for name in self.elsewhere:
            self.names.pop(name, None)

    def _bind(self, name: str, kind: str) -> None:
        self.names.setdefault(name, kind)

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._bind(node.id, self.variable)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._bind(node.name, "function")

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._bind(node.name, "function")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._bind(node.name, "class")

    def visit_Lambda(self, node: ast.Lambda) -> None:
        pass

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._bind(alias.asname or alias.name.partition(".")[0], "module")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._bind(alias.asname or alias.name, "imported")

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self._bind(node.name, self.variable)
        self.generic_visit(node)

    def visit_Global(self, node: ast.Global | ast.Nonlocal) -> None:
        self.elsewhere |= set(node.names)

    visit_Nonlocal = visit_Global


def _arguments(found: ast.arguments) -> list[ast.arg]:
    named = [*found.posonlyargs, *found.args, *found.kwonlyargs]
    return [*named, *(each for each in (found.vararg, found.kwarg) if each is not None)]


class _Tagger(ast.NodeVisitor):
    """Writes the tags of a file's tokens."""

    def __init__(self, source: _Source, tags: list[str]) -> None:
        self.source, self.tags = source, tags
        self.scopes: list[_Scope] = []

    def _kind(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope.names:
                return scope.names[name]
        return _BUILTINS.get(name, "unknown")

    def _mark(self, first: int | None, count: int, kind: str) -> None:
        if first is not None:
            self.tags[first : first + count] = [f"B-{kind}", *[f"I-{kind}"] * (count - 1)]

    def _inside(self, node: ast.AST, children: Iterator[ast.AST]) -> None:
        self.scopes.append(_Scope(node))
        for child in children:
            self.visit(child)
        self.scopes.pop()

    def visit_Module(self, node: ast.Module) -> None:
        self._inside(node, ast.iter_child_nodes(node))

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        # Decorators, defaults and annotations are computed outside the function.
        outside = [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
        outside += [each.annotation for each in _arguments(node.args) if each.annotation is not None]
        for child in [*outside, *([node.returns] if node.returns is not None else [])]:
            self.visit(child)
        self._parameters(node.args)
        self._inside(node, iter(node.body))

    visit_FunctionDef = _visit_function
    visit_AsyncFunctionDef = _visit_function

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]:
            self.visit(default)
        self._parameters(node.args)
        self._inside(node, iter([node.body]))

    def _parameters(self, arguments: ast.arguments) -> None:
        for each in _arguments(arguments):
            if each.arg not in _IMPLICIT:
                self._mark(self.source.starts.get((each.lineno, each.col_offset)), 1, "PARAM")

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass  # its tokens are not kept

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg is not None:
            self._mark(self.source.starts.get((node.lineno, node.col_offset)), 1, "KEYWORD")
        self.visit(node.value)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name and node.type is not None and self.scopes[-1].names.get(node.name) == "local":
            last = self.source.ends.get((node.type.end_lineno or 0, node.type.end_col_offset or 0))
            if last is not None and self.source.words[last + 1 : last + 3] == ["as", node.name]:
                self._mark(last + 2, 1, "LOCAL")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self._name(node.func, called=True)
        for child in [*node.args, *node.keywords]:
            self.visit(child)

    def visit_Name(self, node: ast.Name) -> None:
        self._name(node, called=False)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._name(node, called=False)

    def _name(self, node: ast.expr, *, called: bool) -> None:
        """Tags a name with the attributes after it; goes on inside where there is no name at the root."""
        parts: list[str] = []
        root = node
        while isinstance(root, ast.Attribute):
            parts.append(root.attr)
            root = root.value
        if not isinstance(root, ast.Name):
            self.visit(root)
            return
        first = self.source.starts.get((root.lineno, root.col_offset))
        if first is None or root.id in _IMPLICIT:
            return
        kind = self._kind(root.id)
        if kind in ("param", "local"):
            self._mark(first, 1, kind.upper())
        elif kind == "module" and not parts:
            self._mark(first, 1, "MODULE")
        else:
            whole = [root.id]
            for part in reversed(parts):
                whole += [".", part]
            if self.source.words[first : first + len(whole)] != whole:
                return
            capital = _CAPITAL.fullmatch(whole[-1]) is not None
            if kind == "module":
                role = "CLASS" if capital else "FUNC" if called else ""
                self._mark(first, len(whole) if role else 1, role or "MODULE")
            elif not parts and (kind == "class" or (kind in ("imported", "unknown") and capital)):
                self._mark(first, 1, "CLASS")
            elif not parts and called and kind != "global":
                self._mark(first, 1, "FUNC")
            elif parts and kind == "class":
                self._mark(first, 1, "CLASS")


def majority(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The tag that each word has most often in rows with tokens and tags: what knows words and no context."""
    counted: dict[str, dict[str, int]] = {}
    for row in rows:
        for token, tag in zip(row["tokens"], row["tags"], strict=True):
            of = counted.setdefault(token, {})
            of[tag] = of.get(tag, 0) + 1
    return {token: max(sorted(of), key=of.__getitem__) for token, of in counted.items()}
