"""Findings -> results.csv, a line for each contender and budget, and comparisons.csv, a line for each pair."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from peftkit_bench.report.findings import Findings, Row

MEDIANS = (
    "train_seconds",
    "evaluate_seconds",
    "cell_seconds",
    "peak_bytes",
    "steady_bytes",
    "adapter_bytes",
    "base_latency_seconds",
    "latency_seconds",
    "merged_latency_seconds",
    "merged_logit_difference",
    "effect_kept",
    "best_step",
)
"""Measurements that are given as the median over seeds."""


def results(everything: Sequence[Findings]) -> str:
    """All rows of all groups; scores as they are recorded, shares between 0 and 1; empty where nothing was taken."""
    return _text([{**_shared(found), **_result(row)} for found in everything for row in found.rows])


def comparisons(everything: Sequence[Findings]) -> str:
    """All pairs of contenders of all groups and budgets."""
    lines = []
    for found in everything:
        for contest in found.contests:
            for each in contest.comparisons:
                lines.append(
                    {
                        **_shared(found),
                        "budget": contest.budget,
                        "first": each.first,
                        "second": each.second,
                        "difference": each.difference.mean,
                        "low": each.difference.low,
                        "high": each.difference.high,
                        "standard_error": each.difference.standard_error,
                        "seeds": each.difference.seeds,
                        "test": each.test,
                        "p": each.p,
                        "p_corrected": each.p_corrected,
                        "better": each.winner() or "",
                    }
                )
    return _text(lines)


def _shared(found: Findings) -> dict[str, Any]:
    first = found.first
    return {
        "suite": first.suite,
        "title": first.title,
        "data": first.data["name"],
        "data_hash": first.data["hash"],
        "backbone": first.backbone["name"],
        "task": first.task["name"],
        "metric": first.metric,
        "higher_is_better": found.metric.higher_is_better,
        "split": first.split,
    }


def _result(row: Row) -> dict[str, Any]:
    first = row.first
    return {
        "contender": row.contender,
        "subject": first.subject,
        "method": first.method,
        "quantization": first.quantization,
        "baseline": row.baseline,
        "budget": row.budget,
        "at_budget": None if row.budget is None else not row.off_budget,
        "knob": first.knob,
        "knob_value": first.config[first.knob] if first.knob is not None else None,
        "adapter_parameters": row.parameters,
        "final_parameters": row.final_parameters,
        "head_parameters": first.head_parameters,
        "trainable_parameters": row.trainable,
        "total_parameters": first.total_parameters,
        "score": row.score.mean,
        "low": row.score.low,
        "high": row.score.high,
        "standard_error": row.score.standard_error,
        "seeds": " ".join(map(str, row.seeds)),
        "scores": " ".join(f"{record.score:.6g}" for record in row.records),
        "examples": row.score.examples,
        "groups": row.score.groups,
        "learning_rate": first.learning_rate,
        **{name: row.median(name) for name in MEDIANS},
        "forgetting_nats": row.forgotten,
        "jobs": first.jobs,
        "threads": first.threads,
        "processor": first.environment.get("processor"),
        "device": first.environment.get("device"),
        "memory_method": first.memory_method,
    }


def _text(lines: Sequence[dict[str, Any]]) -> str:
    stream = io.StringIO()
    if lines:
        writer = csv.DictWriter(stream, fieldnames=list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([{name: "" if value is None else value for name, value in line.items()} for line in lines])
    return stream.getvalue()
