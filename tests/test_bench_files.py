from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peftkit_bench.data.dataset import SPLITS, DataError, Dataset
from peftkit_bench.data.files import Files, read_table
from peftkit_bench.data.hub import Hub
from peftkit_bench.tasks.sequence_classification import SequenceClassification
from peftkit_bench.tasks.token_classification import TokenClassification

TASK = SequenceClassification()
NOUNS = ("river", "window", "teacher", "engine", "garden", "letter", "copper")


def made(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"text": f"The {NOUNS[i % 7]} number {i}, so to say.", "label": "even" if i % 2 == 0 else "odd"}
        for i in range(start, start + count)
    ]


def written(path: Path, rows: Sequence[Any]) -> Path:
    """The rows in the format that the path's ending says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows), indent=1))
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(arrow.Table.from_pylist(list(rows)), path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def texts(data: Dataset, split: str) -> list[str]:
    return [example.fields["text"] for example in data.splits[split]]


def refusal(task: Any = TASK, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        Files(**options).dataset(task)
    return str(caught.value)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"rows{ending}", made(100))
    reference = written(tmp_path / "reference.jsonl", made(100))
    assert Files(train=str(path)).dataset(TASK).hash == Files(train=str(reference)).dataset(TASK).hash


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("rows.jsonl", '{"text": "a"}\n\n{"text": "b\\u2028c"}\n', [1, 3]),
        ("rows.jsonl", '\ufeff{"text": "a\u2028b"}\n{"text": "c"}', [1, 2]),
        ("rows.json", '[\n {"text":\n  "a"},\n {"text": "b"}\n]\n', [2, 4]),
        ("rows.csv", 'text\n"a\nb"\nc\n', [2, 4]),
        ("rows.csv", '\ufefftext,label\n"a, ""b""",1\n', [2]),
        ("rows.tsv", 'text\tlabel\n"a" b\t1\n', [2]),
    ],
)
def test_places_are_the_lines_of_the_file(tmp_path: Path, name: str, content: str, places: list[int]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    table = read_table(tmp_path / name, name)
    assert [place for place, _ in table.rows] == [f"{name}:{line}" for line in places]
    assert table.problems == ()
    if name == "rows.tsv":
        assert table.rows[0][1]["text"] == '"a" b'
    if "b" in content.splitlines()[-1] and name == "rows.csv":
        assert table.rows[0][1]["text"] == 'a, "b"'


def test_bad_rows_are_reported_together_with_their_lines(tmp_path: Path) -> None:
    rows: list[Any] = made(40)
    rows[3] = {"text": "no label"}
    rows[16]["label"] = 1.5
    rows[20] = [1, 2]
    path = written(tmp_path / "train.jsonl", rows)
    with path.open("a") as file:
        file.write("{'text': 'single quotes'}\n")
    test = written(tmp_path / "test.jsonl", [*made(20, 100), {"text": " ", "label": "odd"}])
    message = refusal(train="train.jsonl", test=str(test), folder=str(tmp_path))
    assert message.startswith("5 rows cannot be used")
    assert "train.jsonl:4: column 'label': expected a class" in message
    assert "train.jsonl:17: column 'label': expected a class, as text or a whole number, found 1.5" in message
    assert "train.jsonl:21: expected an object with a value for each column, found [1, 2]" in message
    assert "train.jsonl:41: expected one JSON object, found \"{'text'" in message
    assert f"{test}:21: column 'text': expected text" in message


def test_only_ten_bad_rows_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", [*({"text": f"x{i}", "label": None} for i in range(23)), *made(3)])
    message = refusal(train=str(path))
    assert message.startswith("23 rows cannot be used")
    assert message.count("t.jsonl:") == 10
    assert message.endswith("and 13 more")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", "text,label\na,b,c\nd\n", ":2: expected 2 cells as in the header, found 3"),
        ("t.csv", "text,text\na,b\n", "expected a header of different names"),
        ("t.csv", 'text,label\n"a"b,c\n', "double their own quotes"),
        ("t.json", '{"data": []}', "expected a list of objects, found '{\"data\": []}'"),
        (
            "t.json",
            '[{"text": "a"}\n {"text": "b"}]',
            "expected a comma or the end of the list after the row of line 1",
        ),
        ("t.json", '[{"text": "a"},\n {"text": b}]', ":2: expected JSON"),
        ("t.json", '[{"text": "a"},', ":1: expected JSON"),
        ("t.json", '[{"text": "a"}] x', "expected the end of the file after the list"),
        ("t.parquet", "text", "expected a Parquet file"),
        ("t.txt", "text", "expected a file that ends in .jsonl"),
        ("t.jsonl", "\n", "expected rows, found none"),
        ("t.jsonl", '{"text": "\udcff"}', ":1: expected UTF-8, found byte 0xff"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    message = refusal(train=str(tmp_path / name))
    assert expected in message
    assert name in message


def test_missing_column_names_what_is_there_and_how_to_map_it(tmp_path: Path) -> None:
    rows = [{"review": row["text"], "mood": row["label"]} for row in made(100)]
    path = written(tmp_path / "t.jsonl", rows)
    message = refusal(train=str(path))
    assert "expected a column 'text' (text)" in message
    assert "has 'review', 'mood'" in message
    assert "`columns: {text: ...}`" in message
    assert "there is no column 'stars'" in refusal(train=str(path), columns={"text": "review", "label": "stars"})
    assert "did you mean 'label'?" in refusal(train=str(path), columns={"lable": "mood"})
    plain = written(tmp_path / "plain.jsonl", made(100))
    mapped = Files(train=str(path), columns={"text": "review", "label": "mood"}).dataset(TASK)
    assert mapped.hash == Files(train=str(plain)).dataset(TASK).hash


def test_paths_may_hold_variables_and_are_relative_to_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "train.jsonl", made(100))
    monkeypatch.setenv("PEFTKIT_TEST_DATA", str(tmp_path))
    reference = Files(train="train.jsonl", folder=str(tmp_path)).dataset(TASK)
    assert reference.name == tmp_path.name
    for path in ("$PEFTKIT_TEST_DATA/train.jsonl", "${PEFTKIT_TEST_DATA}/train.jsonl"):
        assert Files(train=path, folder="/nowhere").dataset(TASK).hash == reference.hash
    monkeypatch.delenv("PEFTKIT_TEST_DATA")
    message = refusal(train="$PEFTKIT_TEST_DATA/train.jsonl")
    assert "train: '$PEFTKIT_TEST_DATA/train.jsonl' needs the environment variable PEFTKIT_TEST_DATA" in message
    assert "does not exist" in refusal(train="other.jsonl", folder=str(tmp_path))
    assert "is a folder" in refusal(train=str(tmp_path))


def test_splits_are_cut_where_files_are_missing(tmp_path: Path) -> None:
    train = str(written(tmp_path / "train.jsonl", made(200)))
    held = str(written(tmp_path / "held.jsonl", made(50, 1000)))
    test = str(written(tmp_path / "test.jsonl", made(30, 2000)))

    def sizes(**files: str) -> list[int]:
        return [len(Files(**files).dataset(TASK).splits[split]) for split in SPLITS]

    assert sizes(train=train) == [120, 20, 20, 40]
    assert sizes(train=train, test=test) == [160, 20, 20, 30]
    assert sizes(train=train, validation=held) == [160, 25, 25, 40]
    assert sizes(train=train, validation=held, test=test) == [200, 25, 25, 30]
    data = Files(train=train).dataset(TASK)
    assert "test: 40 rows cut from the 200 of the training file" in data.notes
    found = Counter(text for split in SPLITS for text in texts(data, split))
    assert found == Counter(row["text"] for row in made(200))


def test_cuts_depend_on_the_rows_and_the_seed_alone(tmp_path: Path) -> None:
    rows = made(200)
    first = Files(train=str(written(tmp_path / "a.jsonl", rows)), train_rows=50).dataset(TASK)
    turned = Files(train=str(written(tmp_path / "b.jsonl", rows[::-1])), train_rows=50).dataset(TASK)
    other = Files(train=str(tmp_path / "a.jsonl"), train_rows=50, seed=1).dataset(TASK)
    assert first.hash == turned.hash
    assert set(texts(first, "test")) != set(texts(other, "test"))
    # A row more or less moves few others: those at the edges of the cuts.
    longer = Files(train=str(written(tmp_path / "c.jsonl", made(201)))).dataset(TASK)
    assert len(set(texts(longer, "test")) ^ set(texts(first, "test"))) <= 2


def test_cuts_do_not_depend_on_the_hash_seed_of_python(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", made(100))
    # No real task: each imports transformers.
    code = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from peftkit_bench.data.files import Files\n"
        "column = SimpleNamespace(name='text', also=(), required=True, what='text', answer=False)\n"
        "task = SimpleNamespace(name='t', columns=(column,), read=lambda row: {**row, 'label': row['text'][-13:]})\n"
        "print(Files(train=sys.argv[1]).dataset(task).hash)\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, env=environment
    )
    column = SimpleNamespace(name="text", also=(), required=True, what="text", answer=False)
    task: Any = SimpleNamespace(name="t", columns=(column,), read=lambda row: {**row, "label": row["text"][-13:]})
    assert done.stdout.strip() == Files(train=str(path)).dataset(task).hash


def test_rows_that_are_in_the_test_rows_too_are_left_out(tmp_path: Path) -> None:
    test = made(20, 500)
    shared = [
        {"text": test[0]["text"].upper(), "label": "odd"},  # another label: still the same text
        {"text": test[1]["text"].replace(" ", "  ").replace(",", ""), "label": "even"},
    ]
    train = written(tmp_path / "train.jsonl", [*made(100), *shared])
    held = written(tmp_path / "held.jsonl", [*made(40, 300), test[2], made(1)[0]])
    path = written(tmp_path / "test.jsonl", test)
    data = Files(train=str(train), validation=str(held), test=str(path)).dataset(TASK)
    assert len(data.splits["train"]) == 99
    assert len(data.splits["tune"]) + len(data.splits["stop"]) == 41
    assert "train: 2 rows left out, their text or group is in the test rows too" in data.notes
    assert sum("1 rows left out" in note for note in data.notes) == 2
    assert texts(data, "train").count(test[0]["text"].upper()) == 0


def test_rows_that_repeat_stay_on_one_side_of_each_cut_and_count_as_one_group(tmp_path: Path) -> None:
    data = Files(train=str(written(tmp_path / "t.jsonl", [*made(100), *made(100)]))).dataset(TASK)
    sides = [set(texts(data, split)) for split in SPLITS]
    assert sum(map(len, sides)) == 100
    assert sum(len(data.splits[split]) for split in SPLITS) == 200
    assert len({example.group for example in data.splits["test"]}) == len(data.splits["test"]) / 2
    assert f"train: {len(data.splits['train']) // 2} rows repeat another one and are kept" in data.notes


def test_groups_stay_together(tmp_path: Path) -> None:
    rows = [{**row, "group": f"document {i // 4}"} for i, row in enumerate(made(200))]
    data = Files(train=str(written(tmp_path / "t.jsonl", rows))).dataset(TASK)
    groups = [{example.group for example in data.splits[split]} for split in SPLITS]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 50
    assert len(data.splits["test"]) == 40
    named = [{**row, "document": i // 4} for i, row in enumerate(made(200))]
    path = str(written(tmp_path / "n.jsonl", named))
    data = Files(train=path, columns={"group": "document"}).dataset(TASK)
    assert len({example.group for example in data.splits["test"]}) == 10
    # A group that is in the test file too is not trained on.
    test = written(tmp_path / "test.jsonl", [{**row, "group": "document 0"} for row in made(20, 900)])
    data = Files(train=str(tmp_path / "t.jsonl"), test=str(test)).dataset(TASK)
    assert any("4 rows left out" in note for note in data.notes) or (
        sum(len(data.splits[split]) for split in SPLITS[:3]) == 196
    )


def test_limits_choose_at_random_and_say_so(tmp_path: Path) -> None:
    path = str(written(tmp_path / "t.jsonl", made(200)))
    data = Files(train=path, train_rows=30, test_rows=10, tune_rows=500).dataset(TASK)
    assert [len(data.splits[split]) for split in SPLITS] == [30, 20, 20, 10]
    assert "train: 30 of 120 rows, chosen at random with seed 0" in data.notes
    assert not any("500" in note for note in data.notes)
    whole = Files(train=path).dataset(TASK)
    assert set(texts(data, "train")) < set(texts(whole, "train"))
    assert set(texts(data, "test")) < set(texts(whole, "test"))
    assert "expected at least 8 rows in each split, found train 0" in refusal(train=path, test=path)


def test_too_few_rows_are_refused_with_the_numbers(tmp_path: Path) -> None:
    path = str(written(tmp_path / "t.jsonl", made(60)))
    assert "found train 36, tune 6, stop 6, test 12" in refusal(train=path)[:200]
    many = str(written(tmp_path / "u.jsonl", made(200)))
    assert "found train 4, tune 20, stop 20, test 40" in refusal(train=many, train_rows=4)


def test_texts_of_signs_alone_are_told_apart(tmp_path: Path) -> None:
    signs = [{"text": "!" * (i + 1), "label": "even"} for i in range(100)]
    data = Files(train=str(written(tmp_path / "t.jsonl", signs))).dataset(TASK)
    assert len({example.group for split in SPLITS for example in data.splits[split]}) == 100


def test_lists_survive_csv_as_json(tmp_path: Path) -> None:
    rows = [
        {"tokens": json.dumps([f"w{i}", "in", "Rome"]), "tags": json.dumps(["O", "O", "B-city"])} for i in range(90)
    ]
    data = Files(train=str(written(tmp_path / "t.csv", rows))).dataset(TokenClassification())
    assert data.splits["test"][0].fields["tokens"][1:] == ["in", "Rome"]


# A hub ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("hub_cache")
def test_a_folder_is_read_as_a_hub_would_be(tmp_path: Path) -> None:
    folder = tmp_path / "moods"
    folder.mkdir()
    written(folder / "train.jsonl", made(100))
    written(folder / "test.jsonl", made(20, 500))
    data = Hub(path=str(folder), test="test").dataset(TASK)
    files = Files(train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl")).dataset(TASK)
    assert data.hash == files.hash
    assert data.name == "moods"
    with pytest.raises(DataError, match=r"moods dev: cannot be loaded .*Unknown split"):
        Hub(path=str(folder), validation="dev").dataset(TASK)
    with pytest.raises(
        DataError, match=r"moods train: expected a column 'label'.* has 'text', 'label'|no column 'mood'"
    ):
        Hub(path=str(folder), columns={"label": "mood"}).dataset(TASK)


@pytest.mark.usefixtures("hub_cache")
def test_classes_of_a_hub_become_their_names(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "named"
    folder.mkdir()
    features = datasets.Features(
        {"tokens": datasets.List(datasets.Value("string")),
         "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-city"]))}
    )  # fmt: skip
    rows = [{"tokens": [f"w{i}", "Rome"], "ner_tags": [0, 1]} for i in range(90)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    data = Hub(path=str(folder)).dataset(TokenClassification())
    assert data.splits["test"][0].fields["tags"] == ["O", "B-city"]
    plain = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    made_ = [{"text": f"text {i}", "label": -1 if i == 2 else i % 2} for i in range(90)]
    datasets.Dataset.from_list(made_, features=plain).to_parquet(hidden / "train.parquet")
    with pytest.raises(DataError, match="train row 3: a class without a name, as in splits whose answers are withheld"):
        Hub(path=str(hidden)).dataset(TASK)


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_that_cannot_be_reached_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    with pytest.raises(DataError, match=r"no such data set .*check its name and revision"):
        Hub(path=str(tmp_path / "nowhere")).dataset(TASK)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"the hub cannot be reached .*`source: files`"):
        Hub(path="nobody/nothing").dataset(TASK)
