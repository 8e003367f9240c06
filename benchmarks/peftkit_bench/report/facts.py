"""Records -> what was run and how each number was taken, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftkit_bench.record import Record
from peftkit_bench.report import sentences
from peftkit_bench.report.findings import Findings
from peftkit_bench.report.tuning import Tuning

MOST_NAMES = 24
"""Of a list in the data's facts; longer ones are cut."""


def plain(value: Any) -> str:
    """A value of a record as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(name)} {plain(inner)}" for name, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        shown = ", ".join(plain(each) for each in value[:MOST_NAMES])
        return f"{shown} and {len(value) - MOST_NAMES} more" if len(value) > MOST_NAMES else shown
    return str(value)


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _rest(found: Mapping[str, Any], known: Sequence[str]) -> str:
    """The entries that have no sentence of their own."""
    parts = [
        f"{_words(name)}: {plain(value)}" for name, value in found.items()
        if name not in known and value not in (None, "", [], {})
    ]  # fmt: skip
    return "; ".join(parts)


def facts(group: Sequence[Record]) -> list[tuple[str, str]]:
    """What the records share: data, task, backbone, training, machine."""
    first = max(group, key=lambda r: r.started)
    data, backbone, machine = first.data, first.backbone, first.environment
    splits = ", ".join(
        f"{data[name]:,} {words}"
        for name, words in (
            ("train", "to train on"), ("tune", "to choose learning rates"), ("stop", "to stop training"),
            ("test", "to test"),
        )
        if isinstance(data.get(name), int)
    )  # fmt: skip
    rest = _rest(data, ("name", "hash", "train", "tune", "stop", "test", "versions", "notes", "facts"))
    made = [("Data", f"{data['name']} (hash {data['hash']}): examples: {splits}" + (f"; {rest}" if rest else ""))]
    if data.get("facts"):
        made.append(("Learnt from it", _rest(data["facts"], ()) or "nothing"))
    if data.get("versions"):
        made.append(("Taken from", plain(data["versions"])))
    if data.get("notes"):
        made.append(("Notes on the data", "; ".join(map(str, data["notes"]))))
    options = _rest(first.task, ("name",))
    made.append(("Task", first.task["name"] + (f"; {options}" if options else "")))
    model = f"{backbone['name']} ({backbone.get('class', 'class unknown')}, {backbone['parameters']:,} parameters"
    made.append(("Backbone", f"{model}, weights {backbone['hash'] or 'from a hub'})"))
    made.append(("Training", f"{_rest(first.training, ())}; AdamW, the same for every method but the learning rate"))
    memory = f", {machine['memory_bytes'] / 2**30:.0f} GiB memory" if machine.get("memory_bytes") else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    made.append(
        (
            "Machine",
            f"{machine.get('processor')}, {machine.get('cores')} cores{memory}, device {machine.get('device', 'cpu')}, "
            f"{machine.get('system')}; cells at a time: {first.jobs}, threads for each: {first.threads}"
            f"{_compiled(machine)}",
        )
    )
    commit = machine.get("commit") or "not in a repository"
    made.append(("Versions", f"Python {machine.get('python')}, {versions}; commit {commit}"))
    return made


def _compiled(machine: Mapping[str, Any]) -> str:
    if "compiled" not in machine:
        return ""
    by_device = [f"{sentences.listed(names)} for {device}" for device, names in machine["compiled"].items()]
    return f"; peftkit's compiled operations: {'; '.join(by_device) or 'none, all run as plain torch'}"


def how(found: Findings, pairs: bool) -> list[tuple[str, str]]:
    """How each number was taken, in a sentence or two.

    Args:
        pairs: whether implementations are compared side by side.
    """
    first, metric = found.first, found.metric
    seeds = ", ".join(map(str, sorted({seed for row in found.rows for seed in row.seeds})))
    tests = sorted({c.test for contest in found.contests for c in contest.comparisons})
    most = max((len(contest.comparisons) for contest in found.contests), default=0)
    made = {
        "Trainable parameters": _parameters(found),
        metric.name[:1].upper() + metric.name[1:]: (
            f"{metric.source}; {'higher' if metric.higher_is_better else 'lower'} is better. Mean over seeds {seeds} "
            f"(order of the data, start of head and adapter, dropout) on {found.examples:,} {first.split} examples, "
            "which were predicted once, by the runs that count, and on which nothing was chosen."
        ),
        "Splits": (
            "four that share no row and no group: training; tune, on which learning rates are chosen; stop, on which "
            f"the step is chosen whose weights are kept (by {first.stopping_measure}); test, touched once."
        ),
        "Intervals": (
            "95 %, for other seeds and other examples: the method's variance between training runs, which is drawn "
            "towards what all methods share, the more so the more alike they are (Smyth 2004), because few seeds say "
            "little about each by itself, and the variance between groups of examples "
            f"({found.rows[0].score.groups:,} of them: examples of one group, such as one file, are not independent) "
            "are added, what both hold is taken off once, and the degrees of freedom are Satterthwaite's. What an "
            "example adds to a score that is no mean is its jackknife value."
        ),
        "Tests": (
            f"paired on the stored predictions ({', '.join(tests) or 'none'}): the difference of two methods on the "
            "same examples and seeds is estimated the same way, with the pair's variance between runs drawn towards "
            f"what all pairs share; Holm's correction over all {most} pairs at a budget, level 5 %. “Cannot be told "
            "apart” does not mean equal: the intervals of the differences say how large a difference these data leave "
            "possible. They hold all together (Bonferroni)."
        ),
        "Learning rates": _rates(found.tunings),
        "Training time": (
            "median over seeds of the wall-clock time of the training steps, without loading, tokenising and "
            "evaluation."
        ),
        "Memory": (
            f"median over seeds, over what the process held before the backbone was loaded; {first.memory_method}. "
            "Peak: the most at any moment of training; steady: what is held between two steps, memory that was freed "
            "given back, the median of the times that the stop split was predicted. Full "
            "fine-tuning through peftkit keeps the frozen weights beside the trained ones, which is part of its number."
        ),
        "On disk": "the saved adapter folder, head included.",
        "Latency": (
            f"one forward pass of {first.latency_rows} row{'s' * (first.latency_rows != 1)} of {first.latency_tokens} "
            "tokens, median of repeated passes after some that do not count, then the median over seeds; the bare "
            "backbone was timed in the same process as each method. “–”: the method cannot be merged."
        ),
        "Effect kept": (
            "⟨m - b, a - b⟩ / ‖a - b‖² with b, a, m the last hidden states of the timed rows for the base, the adapter "
            "beside the weights, and merged: 1 where merging loses nothing."
        ),
    }
    if any(row.forgotten is not None for row in found.rows):
        made["Forgotten"] = (
            "nats a token on general text after training less before, the method's weights in place; median over seeds."
        )
    if pairs:
        made["Two implementations"] = (
            "the same method at the same size: medians over seeds, peftkit's / the other's = ratio. The interval of "
            "the difference of scores is that of each pair alone (95 %, not corrected for their number); “same within "
            "noise” where it holds zero, which does not mean equal."
        )
    return list(made.items())


def _parameters(found: Findings) -> str:
    budgets = " and ".join(f"{budget:,}" for budget in found.budgets)
    text = "exact counts of the method's own parameters"
    if found.budgets:
        text += f"; where a method has a size to set, it was solved for {budgets}"
        text += ", and “nearest” marks what cannot come within 10 % of it"
    if found.first.head_parameters:
        text += (
            f"; the task's head, {found.first.head_parameters:,} parameters trained by every method, comes on top, and "
            "is counted in the plots and sentences"
        )
    return text + (
        ". “Kept” are those that remain where a method prunes, or folds away what only training needs; sizes are "
        "solved for what is trained."
    )


def _rates(searched: Sequence[Tuning]) -> str:
    if not searched:
        return "each method's own, as the suite gives them; the suite says how they were found."
    trials = sorted({len(each.trials) for each in searched})
    if any(each.sampled for each in searched):
        return (
            f"chosen on the tune split, {' to '.join(map(str, trials[:: max(len(trials) - 1, 1)]))} trials for each "
            "method from one range, by Optuna; best mean score."
        )
    grid = next((each.grid for each in searched if each.grid), ())
    text = "chosen on the tune split from one grid for all methods"
    if grid:
        text += f" ({', '.join(f'{rate:g}' for rate in grid)})"
    extended = list(dict.fromkeys(each.contender for each in searched if each.extended))
    text += ", by the best mean score; where the best lay at an end of the grid, it was extended"
    return text + (f": {', '.join(extended)}." if extended else ": it did not.")
