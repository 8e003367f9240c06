from __future__ import annotations

import os
from pathlib import Path

import pytest
from peftkit_bench.data import docstrings
from peftkit_bench.data.dataset import SPLITS, DataError, Dataset
from peftkit_bench.data.docstrings import (
    DocstringOrigin,
    docstring_origin,
    first_paragraphs,
    mask,
    normalise,
    without_duplicates,
)
from peftkit_bench.tasks.sequence_classification import SequenceClassification

SUBJECTS = {
    "alpha": ("matrix", "vector", "tensor", "kernel", "gradient", "eigenvalue"),
    "beta": ("socket", "packet", "router", "request", "header", "cookie"),
}
VERBS = ("computes", "rotates", "collects", "measures", "removes", "inverts", "orders", "splits", "encodes", "repairs")


def write_sources(root: Path) -> dict[str, Path]:
    """Two packages of many small files, every docstring different."""
    roots = {}
    number = 0
    for origin, nouns in SUBJECTS.items():
        roots[origin] = root / origin
        roots[origin].mkdir(parents=True)
        for file in range(60):
            lines = []
            for function in range(3):
                number += 1
                words = f"{nouns[number % 6]} {VERBS[number % 10]} w{chr(97 + number % 26)}{chr(97 + number // 26)}x"
                lines.append(
                    f'def f{function}():\n    """The {words} every {nouns[(number + 2) % 6]} q{chr(97 + number % 26)}'
                    f'{chr(97 + number // 26)}z {VERBS[(number + 3) % 10]} fully.\n\n    More text.\n    """\n'
                )
            (roots[origin] / f"module_{file}.py").write_text("\n".join(lines))
    return roots


SIZES = {"train": 60, "tune": 12, "stop": 12, "test": 24}
SMALL = {"train": 2, "tune": 2, "stop": 2, "test": 2}


def build(root: Path, cache: Path, **changes: int) -> Dataset:
    return docstring_origin(["alpha", "beta"], {**SIZES, **changes}, roots=write_sources(root), cache=cache)


def test_data_set_is_balanced_and_splits_share_no_text_and_no_file(tmp_path: Path) -> None:
    made = build(tmp_path / "src", tmp_path / "cache")
    assert {name: len(made.splits[name]) for name in SPLITS} == SIZES
    for found in made.splits.values():
        labels = [e.fields["label"] for e in found]
        assert labels.count("alpha") == labels.count("beta") == len(found) // 2
    for of in (lambda e: normalise(e.fields["text"]), lambda e: e.source, lambda e: e.group):
        parts = [{of(e) for e in made.splits[name]} for name in SPLITS]
        assert sum(map(len, parts)) == len(set.union(*parts))
    assert len({normalise(e.fields["text"]) for found in made.splits.values() for e in found}) == 108


def test_data_set_of_installed_packages_leaks_nothing(tmp_path: Path) -> None:
    made = docstring_origin(["python", "numpy"], {"train": 80, "tune": 20, "stop": 20, "test": 40}, cache=tmp_path)
    texts = [e.fields["text"] for name in SPLITS for e in made.splits[name]]
    assert len(texts) == len({normalise(text) for text in texts})
    sources = [{e.source for e in made.splits[name]} for name in SPLITS]
    assert sum(map(len, sources)) == len(set.union(*sources))
    everything = " ".join(texts).lower()
    for name in ("numpy", "python", " np.", "http:", "https:"):
        assert name not in everything


def test_data_set_is_the_same_when_built_again_and_when_read_from_the_cache(tmp_path: Path) -> None:
    first = build(tmp_path / "src", tmp_path / "one")
    cached = docstring_origin(
        ["alpha", "beta"], SIZES, roots={o: tmp_path / "src" / o for o in SUBJECTS}, cache=tmp_path / "one",
    )  # fmt: skip
    again = build(tmp_path / "other", tmp_path / "two")
    assert first == cached
    assert first.hash == cached.hash == again.hash
    assert first.splits["test"] == again.splits["test"]


def test_data_set_is_built_anew_when_a_source_changes(tmp_path: Path) -> None:
    first = build(tmp_path / "src", tmp_path / "cache")
    used = tmp_path / "src" / first.splits["test"][0].source
    used.write_text('"""A wholly different description that nothing else in here has."""\n')
    second = docstring_origin(
        ["alpha", "beta"], SIZES, roots={o: tmp_path / "src" / o for o in SUBJECTS}, cache=tmp_path / "cache",
    )  # fmt: skip
    assert second.hash != first.hash
    assert len(list((tmp_path / "cache").glob("*.json"))) == 2


def test_data_set_raises_when_an_origin_has_too_little(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"origin 'alpha': expected 400 different docstrings for train, found \d+; ask"):
        build(tmp_path / "src", tmp_path / "cache", train=800)


def test_data_set_raises_when_sizes_or_origins_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tune: expected a multiple of 2"):
        build(tmp_path / "src", tmp_path / "cache", tune=13)
    with pytest.raises(DataError, match="origin 'nosuchpackage': expected an installed package"):
        docstring_origin(["python", "nosuchpackage"], SMALL, cache=tmp_path)
    with pytest.raises(DataError, match="two different origins"):
        docstring_origin(["python", "python"], SMALL, cache=tmp_path)


def test_cache_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: object, destination: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "src", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return a NumPy array like np.zeros.", "Return a NAME array like NAME."),
        ("See :func:`scipy.optimize.minimize` and :class:`~torch.Tensor`.", "See NAME and NAME."),
        ("A PyTorch module, see https://pytorch.org/docs.", "A NAME module, see NAME"),
        ("Uses the ``linalg`` module.", "Uses the NAME module."),
        ("A linear map of the plain words.", "A linear map of the plain words."),
        ("Draw with plt or mpl on sklearn data.", "Draw with NAME or NAME on NAME data."),
        ("The HuggingFaceHub client of Hugging Face.", "The NAME client of NAME."),
    ],
)
def test_mask_hides_names_of_origins(text: str, expected: str) -> None:
    assert mask(text, modules=frozenset({"linalg"})) == expected


def test_mask_hides_module_names_that_only_their_own_origin_mentions() -> None:
    texts = {"one": ["calls ndimage on a signal"], "two": ["sends a signal"]}
    telltales = docstrings.telltale_names(texts, {"one": {"ndimage", "signal"}, "two": set()})
    assert telltales == {"ndimage"}
    assert mask("calls ndimage on a signal", telltales) == "calls NAME on a signal"


def test_near_duplicates_are_removed_and_others_kept() -> None:
    texts = [
        "Returns the first element of the given list of values.",
        "returns the FIRST element of the given list of values",
        "Returns the first element of the given list of numbers.",
        "Opens a file and reads everything that is in it.",
    ]
    assert without_duplicates(texts) == [0, 3]


def test_first_paragraphs_stop_at_blank_lines_sections_and_rules() -> None:
    code = b'''
"""Module text
goes on."""

class A:
    """Class text.

    Second paragraph.
    """

    def f(self):
        """Function text.
        Args:
            x: number
        """

    async def g(self):
        """Heading
        =======
        """
'''
    assert first_paragraphs(code) == ["Module text goes on.", "Class text.", "Function text.", "Heading"]
    assert first_paragraphs(b"def broken(:") == []


def test_source_files_are_never_imported(tmp_path: Path) -> None:
    roots = write_sources(tmp_path / "src")
    (roots["alpha"] / "bomb.py").write_text(
        '"""Text that is long enough to be taken for an example."""\nraise SystemExit'
    )
    assert docstring_origin(["alpha", "beta"], SIZES, roots=roots, cache=tmp_path).splits["train"]


def test_source_gives_the_columns_of_its_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    task = SequenceClassification()
    made = DocstringOrigin(origins=("python", "numpy"), train=4, tune=2, stop=2, test=2).dataset(task)
    assert all(task.read(e.fields) == e.fields for found in made.splits.values() for e in found)
