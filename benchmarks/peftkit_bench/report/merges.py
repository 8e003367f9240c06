"""Records of merges -> tables by format, method and size of the change, a plot, and what follows in words."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from peftkit_bench.record import MergeRecord
from peftkit_bench.report.style import ACCENT, GRID, MUTED, OWN, STYLE

FORMATS = {"bf16": "16 bits", "nf4": "4 bits (NF4)", "int8": "8 bits (int8)"}
"""Groups of contenders by what they merge into; a fused layer keeps NF4 codes, and stands with those."""
MEASURES = {"logits": "Logits", "activations": "Outputs of the changed layers", "weights": "Weights"}
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LOWEST_ERROR = 1e-3
"""Smaller errors are drawn here."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as text."""

    heading: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


Key = tuple[str, float | None]
"""An adapter and the size that was asked for."""


@dataclass(frozen=True, kw_only=True)
class Merges:
    """The newest record of each adapter, size and contender of one suite."""

    records: dict[tuple[Key, str], MergeRecord]

    @property
    def first(self) -> MergeRecord:
        """A record for what all of them share."""
        return next(iter(self.records.values()))

    @property
    def keys(self) -> list[Key]:
        """Adapters and sizes, in the order of the suite."""
        return list(dict.fromkeys(key for key, _ in self.records))

    def contenders(self, form: str) -> list[str]:
        """Those that merge into a format."""
        return list(dict.fromkeys(name for (_, name), r in self.records.items() if group_of(r) == form))

    def of(self, contender: str) -> list[MergeRecord]:
        """The merges of a contender that came to something."""
        return [r for (_, name), r in self.records.items() if name == contender and r.kept]

    def label(self, key: Key) -> str:
        """Name and size of a row, such as "LoRA, 2 %"."""
        name, asked = key
        sizes = [r.size for (k, _), r in self.records.items() if k == key]
        size = f"{100 * (asked if asked is not None else statistics.median(sizes)):.2g} %"
        return f"{name}, {size}" + ("" if asked is not None else " as trained")


def group_of(found: MergeRecord) -> str:
    """The key in FORMATS under which a merge stands."""
    return "nf4" if found.into == "fused" else found.into


def merges(group: Sequence[MergeRecord]) -> Merges:
    """The newest record of each adapter, size and contender, adapter by adapter."""
    found: dict[tuple[Key, str], MergeRecord] = {}
    for each in sorted(group, key=lambda r: r.started):
        found[((each.adapter, each.asked_size), each.contender)] = each
    order = list(dict.fromkeys(r.adapter for r in group))
    return Merges(records=dict(sorted(found.items(), key=lambda item: order.index(item[0][0][0]))))


def own(found: MergeRecord, measure: str) -> tuple[float, float]:
    """Effect kept and error, on the base that was merged into."""
    effect, error = found.kept[found.base][measure]
    return effect, error


# Tables -------------------------------------------------------------------------------------------------------------


def tables(found: Merges) -> list[Table]:
    """Effect kept and error by adapter and size, for each measure and format; then what each contender costs."""
    made = [
        Table(
            heading=f"{title}, merged into {words}: effect kept / error",
            header=("Adapter", *found.contenders(form)),
            rows=tuple(
                (found.label(key), *(_cell(found.records.get((key, name)), measure) for name in found.contenders(form)))
                for key in found.keys
            ),
        )
        for measure, title in MEASURES.items()
        for form, words in FORMATS.items()
        if found.contenders(form)
    ]
    return [*made, _summary(found)]


def _cell(found: MergeRecord | None, measure: str) -> str:
    if found is None or not found.kept:
        return "–"
    effect, error = own(found, measure)
    return f"{effect:.2f} / {_error(error)}" + (" †" if found.refused else "")


def _error(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.1g}"


def _summary(found: Merges) -> Table:
    rows = []
    for form in FORMATS:
        for name in found.contenders(form):
            mine = found.of(name)
            if not mine:
                rows.append((name, FORMATS[form], *["–"] * 7))
                continue
            logits = [own(r, "logits") for r in mine]
            rows.append(
                (
                    name, FORMATS[form], f"{min(e for e, _ in logits):.2f}",
                    f"{statistics.median(e for e, _ in logits):.2f}", _error(statistics.median(e for _, e in logits)),
                    _error(statistics.median(r.kept["nf4"]["logits"][1] for r in mine)),
                    _error(statistics.median(r.kept["bf16"]["logits"][1] for r in mine)),
                    f"{statistics.median(r.bytes_per_weight or 0 for r in mine):.3f}",
                    f"{statistics.median(r.merge_seconds for r in mine):.1f}",
                )
            )  # fmt: skip
    header = (
        "Contender", "Into", "Least effect on logits", "Median effect", "Median error", "to the base of the training",
        "to the 16-bit base", "Bytes a weight", "Seconds",
    )  # fmt: skip
    return Table(heading="Every contender over all adapters", header=header, rows=tuple(rows))


# In words -----------------------------------------------------------------------------------------------------------


def answer(found: Merges) -> list[str]:
    """The conclusion, a sentence for each format."""
    sentences = []
    for form, words in FORMATS.items():
        parts = []
        for name in found.contenders(form):
            mine = [own(r, "logits") for r in found.of(name)]
            if mine:
                effects = [effect for effect, _ in mine]
                error = _error(statistics.median(e for _, e in mine))
                parts.append(f"{name} {min(effects):.2f} to {max(effects):.2f} (error {error})")
        if parts:
            sentences.append(f"Effect kept on the logits in {words}, with the median error: {'; '.join(parts)}.")
    return sentences


def notes(found: Merges) -> list[str]:
    """What a reader has to know: refusals, and how far the certificate is from these numbers."""
    texts = []
    certified = [r.certificate for r in found.records.values() if r.certificate]
    if certified:
        weights = max(max(c["effect_difference"], c["error_difference"]) for c in certified)
        inputs = [
            max(c["input_effect_difference"], c["input_error_difference"])
            for c in certified
            if "input_effect_difference" in c
        ]
        shown = f", and {max(inputs):.1g} on the inputs that the merge was shown" if inputs else ""
        texts.append(
            f"peftkit's own certificates differ from these numbers by at most {weights:.1g} at any site of "
            f"{len(certified)} merges, effect or error, on weights{shown}."
        )
    for marked in (True, False):
        texts += _refusals(found, marked)
    return texts


def _refusals(found: Merges, merged: bool) -> list[str]:
    by_reason: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (key, name), each in found.records.items():
        if each.refused is not None and bool(each.kept) == merged:
            reason = "" if merged else each.refused
            by_reason[(name, reason)].append(found.label(key))
    if merged:
        return [
            f"† {name} refuses {', '.join(labels)} at minimum_effect={found.first.minimum_effect:g}; the numbers are "
            "those of minimum_effect=0."
            for (name, _), labels in by_reason.items()
        ]
    return [f"– {name} cannot merge {', '.join(labels)}: {reason}" for (name, reason), labels in by_reason.items()]


def how(found: Merges) -> list[tuple[str, str]]:
    """How each number was taken."""
    first = found.first
    return [
        (
            "Effect kept and error",
            "⟨y' - y, y* - y⟩ / ‖y* - y‖² and ‖y' - y*‖ / ‖y* - y‖, with y of the base that is merged into, y* of that "
            "base with the adapter unmerged, and y' of the merged weights; over all sites, or logits, as one vector.",
        ),
        (
            "Yardstick",
            "float64, no code that merges: meant weights are read off the unmerged layers by the unit vectors, stored "
            "weights are decoded by bitsandbytes and put into a plain copy of the model, whose logits are in float32.",
        ),
        (
            "Rows",
            f"judged on {first.judged_rows} test texts; calibrated merges are shown {first.calibration_rows} training "
            "texts, from other source files.",
        ),
        (
            "Sizes",
            "‖ΔW‖ / ‖W‖ over all changed weights, reached by scaling one parameter that the change is proportional to; "
            "“as trained” where there is none.",
        ),
        (
            "Bases",
            "bfloat16 weights; NF4 codes made from them, blocks of 64, the same codes for peftkit and bitsandbytes; "
            "bitsandbytes' int8. Adapters were trained on the NF4 base.",
        ),
        ("Bytes a weight", "of the changed layers, scales and residual included, biases left out."),
    ]


def facts(found: Merges) -> list[tuple[str, str]]:
    """What the records share: data, backbone, training, machine."""
    first = max(found.records.values(), key=lambda r: r.started)
    data, backbone, training, machine = first.data, first.backbone, first.training, first.environment
    configs = {r.adapter: f"{r.method} at {r.learning_rate:g} {dict(r.config)}" for r in found.records.values()}
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return [
        ("Data", f"{data['name']} (hash {data['hash']}), at most {data['max_tokens']} tokens"),
        ("Backbone", f"{backbone['name']} ({backbone['class']}, weights {backbone['hash'] or 'from a hub'})"),
        ("Training", f"{training['steps']} steps of {training['batch_size']} texts, seed {first.seed}"),
        ("Adapters", "; ".join(f"{name}: {text}" for name, text in configs.items())),
        ("Machine", f"{machine['processor']}, {machine['cores']} cores, {first.threads} threads"),
        ("Versions", f"Python {machine['python']}, {versions}; commit {machine['commit'] or 'not in a repository'}"),
    ]


# The plot -----------------------------------------------------------------------------------------------------------


def figure(found: Merges) -> Figure:
    """Effect kept and error on the logits against the size of the change, a column for each format.

    Lines join the sizes of an adapter that was scaled to most; the other adapters are points.
    """
    forms = [form for form in FORMATS if found.contenders(form)]
    sizes: dict[str, int] = defaultdict(int)
    for name, _ in found.keys:
        sizes[name] += 1
    main = max(sizes, key=lambda name: sizes[name])
    with mpl.rc_context(STYLE):
        made = Figure(figsize=(11, 7.4), dpi=100)
        FigureCanvasAgg(made)
        axes = made.subplots(2, len(forms), sharex=True, sharey="row", squeeze=False)
        for column, form in enumerate(forms):
            for place, name in enumerate(found.contenders(form)):
                _draw(axes[0][column], found, name, main, 0, place)
                _draw(axes[1][column], found, name, main, 1, place)
            axes[0][column].legend(
                loc="lower left", bbox_to_anchor=(-0.02, 1.08), frameon=False, fontsize=8, labelcolor=MUTED,
                borderaxespad=0, handlelength=1.4, labelspacing=0.25,
            )  # fmt: skip
            axes[0][column].set_title(FORMATS[form], fontsize=11, loc="left", pad=5)
            axes[1][column].set_xlabel("‖ΔW‖ / ‖W‖")
        for axis in axes.flat:
            axis.set_xscale("log")
            axis.grid(color=GRID, linewidth=0.8)
            axis.set_axisbelow(True)
            axis.tick_params(length=0)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axes[0][0].set_ylabel("effect kept, logits")
        axes[1][0].set_ylabel("error / effect, logits")
        axes[1][0].set_yscale("log")
        made.text(0.075, 0.012, f"lines: {main} at several sizes; points: the other methods", fontsize=9, color=MUTED)
        made.subplots_adjust(left=0.075, right=0.985, top=0.795, bottom=0.105, wspace=0.08, hspace=0.1)
    return made


def _draw(axis: Any, found: Merges, name: str, main: str, which: int, place: int) -> None:
    mine = sorted(found.of(name), key=lambda r: r.size)
    value: Callable[[MergeRecord], float] = lambda r: max(own(r, "logits")[which], LOWEST_ERROR if which else -9.0)  # noqa: E731  # typed
    tint = ACCENT if any(r.tool == "peftkit" for r in mine) else OWN
    marker = MARKERS[place % len(MARKERS)]
    joined = [r for r in mine if r.adapter == main]
    others = [r for r in mine if r.adapter != main]
    axis.plot(
        [r.size for r in joined], [value(r) for r in joined], color=tint, marker=marker, markersize=5, linewidth=1.4,
        label=name, alpha=0.9,
    )  # fmt: skip
    axis.plot(
        [r.size for r in others], [value(r) for r in others], color=tint, marker=marker, markersize=5, linestyle="",
        markerfacecolor="none", alpha=0.6,
    )  # fmt: skip
