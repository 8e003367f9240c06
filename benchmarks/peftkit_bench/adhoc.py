"""A suite from a command line: one model, one data set, methods by name, a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peftkit
from peftkit.errors import nearest
from peftkit_bench import subjects
from peftkit_bench.data import SOURCES
from peftkit_bench.spec import SuiteError
from peftkit_bench.suite import LEARNING_RATES, Suite, parse

BASELINES = ("full", "head")
"""Methods that are marks to compare with rather than candidates."""


def suite(
    *,
    model: str,
    data: Sequence[str],
    task: str,
    methods: Sequence[str],
    budgets: Sequence[str] = (),
    seeds: int = 3,
    steps: int = 200,
    batch_size: int = 32,
    learning_rates: Sequence[float] = LEARNING_RATES,
    trials: int = 0,
    columns: Sequence[str] = (),
    metric: str | None = None,
    max_tokens: int | None = None,
    quantization: str | None = None,
    precision: str = "float32",
) -> Suite:
    """The suite that the options of `peftkit bench run --model ...` describe.

    Args:
        model: folder, hub name, or installed package with a model in its folder `model`.
        data: one file to cut into splits; or train, validation and test files, in this order; or the name of a set on
            a hub or of a built-in source.
        task: a name in `peftkit_bench.tasks.TASKS`.
        methods: names of methods; "peft:boft" is Hugging Face peft's; "lora@nf4" puts it on frozen weights in NF4.
        budgets: counts or shares of the backbone, see `Suite.budgets`.
        seeds: how many runs count for each method.
        columns: "text=sentence": the task's column and the file's.

    Raises:
        SuiteError: the options cannot be meant.
    """
    if seeds < 1:
        raise SuiteError(f"--seeds: expected at least 1, found {seeds}")
    options: dict[str, Any] = {"name": task}
    options |= {} if metric is None else {"metric": metric}
    options |= {} if max_tokens is None else {"max_tokens": max_tokens}
    values = {
        "name": _name(model, data),
        "title": f"{Path(data[0]).stem if data else task}: {', '.join(methods)}",
        "backbone": _backbone(model),
        "task": options,
        "data": _data(data, columns),
        "training": {
            "steps": steps,
            "batch_size": batch_size,
            "precision": precision,
            "evaluations": min(5, steps),
        },
        "seeds": list(range(seeds)),
        "budgets": list(budgets),
        "tune": {"learning_rates": list(learning_rates), "trials": trials},
        "contenders": dict(_contender(each, quantization) for each in methods),
    }
    if len(values["contenders"]) != len(methods):
        raise SuiteError(f"--methods: expected each once, found {', '.join(methods)}")
    return parse(values, folder=Path())


def _name(model: str, data: Sequence[str]) -> str:
    return f"{Path(model).name}-{Path(data[0]).stem if data else 'data'}"


def _backbone(model: str) -> dict[str, str]:
    from importlib.util import find_spec

    if Path(model).is_dir() or not model.isidentifier() or find_spec(model) is None:
        return {"path": model}
    return {"package": model}


def _data(data: Sequence[str], columns: Sequence[str]) -> dict[str, Any]:
    named = {}
    for each in columns:
        ours, equals, theirs = each.partition("=")
        if not equals or not ours or not theirs:
            raise SuiteError(f"--columns: expected text=sentence, the task's column and the file's, found {each!r}")
        named[ours] = theirs
    mapped = {"columns": named} if named else {}
    if not data:
        raise SuiteError("--data: expected a file, or train, validation and test files")
    first = data[0]
    looks_local = Path(first).suffix.lstrip(".") in ("jsonl", "ndjson", "json", "csv", "tsv", "parquet")
    if looks_local or Path(first).exists():
        keys = ("train", "validation", "test") if len(data) != 2 else ("train", "test")
        if len(data) > len(keys):
            raise SuiteError(f"--data: expected at most train, validation and test files, found {len(data)}")
        return {"source": "files", **dict(zip(keys, data, strict=False)), **mapped}
    if len(data) > 1:
        raise SuiteError(f"--data: {first!r} is no file; several are given only where they are files")
    if first in SOURCES and first not in ("files", "hub"):
        raise SuiteError(f"--data: {first} has sizes to set; write a suite file, see benchmarks/suites/quick.yaml")
    return {"source": "hub", "path": first, **mapped}


def _contender(text: str, quantization: str | None) -> tuple[str, dict[str, Any]]:
    name, _, own = text.partition("@")
    subject, colon, method = name.partition(":")
    if not colon:
        subject, method = "peftkit", name
        if method not in peftkit.METHODS:
            raise SuiteError(f"--methods: no method {method!r}; {nearest(method, peftkit.METHODS)}")
    elif subject not in subjects.NAMES:
        raise SuiteError(f"--methods: {nearest(subject, subjects.NAMES)}")
    made: dict[str, Any] = {"method": method, "subject": subject, "baseline": method in BASELINES}
    stored = own or quantization
    if stored and not (method in BASELINES and not own):
        made["quantization"] = stored
    return text, made
