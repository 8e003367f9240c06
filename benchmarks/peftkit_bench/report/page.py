"""Findings -> report.md, one self-contained index.html, CSV tables, and the plots beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from peftkit_bench import record
from peftkit_bench.placing import place
from peftkit_bench.record import MergeRecord, Record, RecordError
from peftkit_bench.report import (
    across,
    columns,
    costs,
    facts,
    forgetting,
    matching,
    merges,
    pairs,
    plots,
    ranks,
    rates,
    sentences,
    style,
    table_csv,
    training,
)
from peftkit_bench.report import findings as finding
from peftkit_bench.report.across import Across
from peftkit_bench.report.findings import Contest, Findings
from peftkit_bench.report.tuning import tunings


@dataclass(frozen=True)
class Plot:
    """A plot as the templates show it."""

    image: str
    """Name of its file."""
    svg: Markup
    alt: str
    caption: str


@dataclass
class _Plotter:
    """Writes the plots of one section."""

    out: Path
    suffix: str
    """Of the files' names; tells sections apart."""
    dpi: int

    def __call__(self, name: str, made: Figure, alt: str, caption: str = "") -> Plot:
        name = f"{name}{self.suffix}"
        # Made by matplotlib from records: nothing in it is a person's markup.
        return Plot(f"{name}.png", Markup(style.write_figure(made, self.out, name, self.dpi)), alt, caption)


def write(records_dirs: Sequence[Path], out: Path, *, dpi: int = style.PNG_DPI) -> Path:
    """The path of index.html, written with report.md, CSV tables and plots from the records of the given folders.

    Args:
        records_dirs: folders with records, packed or not, and the predictions beside them.
        out: folder for the report.
        dpi: of the PNGs, pixels an inch.

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
    groups = [part for group in finding.grouped(r for r in found if isinstance(r, Record)) for part in _by_split(group)]
    compared = [finding.findings(group) if _finals(group) else None for group in groups]
    everything = [each for each in compared if each is not None]
    sections = [_across_section(levels, _plotter(out, i, dpi)) for i, levels in enumerate(across.across(everything))]
    for i, (group, each) in enumerate(zip(groups, compared, strict=True)):
        plotter = _plotter(out, i, dpi)
        sections.append(_search_section(group, plotter) if each is None else _comparison_section(each, plotter))
    merged = finding.grouped(each for each in found if isinstance(each, MergeRecord))
    sections += [_merge_section(group, _plotter(out, i, dpi)) for i, group in enumerate(merged)]
    for i, section in enumerate(sections):
        section["anchor"] = f"section-{i + 1}"
    for template in ("report.md", "index.html"):
        made = _environment(html=template.endswith("html")).get_template(f"{template}.j2")
        place(out / template, made.render(sections=sections))
    if everything:
        place(out / "results.csv", table_csv.results(everything))
        place(out / "comparisons.csv", table_csv.comparisons(everything))
    return out / "index.html"


def _finals(group: Iterable[Record]) -> list[Record]:
    return [each for each in group if each.phase == "final"]


def _by_split(group: list[Record]) -> list[list[Record]]:
    """The group for each split that final runs predicted, the searches with each."""
    splits = list(dict.fromkeys(each.split for each in _finals(group)))
    if len(splits) < 2:
        return [group]
    return [[each for each in group if each.phase != "final" or each.split == split] for split in splits]


def _plotter(out: Path, index: int, dpi: int) -> _Plotter:
    return _Plotter(out, "" if index == 0 else f"-{index + 1}", dpi)


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
        points=sentences.points, difference=sentences.difference, interval=sentences.interval,
        listed=sentences.listed, p_cell=sentences.p_cell, short=matching.short_count, tally=across.tally_text,
    )  # fmt: skip
    return made


# Sections -----------------------------------------------------------------------------------------------------------


def _comparison_section(found: Findings, plotter: _Plotter) -> dict[str, Any]:
    """What the templates show of one comparison."""
    paired, grown = pairs.parity(found), pairs.growth(found)
    first, several = found.first, len(found.budgets) > 1
    return {
        "kind": "comparison",
        "title": first.title,
        "suite": first.suite,
        "found": found,
        "contests": [_contest(contest, plotter, several) for contest in found.contests],
        "overall": [sentences.front_sentence(found), *sentences.growth_sentences(found, grown)] if several else [],
        "score": plotter(
            "score", plots.score_figure(found)[0],
            f"{found.metric.name} against trainable parameters; the numbers are in the table below",
            f"{found.metric.name[:1].upper()}{found.metric.name[1:]} on the {first.split} split against trainable "
            "parameters. Methods that share a budget stand side by side; exact counts are in the table.",
        ),
        "columns": columns.columns(found),
        "thriftiest": _thriftiest(found),
        "blocks": columns.blocks(found),
        "unit": sentences.unit(found.metric),
        "plots": _further(found, plotter),
        "rates": columns.rates(found.tunings),
        "rate_rows": columns.rate_rows(found.tunings, found.metric),
        "parity_header": columns.parity_header(),
        "parity": columns.parity_rows(paired, found.metric),
        "how": facts.how(found, pairs=bool(paired)),
        "facts": facts.facts([r for row in found.rows for r in row.records]),
    }  # fmt: skip


def _thriftiest(found: Findings) -> dict[str, str]:
    """By the name of a row that has most for the fewest parameters: at which budgets, where there are several."""
    made: dict[str, list[str]] = {}
    for contest in found.contests:
        where = [matching.short_count(contest.budget)] if contest.budget is not None and len(found.contests) > 1 else []
        made.setdefault(contest.thriftiest().name, []).extend(where)
    return {name: f" at {sentences.listed(where)}" if where else "" for name, where in made.items()}


def _contest(contest: Contest, plotter: _Plotter, several: bool) -> dict[str, Any]:
    """What the templates show of one budget."""
    where = f"-{matching.short_count(contest.budget)}" if several and contest.budget is not None else ""
    return {
        "contest": contest,
        "heading": sentences.at_budget(contest) if several else "",
        "answer": sentences.answer(contest),
        "against": sentences.baseline_sentences(contest),
        "verdicts": sentences.verdicts(contest),
        "ranking": plotter(
            f"ranking{where}", plots.ranking_figure(contest),
            f"{contest.metric.name} by method with intervals, best first",
        ),
    }  # fmt: skip


def _further(found: Findings, plotter: _Plotter) -> dict[str, Plot]:
    """The plots that are there only where something was recorded, and costs."""
    title = found.first.title
    made: dict[str, tuple[Callable[[], Figure | None], str]] = {
        "rates": (
            lambda: rates.rates_figure(found.tunings, found.metric, f"Learning rates  ·  {title}")
            if found.tunings else None,
            f"{found.metric.name} on the tune split by learning rate for each contender; the numbers are in the table",
        ),
        "losses": (lambda: training.losses_figure(found), "Training loss by step for each contender"),
        "stopping": (lambda: training.stopping_figure(found), "Value on the stop split by step for each contender"),
        "costs": (lambda: costs.costs_figure(found), "Memory, training time and latency; numbers are in the table"),
        "forgetting": (
            lambda: made_[0] if (made_ := forgetting.forgetting_figure(found)) else None,
            f"{found.metric.name} against what was forgotten of general text; the numbers are in the table",
        ),
    }  # fmt: skip
    return {name: plotter(name, figure, alt) for name, (draw, alt) in made.items() if (figure := draw()) is not None}


def _search_section(group: Sequence[Record], plotter: _Plotter) -> dict[str, Any]:
    """What the templates show of a search without runs that count."""
    metric = finding.metric_of(group[0])
    searched = tunings(group, metric.higher_is_better)
    title = group[0].title
    return {
        "kind": "search",
        "title": title,
        "suite": group[0].suite,
        "answer": [
            f"A search in progress: {len(group)} runs of {len(searched)} contenders and sizes so far, and none that "
            "counts. The same command goes on where it was."
        ],
        "metric": metric,
        "unit": sentences.unit(metric),
        "plots": {
            "rates": plotter(
                "rates", rates.rates_figure(searched, metric, f"Learning rates so far  ·  {title}"),
                f"{metric.name} on the tune split by learning rate for each contender",
            )
        },
        "rates": columns.rates(searched),
        "rate_rows": columns.rate_rows(searched, metric),
        "facts": facts.facts(group),
    }  # fmt: skip


def _across_section(levels: Sequence[Across], plotter: _Plotter) -> dict[str, Any]:
    """What the templates show of several tasks that share contenders."""
    parts = []
    for level, each in enumerate(levels):
        names = list(each.friedman.methods)
        parts.append(
            {
                "heading": f"At {each.level}" if each.level and len(levels) > 1 else "",
                "answer": across.answer(each),
                "plot": plotter(
                    f"ranks{f'-{level + 1}' if level else ''}", ranks.ranks_figure(each),
                    "Average ranks with the critical difference; the numbers are in the table",
                ),
                "rows": [
                    (
                        name, f"{each.rank(name):.2f}", across.tally_text(each.total(name)),
                        [contest.metric.shown(contest.row(name).score.mean) for contest in each.contests],
                    )
                    for name in names
                ],
                "tasks": list(zip(each.tasks, (contest.metric for contest in each.contests), strict=True)),
                "names": names,
                "matrix": [(one, [each.tallies.get((one, other)) for other in names]) for one in names],
            }
        )  # fmt: skip
    return {
        "kind": "across",
        "title": f"Across {len(levels[0].tasks)} tasks",
        "suite": " and ".join(dict.fromkeys(c.rows[0].first.suite.split(":")[0] for c in levels[0].contests)),
        "parts": parts,
    }


def _merge_section(group: Sequence[MergeRecord], plotter: _Plotter) -> dict[str, Any]:
    """What the templates show of the merges of one suite."""
    found = merges.merges(group)
    plot = plotter("merges", merges.figure(found), "Effect kept and error against the size of the change")
    return {
        "title": found.first.title,
        "suite": found.first.suite,
        "kind": "merges",
        "answer": merges.answer(found),
        "notes": merges.notes(found),
        "tables": merges.tables(found),
        "how": merges.how(found),
        "facts": merges.facts(found),
        "image": plot.image,
        "svg": plot.svg,
    }
