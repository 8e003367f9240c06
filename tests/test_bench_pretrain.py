from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peftkit_bench import ngrams, pretrain
from peftkit_bench.data import python_source
from peftkit_bench.data.dataset import SPLITS, DataError
from peftkit_bench.data.python_source import PRETRAINING, SHARES, PythonSource, share, source_files, windows
from peftkit_bench.pretrain import RECIPES, PretrainError, Recipe, decoder, encode, main, recipe_of, train_tokenizer
from peftkit_bench.tasks.causal_lm import CausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SMALL = Recipe(size="tiny", vocabulary=320, hidden=32, layers=1, heads=2, feed_forward=48, context=32, windows=8,
               at_once=4, steps=25, matrix_rate=0.02, other_rate=0.02, package_characters=20_000,
               origins=("python", "numpy"))  # fmt: skip


def write_sources(root: Path, *origins: str, files: int = 100) -> dict[str, str]:
    """Packages whose every line names its file."""
    roots = {}
    for origin in origins:
        (root / origin / "inner").mkdir(parents=True)
        roots[origin] = str(root / origin)
        for number in range(files):
            path = root / origin / ("inner" if number % 2 else ".") / f"m{number}.py"
            lines = [f"def {origin}_{number}_{line}(x):\n    return x + {line}\n" for line in range(30)]
            path.write_text("\n".join(lines))
    return roots


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two packages that stand for those that decoders are pretrained on, and one that does not."""
    roots = write_sources(tmp_path / "src", "python", "numpy", "sympy")
    monkeypatch.setattr(pretrain, "source_files", lambda origin: source_files(origin, Path(roots[origin])))
    monkeypatch.setattr(pretrain, "version", lambda origin: "1")
    monkeypatch.setattr(pretrain, "RECIPES", {"tiny": SMALL})
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    return roots


# Shares of files, and rows ------------------------------------------------------------------------------------------


def test_every_file_is_in_one_share_for_good_and_a_package_that_was_left_out_is_all_for_adapting() -> None:
    found = Counter(share(f"numpy/a/{n}.py") for n in range(4000))
    assert set(found) == set(SHARES)
    assert all(abs(found[name] / 40 - part) < 2 for name, part in SHARES.items())
    assert {share(f"sympy/a/{n}.py") for n in range(500)} == {"benchmark"}
    # Decoders that exist were pretrained with this division.
    known = {
        "json/decoder": "pretraining",
        "base64": "general",
        "code": "general",
        "glob": "benchmark",
        "wave": "benchmark",
    }
    assert {name: share(f"python/{name}.py") for name in known} == known
    assert "sympy" not in PRETRAINING
    assert "torch" not in PRETRAINING


def test_windows_are_whole_lines() -> None:
    lines = [f"    line {n} {'x' * (n % 17)}\n" for n in range(200)]
    text = "".join(lines)
    found = list(windows(text, 120))
    assert all(60 <= len(window) <= 120 for window in found)
    assert "\n".join(found) == text.strip("\n")
    assert found[0].startswith("    line 0")
    assert list(windows("a\n" * 30 + "b" * 500 + "\n" + "c\n" * 30, 80)) == [("a\n" * 30).strip(), ("c\n" * 30).strip()]
    assert list(windows("a\n", 80)) == []


def rows_of(roots: dict[str, str], **options: Any) -> Any:
    sizes = {"train": 40, "tune": 8, "stop": 8, "test": 16}
    return PythonSource(**{"origins": ("sympy",), "characters": 200, "roots": roots, **sizes, **options}).dataset(
        CausalLM()
    )


def test_splits_share_no_file_and_no_row_and_are_the_same_every_time(sources: dict[str, str], tmp_path: Path) -> None:
    made = rows_of(sources)
    assert {name: len(made.splits[name]) for name in SPLITS} == {"train": 40, "tune": 8, "stop": 8, "test": 16}
    for of in (lambda e: e.source, lambda e: e.group, lambda e: e.fields["text"]):
        seen = [{of(e) for e in made.splits[name]} for name in SPLITS]
        assert sum(map(len, seen)) == len(set().union(*seen))
    texts = [e.fields["text"] for name in SPLITS for e in made.splits[name]]
    assert all(
        100 <= len(text) <= 200 and text in Path(sources["sympy"], e_source(made, text)).read_text() for text in texts
    )
    cached = list((tmp_path / "cache").iterdir())
    assert len(cached) == 1
    again = rows_of(sources)
    assert (again.hash, again.describe()) == (made.hash, made.describe())
    cached[0].unlink()
    assert rows_of(sources).hash == made.hash
    assert rows_of(sources, characters=150).hash != made.hash


def e_source(made: Any, text: str) -> str:
    return str(next(e.source for s in made.splits.values() for e in s if e.fields["text"] == text).partition("/")[2])


def test_text_that_several_files_share_is_in_one_row_only(sources: dict[str, str]) -> None:
    licence = "".join(f"# line {n} of a licence that every file has\n" for n in range(5))
    for path in Path(sources["sympy"]).rglob("*.py"):
        path.write_text(licence + path.read_text())
    made = rows_of(sources, train=500, tune=0, stop=0, test=0)
    texts = [e.fields["text"] for rows in made.splits.values() for e in rows]
    assert sum("line 0 of a licence" in text for text in texts) == 1


def test_no_row_is_of_a_file_that_was_pretrained_on(sources: dict[str, str]) -> None:
    sizes = {"train": 10, "tune": 0, "stop": 0, "test": 10}
    adapted = rows_of(sources, origins=("python", "sympy"), **sizes)
    general = rows_of(sources, origins=("python", "numpy"), part="general", **sizes)
    text, _ = encode(
        train_tokenizer(iter(["def x"]), 300), pretrain._texts(pretrain._files(SMALL), SMALL, "pretraining"), 10**9
    )
    read = train_tokenizer(iter(["def x"]), 300).decode(text)
    assert "python_" in read
    assert "numpy_" in read
    for made, part in ((adapted, "benchmark"), (general, "general")):
        examples = [e for rows in made.splits.values() for e in rows]
        assert {share(e.source) for e in examples} == {part}
        assert {e.source.partition("/")[0] for e in examples} == set(made.versions)
        assert not any(line in read for e in examples for line in e.fields["text"].split("\n") if "def" in line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "train"}, "part: expected 'benchmark' or 'general', found 'train'"),
        ({"part": "general"}, "origins: sympy is not among the packages that decoders are pretrained on"),
        ({"origins": ("sympy", "sympy")}, "origins: expected each once, found sympy, sympy"),
        ({"train": -1}, "expected sizes that are not negative and not all 0"),
        ({"train": 0, "tune": 0, "stop": 0, "test": 0}, "expected sizes that are not negative and not all 0"),
        ({"characters": 10}, "characters: expected at least 40, found 10"),
        ({"train": 10_000}, "train: expected 10000 rows, found "),
        ({"origins": ("no_such_package",)}, "no_such_package"),
    ],
)
def test_what_cannot_be_had_is_refused(sources: dict[str, str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        rows_of(sources, **options)
    assert message in str(caught.value)


def test_the_defaults_name_installed_packages() -> None:
    assert PythonSource()._origins() == ("sympy",)
    assert PythonSource(part="general")._origins() == PRETRAINING
    assert python_source.version("python").count(".") == 2
    assert python_source.version("PIL") == __import__("PIL").__version__
    assert source_files("rich")[0].source.startswith("rich/")


# The tokenizer and n-grams ------------------------------------------------------------------------------------------


def test_the_tokenizer_keeps_every_byte_and_begins_with_bos() -> None:
    tokenizer = train_tokenizer(iter(["def add(first):\n        return first\n"] * 5), 300)
    text = "def add(é, 12):\n\t\treturn 'x'  # \u4f60 <|end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert (
        tokenizer.decode(tokenizer("12 <tab>\té\u4f60")["input_ids"], skip_special_tokens=True) == "12 <tab>\té\u4f60"
    )
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4
    encoded, read = encode(tokenizer, iter([text, "def"]), 10**6)
    assert read == len(text.encode()) + 3
    assert list(encoded).count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(encoded[: list(encoded).index(tokenizer.eos_token_id)]) == text
    assert len(encode(tokenizer, iter([text, "def"]), 7)[0]) == 7


def test_ngrams_are_those_of_the_formula() -> None:
    generator = random.Random(1)
    training = [generator.randrange(5) if generator.random() < 0.6 else i % 5 for i in range(300)]
    validation = [generator.randrange(7) for _ in range(60)]

    def chance(length: int, end: int) -> float:
        if length == 0:
            return 1 / 7
        history, word = validation[end - length + 1 : end], validation[end]
        follow = [training[i] for i in range(length - 1, len(training)) if training[i - length + 1 : i] == history]
        if not follow:
            return chance(length - 1, end)
        kinds = len(set(follow))
        return (follow.count(word) + kinds * chance(length - 1, end)) / (len(follow) + kinds)

    found = ngrams.nats(np.array(training), np.array(validation), 3)
    for length in (1, 2, 3):
        # The first tokens have shorter histories.
        expected = [-math.log(chance(min(length, end + 1), end)) for end in range(len(validation))]
        assert found[length] == pytest.approx(sum(expected) / len(expected))


# Pretraining --------------------------------------------------------------------------------------------------------


def test_a_decoder_is_made_once_and_predicts_better_than_single_tokens(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = decoder("tiny")
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1, printed  # no bars of other packages
    assert "nats a token on held-out files" in printed[0]
    card = json.loads((folder / "pretraining.json").read_text())
    assert card["validation_nats_per_token"] < 0.8 * card["ngram_validation_nats_per_token"]["1"]
    assert card["losses"][-1] < card["losses"][0]
    assert len(card["losses"]) == 25
    assert card["tokens"] == 25 * 8 * 31
    assert card["validation_bits_per_byte"] == pytest.approx(
        card["validation_nats_per_token"] / math.log(2) / card["bytes_per_token"], rel=1e-3
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert tokenizer.pad_token_id == model.config.pad_token_id
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".jinja"}
    monkeypatch.setattr(pretrain, "pretrain", lambda *_, **__: pytest.fail("made again"))
    assert decoder("tiny") == folder
    assert main(["--quiet"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"


def test_another_recipe_another_text_another_version_is_another_decoder(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(pretrain, "pretrain", lambda recipe, folder, **_: made.append((recipe.steps, folder)))
    decoder("tiny")
    decoder("tiny", steps=3)
    monkeypatch.setattr(pretrain, "version", lambda origin: "2")
    decoder("tiny")
    Path(sources["numpy"], "more.py").write_text("x = 1\n")
    decoder("tiny")
    monkeypatch.setattr(pretrain, "VERSION", pretrain.VERSION + 1)
    decoder("tiny")
    assert [steps for steps, _ in made] == [25, 3, 25, 25, 25]
    assert len({folder for _, folder in made}) == 5


def test_the_same_seed_gives_the_same_weights(sources: dict[str, str], tmp_path: Path) -> None:
    short = replace(SMALL, steps=3)
    for name, recipe in (("a", short), ("b", short), ("c", replace(short, seed=1))):
        pretrain.pretrain(recipe, tmp_path / name, progress=False)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(bool((a[name] == b[name]).all()) for name in a)
    assert any(bool((a[name] != c[name]).any()) for name in a)


@pytest.mark.parametrize("place", ["ngrams.nats", "json.dumps", "os.rename"])
def test_an_interruption_leaves_nothing_behind(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "RECIPES", {"tiny": replace(SMALL, steps=1)})
    module, name = place.split(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(pretrain, module), name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder("tiny", progress=False)
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


def test_a_decoder_that_another_process_placed_first_is_kept(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made"
    counted = ngrams.nats

    def meanwhile(*arguments: Any) -> dict[int, float]:
        folder.mkdir()
        (folder / "pretraining.json").write_text("{}")
        return counted(*arguments)

    monkeypatch.setattr(ngrams, "nats", meanwhile)
    pretrain.pretrain(replace(SMALL, steps=1), folder, progress=False)
    assert [p.name for p in folder.iterdir()] == ["pretraining.json"]
    assert [p.name for p in tmp_path.iterdir() if "made" in p.name] == ["made"]


def test_what_cannot_be_made_is_refused(
    sources: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PretrainError, match=r"size: did you mean 'tiny'\?"):
        recipe_of("tny")
    with pytest.raises(PretrainError, match="steps: expected at least 1, found 0"):
        recipe_of("tiny", 0)
    with pytest.raises(PretrainError, match="expected a folder that is not there yet"):
        pretrain.pretrain(SMALL, tmp_path)
    for path in [p for root in ("python", "numpy") for p in Path(sources[root]).rglob("*.py")]:
        path.write_text("x\n")
    with pytest.raises(PretrainError, match=r"at least one window of 32 tokens .* name more packages"):
        pretrain.pretrain(SMALL, tmp_path / "new", progress=False)
    assert main(["--size", "tny"]) == 2
    assert "size: " in capsys.readouterr().err


@pytest.mark.parametrize("size", RECIPES)
def test_recipes_add_up(size: str) -> None:
    recipe = RECIPES[size]
    assert recipe.size == size
    assert recipe.windows % recipe.at_once == 0
    assert recipe.hidden % recipe.heads == 0
    assert recipe.hidden // recipe.heads % 2 == 0
