"""Docstring origin: which package does a docstring come from? Real text that is on every machine.

Source files are parsed, never imported. The first paragraph of each docstring is the text, the package the label.
Names that give the origin away are masked, duplicates and near duplicates are removed over all splits together, and
splits are made of whole source files, so that no text and no file is in two splits.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from peftkit_bench.data.dataset import SPLITS, DataError, Dataset, Example, default_cache, kept
from peftkit_bench.record import digest
from peftkit_bench.tasks.contract import Task

VERSION = 2
"""Raised whenever the same sources would give other examples; part of the cache's key."""
MASK = "NAME"
STANDARD_LIBRARY = "python"
"""The origin that stands for the standard library."""
PER_FILE = 12
"""At most this many docstrings of one file, so that no file decides the result."""
MIN_WORDS, MAX_WORDS = 6, 60
NEAR = 0.5
"""Texts whose three-word sequences overlap by more than this share (Jaccard) are near duplicates."""

_SKIPPED = {"test", "tests", "testing", "_vendor", "_distutils", "__pycache__", "site-packages", "dist-packages",
            "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "config"}  # fmt: skip
_STEMS = ("numpy", "scipy", "sympy", "networkx", "torch", "matplotlib", "pyplot", "huggingface", "hugging face",
          "pandas", "sklearn", "scikit", "tensorflow", "keras", "cpython", "jupyter", "ipython", "pillow", "mpmath",
          "safetensors", "tokenizers", "pygments")  # fmt: skip
_WORDS = ("np", "sp", "plt", "mpl", "nx", "pd", "tf", "jax", "flax", "cupy", "dask", "python", "python2", "python3",
          "transformers", "diffusers", "aten", "pep", "posix", "stdlib", "pil", "caffe2", "onnx")  # fmt: skip
_SECTION = re.compile(
    r"^\s*(args|arguments|parameters?|returns?|raises?|yields?|examples?|notes?|usage)\s*:?\s*$", re.I
)
_ROLE = re.compile(r":[\w:+-]+:`~?([^`]*)`")
_LINK = re.compile(r"\b(?:https?|ftp)://\S+|\bwww\.\S+")
_DOTTED = re.compile(r"\b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+\b")
_CODE = re.compile(r"`+([^`]+)`+")
_NAMED = re.compile(
    r"\b\w*(?:" + "|".join(re.escape(s) for s in _STEMS) + r")\w*\b|\b(?:" + "|".join(_WORDS) + r")\b", re.I
)
_WORD = re.compile(r"[a-z]+")


def normalise(text: str) -> str:
    """Lower-case words only, masks left out: two texts that agree here are the same text."""
    return " ".join(_WORD.findall(text.replace(MASK, " ").lower()))


@dataclass(frozen=True, kw_only=True)
class DocstringOrigin:
    """Docstrings of installed packages: which of them does a text come from?"""

    name: ClassVar[str] = "docstring-origin"
    tasks: ClassVar[tuple[str, ...]] = ("seq-cls",)
    origins: tuple[str, ...]
    """"python" for the standard library, or names of installed packages; the classes."""
    train: int
    """Examples over all classes, the same number of each; likewise the others."""
    tune: int
    stop: int
    test: int

    def dataset(self, task: Task) -> Dataset:
        """See `Source`."""
        return docstring_origin(self.origins, {name: getattr(self, name) for name in SPLITS})


def docstring_origin(
    origins: Sequence[str],
    sizes: Mapping[str, int],
    *,
    roots: Mapping[str, Path] | None = None,
    cache: Path | None = None,
) -> Dataset:
    """The data set, balanced over origins; the same for the same sources.

    Args:
        origins: "python" for the standard library, or names of installed packages; the classes.
        sizes: examples over all classes by split, in the order of SPLITS.
        roots: folder of sources by origin; None: where the packages are installed.
        cache: folder for finished data sets; None: `default_cache()`.

    Raises:
        DataError: an origin is not installed, has too few docstrings, or a size is no multiple of the classes.
    """
    if len(set(origins)) != len(origins) or len(origins) < 2:
        raise DataError(f"expected at least two different origins, found {list(origins)}")
    for name, size in sizes.items():
        if size <= 0 or size % len(origins):
            raise DataError(f"{name}: expected a multiple of {len(origins)} (one share an origin), found {size}")
    folders = dict(roots) if roots is not None else {origin: source_root(origin) for origin in origins}
    files = {origin: sorted(python_files(folders[origin])) for origin in origins}
    versions = {origin: _version(origin) if roots is None else "given" for origin in origins}
    stamp = [VERSION, versions, sizes, {o: [(str(f.relative_to(folders[o])), f.stat().st_size) for f in files[o]]
                                        for o in origins}]  # fmt: skip
    path = (cache or default_cache()) / f"docstring-origin-{digest(stamp)}.json"
    shares = {name: size // len(origins) for name, size in sizes.items()}
    return kept(path, lambda: _build(origins, folders, files, versions, shares))


def source_root(origin: str) -> Path:
    """The folder that holds an origin's sources.

    Raises:
        DataError: it is not installed.
    """
    if origin == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(origin) if "." not in origin else None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"origin {origin!r}: expected an installed package; install it or take it off the list")
    return Path(next(iter(spec.submodule_search_locations)))


def _version(origin: str) -> str:
    if origin == STANDARD_LIBRARY:
        return platform.python_version()
    return importlib.metadata.version(origin)


# Collecting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Raw:
    text: str
    source: str
    split: str


def python_files(root: Path) -> Iterator[Path]:
    """The Python files below a folder, tests, vendored packages and the like left out."""
    for path in root.rglob("*.py"):
        if not _SKIPPED & set(path.relative_to(root).parts[:-1]):
            yield path


def rank(source: str) -> str:
    """What an order that looks random, and is the same everywhere, is made by: a hash."""
    return hashlib.sha256(source.encode()).hexdigest()


def chosen(what: str, shares: Mapping[str, int]) -> str:
    """A name, by a hash of what it is chosen for, in proportion to the shares."""
    position = int(rank(what)[:12], 16) / 16**12 * sum(shares.values())
    for name, share in shares.items():
        if position < share:
            return name
        position -= share
    return list(shares)[-1]


def first_paragraphs(code: bytes) -> list[str]:
    """The first paragraph of every docstring in a source file, in order; none when it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc:
                found.append((getattr(node, "lineno", 0), _first_paragraph(doc)))
    return [text for _, text in sorted(found, key=lambda pair: pair[0]) if text]


def _first_paragraph(doc: str) -> str:
    lines: list[str] = []
    for line in doc.strip().splitlines():
        if not line.strip() or _SECTION.match(line) or set(line.strip()) <= set("-=~*#"):
            break
        lines.append(line.strip())
    text = " ".join(" ".join(lines).split())
    return " ".join(text.split()[:MAX_WORDS])


def _collect(origin: str, root: Path, files: Sequence[Path], shares: Mapping[str, int]) -> Iterator[_Raw]:
    """Docstrings of files in hash order, until each split has three times what it needs."""
    missing = {name: 3 * share for name, share in shares.items()}
    named = sorted((f"{origin}/{f.relative_to(root).as_posix()}", f) for f in files)
    for source, path in sorted(named, key=lambda pair: rank(pair[0])):
        split = chosen("split " + source, shares)
        if missing[split] <= 0:
            continue
        texts = [t for t in first_paragraphs(path.read_bytes()) if len(_WORD.findall(t.lower())) >= MIN_WORDS]
        for text in sorted(texts, key=rank)[:PER_FILE]:
            missing[split] -= 1
            yield _Raw(text, source, split)


# Masking ------------------------------------------------------------------------------------------------------------


def module_names(root: Path, files: Iterable[Path]) -> set[str]:
    """Lower-case names of the modules and packages below a folder."""
    names: set[str] = set()
    for file in files:
        parts = file.relative_to(root).with_suffix("").parts
        names |= {part.lower().lstrip("_") for part in parts}
    return {n for n in names if len(n) > 2 and n != "init__"}


def telltale_names(texts: Mapping[str, Sequence[str]], modules: Mapping[str, set[str]]) -> frozenset[str]:
    """Module names that the docstrings of their own origin alone mention; they give the origin away."""
    used = {origin: {w for t in found for w in re.findall(r"\w+", t.lower())} for origin, found in texts.items()}
    telling = set()
    for origin, names in modules.items():
        elsewhere = set().union(*(words for other, words in used.items() if other != origin))
        telling |= {n for n in names & used[origin] if n not in elsewhere}
    return frozenset(telling)


def mask(text: str, telltales: frozenset[str] = frozenset(), modules: frozenset[str] = frozenset()) -> str:
    """The text without the names that give its origin away.

    Masked are links, dotted references, names and aliases of well-known packages, the given telltale names, and
    module names where the text marks them as code.
    """
    text = _ROLE.sub(lambda found: f"`{found[1]}`", text)
    text = _DOTTED.sub(MASK, _LINK.sub(MASK, text))
    text = _CODE.sub(lambda found: MASK if found[1].strip().lower().lstrip("_") in modules else found[1], text)
    text = _NAMED.sub(MASK, text)
    text = re.sub(r"\w+", lambda found: MASK if found[0].lower().lstrip("_") in telltales else found[0], text)
    return " ".join(text.split())


# Duplicates ---------------------------------------------------------------------------------------------------------


def _shingles(words: Sequence[str]) -> frozenset[tuple[str, ...]]:
    return frozenset(tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


def without_duplicates(texts: Sequence[str]) -> list[int]:
    """Indices of the texts that are no duplicate and no near duplicate of an earlier one."""
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    kept: dict[int, frozenset[tuple[str, ...]]] = {}
    for index, text in enumerate(texts):
        shingles = _shingles(normalise(text).split())
        shared: dict[int, int] = defaultdict(int)
        for shingle in shingles:
            for other in holders[shingle]:
                shared[other] += 1
        if any(n / (len(shingles) + len(kept[other]) - n) > NEAR for other, n in shared.items()):
            continue
        kept[index] = shingles
        for shingle in shingles:
            holders[shingle].append(index)
    return list(kept)


# Assembling ---------------------------------------------------------------------------------------------------------


def _build(
    origins: Sequence[str],
    folders: Mapping[str, Path],
    files: Mapping[str, Sequence[Path]],
    versions: Mapping[str, str],
    shares: Mapping[str, int],
) -> Dataset:
    raw = {origin: list(_collect(origin, folders[origin], files[origin], shares)) for origin in origins}
    modules = {origin: module_names(folders[origin], files[origin]) for origin in origins}
    telltales = telltale_names({origin: [r.text for r in found] for origin, found in raw.items()}, modules)
    everywhere = frozenset().union(*modules.values())
    pool: list[tuple[int, str, str, str]] = []
    for label, origin in enumerate(origins):
        for found in raw[origin]:
            text = mask(found.text, telltales, everywhere)
            if len(normalise(text).split()) >= MIN_WORDS:
                pool.append((label, found.split, found.source, text))
    # Duplicates are dropped in hash order, so that no origin is favoured.
    pool.sort(key=lambda row: rank(f"{row[2]} {row[3]}"))
    pool = [pool[index] for index in without_duplicates([row[3] for row in pool])]
    chosen: dict[str, list[tuple[int, str, str, str]]] = {name: [] for name in shares}
    for label, origin in enumerate(origins):
        for name in shares:
            mine = [row for row in pool if row[0] == label and row[1] == name]
            if len(mine) < shares[name]:
                raise DataError(
                    f"origin {origin!r}: expected {shares[name]} different docstrings for {name}, found {len(mine)}; "
                    "ask for fewer examples or take the origin off the list"
                )
            chosen[name] += mine[: shares[name]]
    sources = sorted({row[2] for rows in chosen.values() for row in rows})
    number = {source: index for index, source in enumerate(sources)}
    splits = {
        name: tuple(
            Example(fields={"text": text, "label": origins[label]}, group=number[source], source=source)
            for label, _, source, text in sorted(rows, key=lambda row: rank(row[3]))
        )
        for name, rows in chosen.items()
    }
    return Dataset(name="docstring origin", splits=splits, versions=dict(versions))
