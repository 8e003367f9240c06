"""Is A better than B: the verdict in sentences, with what would settle it where records do not, as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit_bench import record
from peftkit_bench.metrics import METRICS, Metric
from peftkit_bench.record import AnyRecord
from peftkit_bench.report.sentences import p_cell, p_value
from peftkit_bench.report.verdict import TaskVerdict, Verdict, compare

__all__ = ["Verdict", "compare", "json_text", "sentences", "shown", "text", "to_json"]


def sentences(verdict: Verdict) -> list[str]:
    """The verdict, a sentence each; of several tasks, how often either is better, then each task's own."""
    found: list[str] = []
    if len(verdict.tasks) > 1:
        found.append(_over_all(verdict))
    several = len({task.budget for task in verdict.tasks}) > 1
    for task in verdict.tasks:
        found += _of_task(task, several)
        found += task.notes
    return found


def _over_all(verdict: Verdict) -> str:
    wins, ties, losses = (verdict.count(each) for each in (1, 0, -1))
    places = "tasks" if len({task.budget for task in verdict.tasks}) == 1 else "tasks and budgets"
    said = (
        f"Over {len(verdict.tasks)} {places}, corrected for their number: {verdict.first} is better on {wins}, "
        f"{verdict.second} on {losses}, and on {ties} the two cannot be told apart."
    )
    if verdict.over_tasks is not None:
        said += f" Over the tasks as a sample of tasks: {p_value(verdict.over_tasks)} by Wilcoxon's signed ranks."
    return said


def _of_task(task: TaskVerdict, with_budget: bool) -> list[str]:
    metric, difference = METRICS[task.metric], task.difference
    place = task.data + (f" at {task.budget:,} parameters" if with_budget and task.budget is not None else "")
    found = []
    if task.advantage:
        better, worse = task.names if task.advantage > 0 else task.names[::-1]
        sign = math.copysign(1, difference.mean)
        low, high = (_plain(metric, end) for end in sorted((sign * difference.low, sign * difference.high)))
        amount = _plain(metric, abs(difference.mean))
        found.append(
            f"{better} is better than {worse} on {place}: "
            + (
                f"+{amount} points of {metric.name} (95 % {low} to {high}; {_tested(task)})."
                if metric.percent and metric.higher_is_better
                else f"{metric.name} {'higher' if metric.higher_is_better else 'lower'} by {amount} "
                f"(95 % {low} to {high}; {_tested(task)})."
            )
        )
    else:
        found += _undecided(task, place)
    if difference.seeds == 1:
        found.append("One seed each: this speaks of these two runs, not of the methods; run at least 3 seeds.")
    return found


def _undecided(task: TaskVerdict, place: str) -> list[str]:
    metric, difference = METRICS[task.metric], task.difference
    first, second = task.names
    of = f" points of {metric.name}" if metric.percent else f" of {metric.name}"
    lower = "" if metric.higher_is_better else ", the lower the better"
    found = [
        f"{first} and {second} cannot be told apart on {place}: {first} minus {second} is "
        f"{_signed(metric, difference.mean)}{of}{lower} (95 % {_signed(metric, difference.low)} to "
        f"{_signed(metric, difference.high)}; {_tested(task)})."
    ]
    up, down = (difference.high, -difference.low) if metric.higher_is_better else (-difference.low, difference.high)
    unit = " points" if metric.percent else ""
    left = [
        f"{name} to be better by up to {_plain(metric, reach)}{unit}"
        for name, reach in ((first, up), (second, down))
        if float(_plain(metric, reach)) > 0
    ]
    if left:
        found.append(f"The data leave it possible for {' or '.join(left)}.")
    settled = _settled(task)
    return [*found, settled] if settled else found


def _settled(task: TaskVerdict) -> str:
    """What would make a difference as large as that seen significant."""
    need, seen = task.needed, task.difference
    if abs(seen.mean) < 1e-12:
        return ""
    goal = f"settle a difference as large as that seen, with a chance of {100 * need.power:.0f} %"
    examples = None
    if math.isfinite(need.examples):
        more = max(1, int(need.examples) - seen.examples)
        examples = f"{more:,} more test examples ({seen.examples + more:,} in all)"
    if need.seeds is None:
        return f"{examples} would {goal}, for these two runs." if examples else ""
    if math.isfinite(need.seeds):
        more = max(1, int(need.seeds) - seen.seeds)
        seeds = f"{more:,} more seed{'s' if more > 1 else ''} ({seen.seeds + more:,} in all)"
        if examples:
            return f"{seeds}, or {examples}, would {goal}."
        return f"{seeds} would {goal}; more test examples alone never would, so much do runs differ."
    if examples:
        return f"{examples} would {goal}; more seeds alone never would, so few are the examples."
    return f"Neither more seeds nor more test examples alone would {goal}: both are needed."


def _tested(task: TaskVerdict) -> str:
    seen = task.difference
    seeds = f"{seen.seeds} seed{'s' if seen.seeds > 1 else ''}"
    examples = f"{seen.examples:,} examples"
    if seen.groups < seen.examples:
        examples += f" in {seen.groups:,} groups"
    corrected = f", {p_value(task.p_corrected)} corrected" if task.p_corrected != task.p else ""
    article = "" if task.test[0].isupper() else "the "
    return f"{p_value(task.p)} by {article}{task.test} over {seeds} and {examples}{corrected}"


def _plain(metric: Metric, value: float) -> str:
    """A number in points for a share, with a sign only where it is negative."""
    return f"{100 * value:.1f}" if metric.percent else f"{value:.3f}"


def _signed(metric: Metric, value: float) -> str:
    # Adding zero keeps what rounds to nothing from being shown as "-0.0".
    return f"{round(100 * value, 1) + 0.0:+.1f}" if metric.percent else f"{round(value, 3) + 0.0:+.3f}"


# As text and as JSON ------------------------------------------------------------------------------------------------


def shown(verdict: Verdict) -> str:
    """What the command prints: sentences, a table over tasks where there are several, and McNemar's tests."""
    parts = ["\n".join(sentences(verdict))]
    if len(verdict.tasks) > 1:
        parts.append(_table(verdict))
    if any(task.runs for task in verdict.tasks):
        parts.append(_runs(verdict))
    return "\n\n".join(parts)


def _table(verdict: Verdict) -> str:
    lines = [
        f"| task | budget | metric | {verdict.first} | {verdict.second} | difference | 95 % | p | corrected | better |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for task in verdict.tasks:
        metric, found = METRICS[task.metric], task.difference
        better = {1: verdict.first, 0: "-", -1: verdict.second}[task.advantage]
        cells = [
            task.data,
            f"{task.budget:,}" if task.budget is not None else "-",
            metric.name + ("" if metric.higher_is_better else " (lower is better)"),
            *(metric.shown(score.mean) for score in task.scores),
            _signed(metric, found.mean),
            f"{_signed(metric, found.low)} to {_signed(metric, found.high)}",
            p_cell(task.p),
            p_cell(task.p_corrected),
            better,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _runs(verdict: Verdict) -> str:
    lines = [
        "Run against run, McNemar's exact test (of these runs only, examples taken as independent):",
        "",
        f"| task | budget | seed | only {verdict.first} right | only {verdict.second} right | p |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {task.data} | {f'{task.budget:,}' if task.budget is not None else '-'} | {seed} | {run.first_only} | "
        f"{run.second_only} | {p_cell(run.p)} |"
        for task in verdict.tasks
        for seed, run in task.runs
    ]
    return "\n".join(lines)


def to_json(verdict: Verdict) -> str:
    """The verdict as JSON with its sentences; numbers that are infinite or unknown are null."""
    tasks = [
        {**dataclasses.asdict(task), "better": {1: task.names[0], 0: None, -1: task.names[1]}[task.advantage]}
        for task in verdict.tasks
    ]
    made = {**dataclasses.asdict(verdict), "tasks": tasks, "sentences": sentences(verdict)}
    made |= {"better": verdict.count(1), "not_told_apart": verdict.count(0), "worse": verdict.count(-1)}
    return json.dumps(_finite(made), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def text(folders: Sequence[Path], first: str, second: str, budget: int | None = None) -> str:
    """What `peftkit bench compare` prints of the records in folders."""
    return shown(compare(_read(folders), first, second, budget=budget))


def json_text(folders: Sequence[Path], first: str, second: str, budget: int | None = None) -> str:
    """The same as JSON."""
    return to_json(compare(_read(folders), first, second, budget=budget))


def _read(folders: Sequence[Path]) -> list[AnyRecord]:
    return [each for folder in folders for each in record.read(folder)]
