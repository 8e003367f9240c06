"""Findings -> report.md and one self-contained index.html, with the plots beside them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from peftkit_bench import record
from peftkit_bench.record import MergeRecord, Record, RecordError
from peftkit_bench.report import findings as words
from peftkit_bench.report import merges, plots
from peftkit_bench.report.findings import Findings, Row, Search

PNG_DPI = 200


def write(records_dirs: Sequence[Path], out: Path) -> Path:
    """The path of index.html, written with report.md and the plots from the records of the given folders.

    Args:
        records_dirs: folders with a `records.jsonl` each.
        out: folder for the report.

    Raises:
        RecordError: a file cannot be read, or there are no records at all.
    """
    found = [each for folder in records_dirs for each in record.read(folder)]
    if not found:
        raise RecordError(
            f"expected records in {', '.join(str(folder / record.FILE) for folder in records_dirs)}, found none; "
            "run a suite first: peftkit bench run SUITE --out DIR"
        )
    out.mkdir(parents=True, exist_ok=True)
    compared = words.grouped([each for each in found if isinstance(each, Record)])
    sections = [_section(group, out, index) for index, group in enumerate(compared)]
    merged = words.grouped([each for each in found if isinstance(each, MergeRecord)])
    sections += [_merge_section(group, out, index) for index, group in enumerate(merged)]
    _place(out / "report.md", _environment(html=False).get_template("report.md.j2").render(sections=sections))
    page = _environment(html=True).get_template("index.html.j2").render(sections=sections)
    _place(out / "index.html", page)
    return out / "index.html"


def _place(path: Path, text: str) -> None:
    """Writes the whole file or leaves the old one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _environment(*, html: bool) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: (resources.files(__package__) / "templates" / name).read_text("utf-8")
        ),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    made.filters.update(
        percent=words.percent, points=words.points, p_value=words.p_value, listed=words.listed, short=plots.short_count
    )
    return made


def _section(group: Sequence[Record], out: Path, index: int) -> dict[str, Any]:
    """What the templates show of one group of comparable records."""
    first = group[0]
    shared = {"title": first.title, "suite": first.suite, "facts": _facts(group), "anchor": f"s{index}"}
    if words.is_search(group):
        searched = words.search(group)
        return {**shared, "kind": "search", "rates": searched.rates, "rows": search_rows(searched)}
    found = words.findings(group)
    suffix = "" if index == 0 else f"-{index + 1}"
    figures = {"accuracy": plots.accuracy_figure(found), "ranking": plots.ranking_figure(found)}
    for name, figure in figures.items():
        figure.savefig(out / f"{name}{suffix}.png", dpi=PNG_DPI, facecolor="white")
        plots.save_svg(figure, out / f"{name}{suffix}.svg")
    return {
        **shared,
        "kind": "comparison",
        "found": found,
        "answer": words.answer(found),
        "against": words.baseline_sentences(found),
        "verdicts": words.verdicts(found),
        "tied": {row.name for row in found.tied_with_best()},
        "thriftiest": found.thriftiest().name,
        "columns": _columns(found),
        "how": _how(found),
        "images": {name: f"{name}{suffix}.png" for name in figures},
        "svgs": {
            name: Markup(
                plots.unique_ids(plots.svg(figure), f"{shared['anchor']}-{name}")
            )  # made by matplotlib from records
            for name, figure in figures.items()
        },
    }


def _merge_section(group: Sequence[MergeRecord], out: Path, index: int) -> dict[str, Any]:
    """What the templates show of the merges of one suite."""
    found = merges.merges(group)
    name = f"merges{'' if index == 0 else f'-{index + 1}'}"
    figure = merges.figure(found)
    figure.savefig(out / f"{name}.png", dpi=PNG_DPI, facecolor="white")
    plots.save_svg(figure, out / f"{name}.svg")
    return {
        "title": found.first.title,
        "suite": found.first.suite,
        "kind": "merges",
        "answer": merges.answer(found),
        "notes": merges.notes(found),
        "tables": merges.tables(found),
        "how": merges.how(found),
        "facts": merges.facts(found),
        "image": f"{name}.png",
        "svg": Markup(plots.unique_ids(plots.svg(figure), f"m{index}")),  # made by matplotlib from records
    }


# The table ----------------------------------------------------------------------------------------------------------


def _columns(found: Findings) -> list[tuple[str, str, Callable[[Row], str]]]:
    """Heading, unit and cell of each column after the name."""
    backbone = found.first.backbone["parameters"] - found.first.head_parameters

    def parameters(row: Row) -> str:
        text = f"{row.parameters:,}"
        return f"{text} ({row.final_parameters:,} kept)" if row.final_parameters < row.parameters else text

    def measured(field: str, scale: float, digits: int) -> Callable[[Row], str]:
        def cell(row: Row) -> str:
            value = row.median(field)
            return "–" if value is None else f"{value * scale:,.{digits}f}"

        return cell

    return [
        ("Trainable", "parameters", parameters),
        ("Of backbone", "%", lambda row: f"{100 * row.parameters / backbone:.3g}"),
        ("Accuracy", "%", lambda row: f"{words.percent(row.accuracy.mean)} ± {words.percent(row.accuracy.half_width)}"),
        ("Training", "s", measured("train_seconds", 1, 1)),
        ("Peak memory", "MB", measured("peak_bytes", 1e-6, 0)),
        ("On disk", "kB", measured("adapter_bytes", 1e-3, 0)),
        ("Latency", "ms", measured("latency_seconds", 1e3, 1)),
        ("Merged", "ms", measured("merged_latency_seconds", 1e3, 1)),
        ("Bare backbone", "ms", measured("base_latency_seconds", 1e3, 1)),
        ("Learning rate", "", lambda row: f"{row.records[0].learning_rate:g}" if row.parameters else "–"),
        ("Size", "", lambda row: row.size or ("–" if row.baseline else "its own")),
    ]


# What was done ------------------------------------------------------------------------------------------------------


def _facts(group: Sequence[Record]) -> list[tuple[str, str]]:
    """What the records share: data, backbone, training, machine."""
    first = max(group, key=lambda r: r.started)
    data, backbone, training, machine = first.data, first.backbone, first.training, first.environment
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB memory" if machine["memory_bytes"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    texts = (
        f"{data['name']} (hash {data['hash']}): {data['train']:,} training, {data['validation']:,} validation and "
        f"{data['test']:,} test texts in {len(data['classes'])} classes; at most {data['max_tokens']} tokens"
    )
    model = (
        f"{backbone['name']} ({backbone['class']}, {backbone['parameters']:,} parameters, weights "
        f"{backbone['hash'] or 'from a hub'})"
    )
    schedule = (
        f"{training['steps']} steps of {training['batch_size']} texts, AdamW, linear warm-up over "
        f"{100 * training['warmup']:g} % of the steps and linear decay; weight decay {training['weight_decay']:g}, "
        f"gradient norm at most {training['clip_norm']:g}; head at learning rate "
        f"{training['head_learning_rate']:g} for every method"
    )
    computer = (
        f"{machine['processor']}, {machine['cores']} cores{memory}, device {machine['device']}, "
        f"{machine['system']}; cells at a time: {first.jobs}, threads for each: {first.threads}"
    )
    return [
        ("Data", texts),
        ("Classes", ", ".join(f"{name} {version}" for name, version in data["versions"].items())),
        ("Backbone", model),
        ("Training", schedule),
        ("Machine", computer),
        ("Versions", f"Python {machine['python']}, {versions}; commit {machine['commit'] or 'not in a repository'}"),
    ]


def _how(found: Findings) -> list[tuple[str, str]]:
    """How each number was taken, in a sentence or two."""
    first = found.first
    seeds = ", ".join(map(str, sorted({seed for row in found.rows for seed in row.seeds})))
    budget = f"; where a method has a size to set, it was solved for at most {first.budget:,}" if first.budget else ""
    how = {
        "Trainable parameters": (
            f"exact counts of the method's own parameters{budget}; the classification head, {first.head_parameters:,} "
            "parameters trained by every method, comes on top, and is counted in the plots. “Kept” are those that "
            "remain where a method prunes, or folds away what only training needs."
        ),
        "Accuracy": (
            f"mean over seeds {seeds} (order of the data, start of head and adapter, dropout) on {len(first.labels):,} "
            "test texts, on which nothing was chosen."
        ),
        "Intervals": (
            "95 %, for other seeds and other texts: the variance between training runs, pooled over methods because "
            "few seeds say little about each by itself, and the variance between source files "
            f"({found.rows[0].accuracy.groups} of them: texts of one file are not independent) are added, with "
            "Satterthwaite's degrees of freedom. What seeds and texts share in variance counts twice, so the interval "
            "errs on the wide side."
        ),
        "Tests": (
            "paired on the stored predictions: the difference of two methods on the same texts and seeds is estimated "
            "the same way, with the variance between runs pooled over all pairs, and tested with t; Holm's correction "
            f"over all {len(found.comparisons)} pairs, level 5 %. “Cannot be told apart” does not mean equal: the "
            "intervals of the differences say how large a difference these data leave possible. They hold all together "
            "(Bonferroni)."
        ),
        "Learning rates": "each method's own, as the suite gives them; the suite says how they were found.",
        "Training time": (
            "median over seeds of the wall-clock time of the training steps, without loading, tokenising and "
            "evaluation."
        ),
        "Peak memory": (
            f"median over seeds; {first.memory_method}. Full fine-tuning through peftkit keeps the frozen weights "
            "beside the trained ones, which is part of its number."
        ),
        "On disk": "the saved adapter folder, head included.",
        "Latency": (
            f"one forward pass of {first.latency_rows} row of {first.latency_tokens} tokens, median of 30 after 5 that "
            "do not count, then the median over seeds; the bare backbone was timed in the same process as each method. "
            "“–”: the method cannot be merged."
        ),
    }
    return list(how.items())


def search_rows(found: Search) -> list[tuple[str, list[str], str]]:
    """For each contender: its accuracies by rate with the best marked, and the best rate in words."""
    rows = []
    for name in found.accuracies:
        best = found.best(name)
        cells = [
            "–" if rate not in found.accuracies[name]
            else words.percent(found.accuracies[name][rate]) + (" *" if rate == best else "")
            for rate in found.rates
        ]  # fmt: skip
        rows.append((name, cells, f"{best:g}" + (" (at the edge of the grid)" if found.at_edge(name) else "")))
    return rows
