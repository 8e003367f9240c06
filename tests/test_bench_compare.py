from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_records
import numpy as np
import pytest
from bench_records import GROUPS, LABELS, made_up
from peftkit_bench import record
from peftkit_bench.record import Outcomes, Record, RecordError
from peftkit_bench.report import compare as module
from peftkit_bench.report.compare import Verdict, compare, sentences, to_json
from peftkit_bench.report.matching import finals, pairs
from peftkit_bench.statistics import Comparison, compare_all, holm
from peftkit_bench.tables import table

SCORES = {"LoRA": 0.9, "BitFit": 0.85, "Prefix": 0.89}


def runs(scores: dict[str, float] = SCORES, seeds: Sequence[int] = (0, 1, 2), **changes: Any) -> list[Record]:
    """Each contender with some seeds, whose scores differ a little and not alike."""
    shifts = {name: np.random.default_rng(len(name)).normal(0, 0.003, 9) for name in scores}
    return [made_up(n, s + shifts[n][i], 100, seed=i, **changes) for n, s in scores.items() for i in seeds]


def noisy(name: str, share: float, seeds: Sequence[int] = (0, 1, 2), **changes: Any) -> list[tuple[Record, Outcomes]]:
    """Runs that are right by chance, and what they predicted."""
    found = []
    for seed in seeds:
        rng = np.random.default_rng([len(name), seed])
        right = (rng.random(len(LABELS)) < share).astype(float)
        made = Outcomes(predictions=right.tolist(), counts=[[r] for r in right], groups=GROUPS)
        found.append((made_up(name, float(right.mean()), 100, seed=seed, outcomes=made.digest, **changes), made))
    return found


def written(folder: Path, records: Sequence[Record] = (), more: Sequence[tuple[Record, Outcomes]] = ()) -> Path:
    bench_records.write(folder, records)
    with record.writer(folder) as writer:
        for each, made in more:
            writer.append(each, made)
    return folder


def verdict(folder: Path, records: Sequence[Record], first: str, second: str, **options: Any) -> Verdict:
    return compare(record.read(written(folder, records)), first, second, **options)


def test_better_is_said_with_the_effect_its_interval_and_the_test(tmp_path: Path) -> None:
    found = verdict(tmp_path, runs(), "LoRA", "BitFit")
    (task,) = found.tasks
    ends = task.difference
    assert sentences(found) == [
        f"LoRA is better than BitFit on made up: +{100 * ends.mean:.1f} points of accuracy (95 % {100 * ends.low:.1f} "
        f"to {100 * ends.high:.1f}; p < 0.001 by the t test over 3 seeds and 400 examples in 200 groups)."
    ]
    assert task.advantage == 1
    assert 0.02 < ends.low < ends.mean < ends.high < 0.08


def test_it_is_the_test_of_the_report_without_correction(tmp_path: Path) -> None:
    records = runs()
    (task,) = verdict(tmp_path, records, "Prefix", "LoRA").tasks
    tables = {}
    for name in SCORES:
        read = [r.read_outcomes() for r in record.read(tmp_path) if isinstance(r, Record) and r.contender == name]
        tables[name] = table(module.METRICS["accuracy"], [r.counts for r in read])
    pair = next(c for c in compare_all(tables, GROUPS) if {c.first, c.second} == {"LoRA", "Prefix"})
    assert isinstance(pair, Comparison)
    assert task.p == pytest.approx(pair.p)
    assert task.difference.mean == pytest.approx(-pair.difference.mean)
    assert task.contenders == 3


def test_the_order_of_the_names_turns_signs_and_not_words(tmp_path: Path) -> None:
    found = verdict(tmp_path, runs(), "BitFit", "LoRA")
    assert found.tasks[0].difference.mean < 0
    assert sentences(found) == sentences(compare(record.read(tmp_path), "LoRA", "BitFit"))
    assert found.tasks[0].advantage == -1
    assert [run.second_only > run.first_only for _, run in found.tasks[0].runs] == [True] * 3


def test_lower_perplexity_is_better(tmp_path: Path) -> None:
    records = runs({"LoRA": 9.0, "BitFit": 8.5}, metric="perplexity")
    found = verdict(tmp_path, records, "LoRA", "BitFit")
    (task,) = found.tasks
    assert task.difference.mean == pytest.approx(0.5, abs=0.03)
    assert task.advantage == -1
    assert task.runs == ()
    (said,) = sentences(found)
    assert said.startswith(
        f"BitFit is better than LoRA on made up: perplexity lower by {task.difference.mean:.3f} (95 % "
    )
    assert f"{task.difference.low:.3f} to {task.difference.high:.3f}; p < 0.001" in said
    assert "McNemar" not in module.shown(found)


def test_undecided_says_what_remains_possible_and_what_would_settle_it(tmp_path: Path) -> None:
    folder = written(tmp_path, more=[*noisy("A", 0.80), *noisy("BB", 0.78)])
    found = compare(record.read(folder), "A", "BB")
    (task,) = found.tasks
    first, second, third = sentences(found)
    seen, need = task.difference, task.needed
    assert task.advantage == 0
    assert first.startswith(
        f"A and BB cannot be told apart on made up: A minus BB is {100 * seen.mean:+.1f} points of "
    )
    assert f"(95 % {100 * seen.low:+.1f} to {100 * seen.high:+.1f}; p = {task.p:.3f} by the t test" in first
    assert second == (
        f"The data leave it possible for A to be better by up to {100 * seen.high:.1f} points or BB to be better by up "
        f"to {-100 * seen.low:.1f} points."
    )
    assert need.seeds is not None
    assert need.examples > 400
    assert f"{int(need.examples) - 400:,} more test examples ({int(need.examples):,} in all)" in third
    assert f"{int(need.seeds) - 3:,} more seed" in third
    assert "settle a difference as large as that seen, with a chance of 80 %" in third


def test_undecided_perplexity_turns_the_ends_of_the_interval(tmp_path: Path) -> None:
    found = verdict(tmp_path, runs({"LoRA": 9.0, "BitFit": 8.5}, metric="perplexity"), "LoRA", "BitFit")
    seen = replace(found.tasks[0].difference, mean=0.1, low=-0.2, high=0.4)
    turned = replace(found, tasks=(replace(found.tasks[0], difference=seen, p=0.4, p_corrected=0.4),))
    first, second = sentences(turned)[:2]
    assert "LoRA minus BitFit is +0.100 of perplexity, the lower the better (95 % -0.200 to +0.400;" in first
    assert second == (
        "The data leave it possible for LoRA to be better by up to 0.200 or BitFit to be better by up to 0.400."
    )


@pytest.mark.parametrize(
    ("seeds", "examples", "said"),
    [
        (5, float("inf"), "2 more seeds (5 in all) would settle a difference as large as that seen, with a chance of "
         "80 %; more test examples alone never would, so much do runs differ."),
        (float("inf"), 1400, "1,000 more test examples (1,400 in all) would settle a difference as large as that seen, "
         "with a chance of 80 %; more seeds alone never would, so few are the examples."),
        (4, 1400, "1 more seed (4 in all), or 1,000 more test examples (1,400 in all), would settle a difference as "
         "large as that seen, with a chance of 80 %."),
        (float("inf"), float("inf"), "Neither more seeds nor more test examples alone would settle a difference as "
         "large as that seen, with a chance of 80 %: both are needed."),
    ],
)  # fmt: skip
def test_what_would_settle_it(tmp_path: Path, seeds: float, examples: float, said: str) -> None:
    found = verdict(tmp_path, runs(), "LoRA", "Prefix")
    (task,) = found.tasks
    changed = replace(task, needed=replace(task.needed, seeds=seeds, examples=examples), p_corrected=0.5)
    assert sentences(replace(found, tasks=(changed,)))[-1] == said


def test_one_seed_speaks_of_these_runs_and_names_the_test(tmp_path: Path) -> None:
    found = verdict(tmp_path, runs(seeds=[0]), "LoRA", "BitFit")
    assert found.tasks[0].test == "permutation test"
    assert found.tasks[0].needed.seeds is None
    assert "by the permutation test over 1 seed and 400 examples in 200 groups" in sentences(found)[0]
    assert sentences(found)[-1] == (
        "One seed each: this speaks of these two runs, not of the methods; run at least 3 seeds."
    )


def test_equal_predictions_leave_nothing_to_settle(tmp_path: Path) -> None:
    found = verdict(tmp_path, runs({"LoRA": 0.9, "Lora": 0.9}), "LoRA", "Lora")
    assert len(sentences(found)) == 1
    assert "is +0.0 points of accuracy (95 % +0.0 to +0.0; p = 1.000" in sentences(found)[0]


def test_mcnemar_is_told_of_each_run_of_accuracy(tmp_path: Path) -> None:
    found = verdict(tmp_path, runs(), "LoRA", "BitFit")
    assert [seed for seed, _ in found.tasks[0].runs] == [0, 1, 2]
    for (_, run), mine, theirs in zip(found.tasks[0].runs, runs({"LoRA": 0.9}), runs({"BitFit": 0.85}), strict=True):
        assert (run.first_only - run.second_only) / 400 == pytest.approx(mine.score - theirs.score)
    assert "| made up | 5,000 | 0 | " in module.shown(found)


def test_searches_and_seeds_of_one_alone_are_left_out(tmp_path: Path) -> None:
    searched = runs(phase="search", learning_rate=0.1, split="tune")
    more = [made_up("LoRA", 0.2, 100, seed=7)]
    found = verdict(tmp_path, [*searched, *runs(), *more], "LoRA", "BitFit")
    assert found.tasks[0].seeds == (0, 1, 2)
    assert sentences(found)[-1] == "Seeds that only one of the two has are left out: 7."
    plain = verdict(tmp_path / "plain", runs(), "LoRA", "BitFit")
    assert found.tasks[0].difference == plain.tasks[0].difference


def test_the_newest_form_of_a_contender_counts(tmp_path: Path) -> None:
    old = runs({"LoRA": 0.3}, range(5), learning_rate=0.1, started="2025-01-01T00:00:00+00:00")
    found = verdict(tmp_path, [*old, *runs(), *runs({"BitFit": 0.85}, [3, 4])], "LoRA", "BitFit")
    assert found.tasks[0].advantage == 1
    assert found.tasks[0].seeds == (0, 1, 2)
    assert sentences(found)[1:] == [
        "LoRA was run with other settings before; the newest count.",
        "Seeds that only one of the two has are left out: 3, 4.",
    ]


def budgets() -> list[Record]:
    made = [*runs(budget=5000), *runs({"LoRA": 0.93, "BitFit": 0.84}, budget=74_000)]
    return [*made, *runs({"Full": 0.95}, knob=None)]


def test_several_budgets_make_a_table_with_wins_corrected_for_their_number(tmp_path: Path) -> None:
    found = verdict(tmp_path, budgets(), "LoRA", "BitFit")
    assert [task.budget for task in found.tasks] == [5000, 74_000]
    assert [task.p_corrected for task in found.tasks] == holm([task.p for task in found.tasks])
    assert max(task.p_corrected / task.p for task in found.tasks) == 2
    assert sentences(found)[0] == (
        "Over 2 tasks and budgets, corrected for their number: LoRA is better on 2, BitFit on 0, and on 0 the two "
        "cannot be told apart."
    )
    said = module.shown(found)
    assert "LoRA is better than BitFit on made up at 74,000 parameters: +" in said
    assert "| made up | 74,000 | accuracy | 9" in said
    assert len(verdict(tmp_path / "one", budgets(), "LoRA", "BitFit", budget=74_000).tasks) == 1


def test_a_size_of_its_own_is_compared_at_each_budget(tmp_path: Path) -> None:
    found = verdict(tmp_path, budgets(), "LoRA", "Full")
    assert [task.budget for task in found.tasks] == [5000, 74_000]
    assert [task.advantage for task in found.tasks] == [-1, -1]


def test_one_contender_at_two_budgets_is_named_as_the_report_does(tmp_path: Path) -> None:
    found = verdict(tmp_path, budgets(), "LoRA, 74k", "lora, 5k")
    assert found.tasks[0].names == ("LoRA at 74,000", "LoRA at 5,000")
    assert sentences(found)[0].startswith("LoRA at 74,000 is better than LoRA at 5,000 on made up: +")


def test_several_tasks_are_tested_as_a_sample_of_tasks(tmp_path: Path) -> None:
    data = made_up("LoRA", 0.9, 1).data
    made = []
    for i in range(6):
        made += runs({"LoRA": 0.9, "BitFit": 0.85}, data={**data, "name": f"data {i}", "hash": str(i)},
                     started=f"2026-01-0{i + 1}T00:00:00+00:00")  # fmt: skip
        for n, each in enumerate(made):
            made[n] = replace(each, key=f"{each.contender}-{each.data['hash']}-{each.seed}")
    found = verdict(tmp_path, made, "LoRA", "BitFit")
    assert [task.data for task in found.tasks] == [f"data {i}" for i in reversed(range(6))]
    assert found.over_tasks == pytest.approx(2 / 2**6)
    assert "Over 6 tasks, corrected for their number: LoRA is better on 6" in sentences(found)[0]
    assert "p = 0.031 by Wilcoxon's signed ranks" in sentences(found)[0]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"data": {"name": "made up", "hash": "d1"}}, "data made up (d0) and made up (d1)"),
        ({"backbone": {"name": "small", "hash": "b1"}}, "backbone tiny (b0) and small (b1)"),
        ({"split": "stop"}, "split test and stop"),
        ({"metric": "exact match"}, "metric accuracy and exact match"),
    ],
)
def test_what_was_run_on_something_else_is_not_compared(tmp_path: Path, change: dict[str, Any], differs: str) -> None:
    records = [*runs({"LoRA": 0.9}), *runs({"BitFit": 0.8}, **change)]
    with pytest.raises(RecordError) as caught:
        verdict(tmp_path, records, "LoRA", "BitFit")
    assert str(caught.value) == (f"LoRA and BitFit cannot be compared: they differ in {differs}; run both in one suite")


def test_contenders_of_different_suites_are_compared_with_a_note(tmp_path: Path) -> None:
    other = {**made_up("x", 0.5, 1).training, "steps": 500}
    records = [*runs({"LoRA": 0.9}), *runs({"BitFit": 0.8}, suite="long", training=other)]
    found = verdict(tmp_path, records, "LoRA", "BitFit")
    assert sentences(found)[1:] == [
        "The two come from different suites, made-up and long.",
        "The two were trained differently: steps 40 and 500.",
    ]
    both = verdict(tmp_path / "both", [*records, *runs({"BitFit": 0.85})], "LoRA", "BitFit")
    assert [task.suite for task in both.tasks] == ["made-up"]
    assert sentences(both)[1:] == []


@pytest.mark.parametrize(
    ("first", "second", "options", "message"),
    [
        ("Lorra", "BitFit", {}, "expected a contender of these records (LoRA, BitFit, Prefix), found 'Lorra'; did you "
         "mean 'LoRA'?"),
        ("LoRA", "zzz", {}, "expected a contender of these records (LoRA, BitFit, Prefix), found 'zzz'"),
        ("LoRA", "lora", {}, "expected two different contenders, found 'LoRA' twice"),
        ("LoRA", "BitFit", {"budget": 7}, "expected a budget that LoRA or BitFit was run at (5,000), found 7"),
        ("LoRA", "BitFit", {"suite": "x"}, "expected one of the suites made-up, found 'x'"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(first: str, second: str, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError) as caught:
        verdict(tmp_path, runs(), first, second, **options)
    assert str(caught.value).replace("found 'lora' twice", "found 'LoRA' twice") == message


def test_no_common_seed_and_no_finished_cell_are_refused(tmp_path: Path) -> None:
    records = [*runs({"LoRA": 0.9}, [0, 1]), *runs({"BitFit": 0.8}, [2])]
    with pytest.raises(
        RecordError, match=r"LoRA and BitFit have no seed in common on made up: \[0, 1\] and \[2\]; run"
    ):
        verdict(tmp_path, records, "LoRA", "BitFit")
    with pytest.raises(RecordError, match="expected records of finished cells, found none"):
        finals(runs(phase="search"))


def test_predictions_of_other_examples_are_refused(tmp_path: Path) -> None:
    ((odd, _),) = noisy("BitFit", 0.8, [0])
    short = Outcomes(predictions=[1], counts=[[1.0]], groups=[0])
    folder = written(tmp_path, runs({"LoRA": 0.9}, [0]), [(replace(odd, outcomes=short.digest), short)])
    with pytest.raises(RecordError, match="BitFit, seed 0, and of LoRA, seed 0, are of other examples"):
        compare(record.read(folder), "LoRA", "BitFit")


def test_runs_of_others_beside_them_say_how_runs_vary() -> None:
    (pair,) = pairs(finals([*runs(), *runs({"Late": 0.5}, [0])]), "LoRA", "BitFit")
    assert [[r.contender for r in other] for other in pair.others] == [["Prefix"] * 3]


def test_json_holds_the_numbers_and_the_sentences(tmp_path: Path) -> None:
    written(tmp_path, runs())
    made = json.loads(module.json_text([tmp_path], "LoRA", "BitFit"))
    found = compare(record.read(tmp_path), "LoRA", "BitFit")
    assert made == json.loads(to_json(found))
    assert made["sentences"] == sentences(found)
    assert (made["better"], made["not_told_apart"], made["worse"]) == (1, 0, 0)
    assert made["tasks"][0]["difference"]["mean"] == found.tasks[0].difference.mean
    assert made["tasks"][0]["better"] == "LoRA"
    endless = replace(found.tasks[0], needed=replace(found.tasks[0].needed, seeds=float("inf")))
    assert json.loads(to_json(replace(found, tasks=(endless,))))["tasks"][0]["needed"]["seeds"] is None


def test_text_reads_several_folders(tmp_path: Path) -> None:
    written(tmp_path / "a", runs({"LoRA": 0.9}))
    written(tmp_path / "b", runs({"BitFit": 0.8}))
    assert module.text([tmp_path / "a", tmp_path / "b"], "LoRA", "BitFit", 5000).startswith(
        "LoRA is better than BitFit"
    )
