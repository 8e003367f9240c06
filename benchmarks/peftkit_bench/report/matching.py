"""Records -> pairs: the records of two contenders that can stand in one comparison, each in its newest form."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peftkit_bench.record import AnyRecord, Record, RecordError, digest

Key = tuple[str, int | None]
"""A contender, and the budget that its size was solved for; None: it has a size of its own."""


class CompareError(RecordError):
    """A comparison that the records do not allow; says what they hold, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two contenders on one task, at one budget."""

    first: tuple[Record, ...]
    """By ascending seed, the same seeds as the second's."""
    second: tuple[Record, ...]
    others: tuple[tuple[Record, ...], ...]
    """Other contenders that were run beside them at this budget, with the same seeds: they say how runs vary."""
    budget: int | None
    """None: both have a size of their own, or different budgets were asked for."""
    notes: tuple[str, ...]


def finals(records: Iterable[AnyRecord]) -> list[Record]:
    """The records that count, searches left out, oldest first.

    Raises:
        CompareError: there are none.
    """
    found = sorted((r for r in records if isinstance(r, Record) and r.phase == "final"), key=lambda r: r.started)
    if not found:
        raise CompareError("expected records of finished cells, found none; run the suite to its end with `bench run`")
    return found


def pairs(records: Sequence[Record], first: str, second: str, budget: int | None = None) -> list[Pair]:
    """The pairs of two contenders on every task and budget that both were run on, newest task first.

    Pairs within one suite; where the two never were in one suite, pairs across suites, with a note.

    Args:
        records: as `finals` gives them.
        first: a contender, or a contender at one budget as the report names it, such as "LoRA, 74k".
        second: another.
        budget: leaves other budgets out; contenders with a size of their own stay.

    Raises:
        CompareError: no contender is named so, or no record of one can be compared with one of the other.
    """
    one, other = _resolved(records, first), _resolved(records, second)
    if one == other:
        raise CompareError(f"expected two different contenders, found {first!r} twice")
    known = {at for r in records if r.contender in (one[0], other[0]) and (at := _budget(r)) is not None}
    if budget is not None and budget not in known:
        offered = ", ".join(f"{at:,}" for at in sorted(known)) or "none"
        raise CompareError(f"expected a budget that {one[0]} or {other[0]} was run at ({offered}), found {budget:,}")
    refused: list[str] = []
    for within_suites in (True, False):
        found: list[Pair] = []
        for group in _places(records, within_suites):
            found += _of_group(group, one, other, budget, refused)
        if found:
            return found
    ours, theirs = _newest(records, one[0]), _newest(records, other[0])
    raise CompareError("; ".join(dict.fromkeys([*refused, *_apart(ours, theirs)])))


def _of_group(group: Sequence[Record], one: Key, other: Key, budget: int | None, refused: list[str]) -> list[Pair]:
    forms, changed = newest_forms(group)
    found = []
    for a in (key for key in forms if _chosen(key, one, budget)):
        for b in (key for key in forms if _chosen(key, other, budget)):
            free = None in (one[1], other[1])
            if a == b or (free and None not in (a[1], b[1]) and a[1] != b[1]):
                continue
            seeds = sorted({r.seed for r in forms[a]} & {r.seed for r in forms[b]})
            if not seeds:
                refused.append(
                    f"{a[0]} and {b[0]} have no seed in common on {group[0].data['name']}: "
                    f"{[r.seed for r in forms[a]]} and {[r.seed for r in forms[b]]}; run the suite's missing cells"
                )
                continue
            at = a[1] if b[1] in (None, a[1]) else b[1] if a[1] is None else None
            ours, theirs = _at(forms[a], seeds), _at(forms[b], seeds)
            beside = [
                _at(mine, seeds)
                for key, mine in forms.items()
                if key not in (a, b) and key[1] in (None, at) and mine[0].suite in (ours[0].suite, theirs[0].suite)
            ]
            notes = [f"{name} was run with other settings before; the newest count." for name in changed
                     if name in (a[0], b[0])]  # fmt: skip
            notes += _doubts(ours, theirs, forms[a], forms[b])
            found.append(
                Pair(first=ours, second=theirs, budget=at, notes=tuple(notes),
                     others=tuple(mine for mine in beside if len(mine) == len(seeds)))
            )  # fmt: skip
    return sorted(found, key=lambda pair: pair.budget or 0)


def newest_forms(group: Iterable[Record]) -> tuple[dict[Key, tuple[Record, ...]], list[str]]:
    """The records of each contender and budget in its newest form, by seed; and the contenders that have older ones."""
    by_key: dict[Key, list[Record]] = defaultdict(list)
    for each in sorted(group, key=lambda r: r.started):
        by_key[(each.contender, _budget(each))].append(each)
    forms: dict[Key, tuple[Record, ...]] = {}
    changed: dict[str, None] = {}
    for key, mine in by_key.items():
        kept = {r.seed: r for r in mine if r.variant == mine[-1].variant}
        if any(r.variant != mine[-1].variant for r in mine):
            changed[key[0]] = None
        forms[key] = tuple(kept[seed] for seed in sorted(kept))
    return forms, list(changed)


def short_count(value: float) -> str:
    """A count as a person says it: 3k, 75k, 22.7M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _budget(found: Record) -> int | None:
    return found.budget if found.knob is not None else None


def _chosen(key: Key, asked: Key, budget: int | None) -> bool:
    return key[0] == asked[0] and (asked[1] in (None, key[1])) and (budget is None or key[1] in (None, budget))


def _at(mine: Sequence[Record], seeds: Sequence[int]) -> tuple[Record, ...]:
    return tuple(r for r in mine if r.seed in seeds)


def _places(records: Sequence[Record], within_suites: bool) -> list[list[Record]]:
    """Records of one data set, split, backbone, task and metric, and of one suite if asked; the newest first."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for each in records:
        groups[(each.suite if within_suites else "", *_conditions(each).values())].append(each)
    return sorted(groups.values(), key=lambda group: max(r.started for r in group), reverse=True)


def _conditions(found: Record) -> dict[str, str]:
    """What two records must share to be compared."""
    return {
        "data": f"{found.data['name']} ({found.data['hash']})",
        "split": found.split,
        "backbone": f"{found.backbone['name']} ({found.backbone['hash']})",
        "task": f"{found.task['name']} ({digest(found.task)})",
        "metric": found.metric,
    }


def _newest(records: Sequence[Record], contender: str) -> Record:
    return [r for r in records if r.contender == contender][-1]


def _apart(first: Record, second: Record) -> list[str]:
    """Why two records cannot be compared."""
    ours, theirs = _conditions(first), _conditions(second)
    differ = [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]
    if not differ:
        return []
    return [
        f"{first.contender} and {second.contender} cannot be compared: they differ in {', '.join(differ)}; "
        "run both in one suite"
    ]


def _doubts(
    ours: Sequence[Record], theirs: Sequence[Record], all_ours: Sequence[Record], all_theirs: Sequence[Record]
) -> list[str]:
    """What a reader should know of a pair."""
    found = []
    left = sorted(({r.seed for r in all_ours} | {r.seed for r in all_theirs}) - {r.seed for r in ours})
    if left:
        found.append(f"Seeds that only one of the two has are left out: {', '.join(map(str, left))}.")
    first, second = ours[0], theirs[0]
    if first.suite != second.suite:
        found.append(f"The two come from different suites, {first.suite} and {second.suite}.")
    differ = sorted(
        name for name in {*first.training, *second.training} if first.training.get(name) != second.training.get(name)
    )
    if differ:
        found.append(f"The two were trained differently: {_shown(first.training, second.training, differ)}.")
    return found


def _shown(first: Mapping[str, object], second: Mapping[str, object], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {first.get(name)} and {second.get(name)}" for name in names)


def _resolved(records: Sequence[Record], asked: str) -> Key:
    """The contender that a name means, and its budget where the name says one."""
    names: dict[str, Key] = {r.contender: (r.contender, None) for r in records}
    for each in records:
        at = _budget(each)
        if at is not None:
            for shown in (short_count(at), f"{at:,}", str(at)):
                names.setdefault(f"{each.contender}, {shown}", (each.contender, at))
    if asked in names:
        return names[asked]
    folded: dict[str, list[Key]] = defaultdict(list)
    for name, key in names.items():
        folded[name.casefold()].append(key)
    if len(set(folded.get(asked.casefold(), []))) == 1:
        return folded[asked.casefold()][0]
    contenders = list(dict.fromkeys(r.contender for r in records))
    close = difflib.get_close_matches(asked.casefold(), list(folded), n=1)
    nearest = next((name for name in names if close and name.casefold() == close[0]), None)
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    raise CompareError(f"expected a contender of these records ({', '.join(contenders)}), found {asked!r}{hint}")
