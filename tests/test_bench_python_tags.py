from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
from peftkit_bench.data import docstrings, python_tags
from peftkit_bench.data.dataset import SPLITS, DataError, Dataset
from peftkit_bench.data.python_tags import MOST, PER_FILE, PythonTags, windows
from peftkit_bench.metrics import METRICS
from peftkit_bench.tasks.token_classification import TokenClassification, entities, entity_counts

SIZES = {"train": 24, "tune": 8, "stop": 8, "test": 12}


def tagged(code: str, window: int = 0) -> str:
    """One window as "token/TAG", tags of O left out."""
    _, tokens, tags = windows(code.encode())[window]
    return " ".join(token if tag == "O" else f"{token}/{tag}" for token, tag in zip(tokens, tags, strict=True))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "import os\ndef f(path, mode=0):\n  '''Doc.'''\n  name = os.path.join(path, 'a' 'b')  # why\n"
            "  return name\n",
            "def f ( path/B-PARAM , mode/B-PARAM = 0 ) : name/B-LOCAL = os/B-FUNC ./I-FUNC path/I-FUNC ./I-FUNC "
            'join/I-FUNC ( path/B-PARAM , "" ) return name/B-LOCAL',
        ),
        (
            "import sys\nclass Box: pass\ndef g(self, key):\n  self.box = Box(key=key)\n  key(sys.argv, width)\n"
            "width = 3\n",
            "def g ( self , key/B-PARAM ) : self . box = Box/B-CLASS ( key/B-KEYWORD = key/B-PARAM ) key/B-PARAM ( "
            "sys/B-MODULE . argv , width )",
        ),
        (
            "def outer(a):\n  def inner(b):\n    return a + b\n  return inner(a.x.y()) or [c for c in len(a)]\n",
            "def outer ( a/B-PARAM ) : def inner ( b/B-PARAM ) : return a/B-PARAM + b/B-PARAM return inner/B-FUNC ( "
            "a/B-PARAM . x . y ( ) ) or [ c/B-LOCAL for c/B-LOCAL in len/B-FUNC ( a/B-PARAM ) ]",
        ),
        (
            "from m import thing, Thing\nasync def h(x: int) -> Thing:\n  try:\n    thing(x)\n"
            "  except ValueError as e:\n    raise Thing(e) from e\n",
            "async def h ( x/B-PARAM : int/B-CLASS ) -> Thing/B-CLASS : try : thing/B-FUNC ( x/B-PARAM ) except "
            "ValueError/B-CLASS as e/B-LOCAL : raise Thing/B-CLASS ( e/B-LOCAL ) from e/B-LOCAL",
        ),
        (
            "def k(ä, b):\n  global c\n  c = f'{b}' + ä; d = lambda z=b: z\n  return d\n",
            'def k ( ä/B-PARAM , b/B-PARAM ) : global c c = "" + ä/B-PARAM ; d/B-LOCAL = lambda z/B-PARAM = b/B-PARAM '
            ": z/B-PARAM return d/B-LOCAL",
        ),
    ],
)
def test_names_are_tagged_by_what_they_stand_for(code: str, expected: str) -> None:
    ast.parse(code)
    assert tagged(code) == expected


def test_windows_are_whole_statements_of_one_function() -> None:
    body = "".join(f"  value_{i} = first + second * {i}\n" for i in range(20))
    code = f"def long(first, second):\n{body}\ndef next_one(a, b):\n  return a + b\n\ndef short(): pass\n"
    found = windows(code.encode())
    assert [line for line, _, _ in found] == [1, 23]
    assert len(found[0][1]) == 8 + 5 * 7
    assert found[0][1][-1].isdecimal()
    assert found[1][1] == ["def", "next_one", "(", "a", ",", "b", ")", ":", "return", "a", "+", "b"]
    assert windows(b"def broken(:\n") == []
    assert windows(b"\xff\xfe = 1\n") == []


VERBS = ("read", "write", "sort", "merge", "split", "count", "parse", "load", "save", "check", "close", "open", "find")
NOUNS = ("line", "file", "word", "table", "page", "node", "edge", "tree", "path", "image", "sound", "color", "frame")


def sources(root: Path) -> Path:
    """Many small files whose functions differ."""
    root.mkdir()
    for i in range(13):
        lines = []
        for j in range(13):
            verb, noun, other = VERBS[j], NOUNS[i], NOUNS[(i + j + 1) % 13]
            lines.append(
                f"def {verb}_{noun}({noun}, {other}):\n    {verb} = {other}.{verb}({noun})\n"
                f"    return {VERBS[(i + j) % 13]}({verb}, {noun}={other})\n"
            )
        (root / f"file_{i}.py").write_text("\n".join(lines) + "\n" + lines[0])
    (root / "tests").mkdir()
    (root / "tests" / "skipped.py").write_text("def skipped(one, two):\n    return one + two\n")
    return root


def build(root: Path, cache: Path, **changes: int) -> Dataset:
    return python_tags.python_tags({**SIZES, **changes}, root=root, cache=cache)


def test_splits_share_no_file_and_no_window(tmp_path: Path) -> None:
    made = build(sources(tmp_path / "src"), tmp_path / "cache")
    assert [len(made.splits[name]) for name in SPLITS] == list(SIZES.values())
    files = [{e.source.rpartition(":")[0] for e in made.splits[name]} for name in SPLITS]
    groups = [{e.group for e in made.splits[name]} for name in SPLITS]
    assert sum(map(len, files)) == len(set.union(*files))
    assert sum(map(len, groups)) == len(set.union(*groups))
    texts = [" ".join(e.fields["tokens"]) for name in SPLITS for e in made.splits[name]]
    assert len(docstrings.without_duplicates(texts)) == len(texts)
    assert not any("skipped" in text for text in texts)
    assert max(sum(e.source.startswith(f) for name in SPLITS for e in made.splits[name]) for f in files[0]) <= PER_FILE


def test_data_set_is_the_same_again_and_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = sources(tmp_path / "src")
    first = build(root, tmp_path / "one")
    again = build(root, tmp_path / "two")
    assert first == again
    monkeypatch.setattr(python_tags, "windows", lambda code: pytest.fail("built again"))
    assert build(root, tmp_path / "one") == first
    monkeypatch.undo()
    (root / "file_3.py").write_text("def other(one, two):\n    return one + two\n")
    assert build(root, tmp_path / "one").hash != first.hash


def test_sizes_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    root = sources(tmp_path / "src")
    with pytest.raises(DataError, match=r"for train 24, .* test 500, found train \d+, .*; ask for fewer rows"):
        build(root, tmp_path, test=500)
    with pytest.raises(DataError, match="tune: expected a positive number of rows, found 0"):
        build(root, tmp_path, tune=0)


def test_the_standard_library_gives_rows_of_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    task = TokenClassification()
    made = PythonTags(train=60, tune=20, stop=20, test=40).dataset(task)
    rows: dict[str, list[Any]] = {name: [e.fields for e in made.splits[name]] for name in SPLITS}
    assert set(task.facts(rows)["tags"]) >= {"B-PARAM", "B-LOCAL", "B-FUNC", "I-FUNC", "B-CLASS"}
    assert all(8 <= len(row["tokens"]) <= MOST for row in rows["train"])
    # Words alone do not decide.
    known = python_tags.majority(rows["train"])
    counts = [
        entity_counts(entities([known.get(token, "O") for token in row["tokens"]]), entities(row["tags"]))
        for row in rows["test"]
    ]
    assert 0.05 < METRICS["entity F1"].score(counts) < 0.6
