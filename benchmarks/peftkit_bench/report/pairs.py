"""Pairs of rows that are compared by themselves: one method at two budgets, and one method by two implementations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peftkit_bench import statistics
from peftkit_bench.report.findings import Contest, Findings, Row, lines
from peftkit_bench.runs import difference_variances
from peftkit_bench.statistics import Comparison, Estimate

ALIKE = 1.01
"""Parameter counts within this factor are those of one size."""
RATIOS = {
    "Training time": "train_seconds",
    "Peak memory": "peak_bytes",
    "Steady memory": "steady_bytes",
    "Latency": "latency_seconds",
    "On disk": "adapter_bytes",
}
"""What is put side by side, and its field."""

NAMES = {
    "prefix_tuning": "prefix",
    "prompt_tuning": "prompt",
    "p_tuning": "ptuning",
    "ln_tuning": "layernorm",
}
"""peftkit's name of a method by Hugging Face peft's, where they differ."""


def growth(found: Findings) -> list[Comparison]:
    """For each contender with several budgets its largest (`first`) against its smallest, corrected over contenders.

    Named by the contender; in the order of the records.
    """
    tested: list[Comparison] = []
    for name, rows in found.curves().items():
        if len(rows) < 2:
            continue
        small, large = rows[0], rows[-1]
        made = _paired(found, large, small)
        if made is not None:
            difference, p = made
            tested.append(
                Comparison(first=name, second=small.name, difference=difference, p=p, p_corrected=p,
                           higher_is_better=found.metric.higher_is_better)
            )  # fmt: skip
    corrected = statistics.holm([each.p for each in tested])
    return [replace(each, p_corrected=p) for each, p in zip(tested, corrected, strict=True)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Parity:
    """One method by two implementations at one size."""

    own: Row
    """peftkit's."""
    peer: Row
    difference: Estimate
    """Of the scores, peftkit's less the other's, 95 % for this pair alone."""
    p: float

    @property
    def same(self) -> bool:
        """Whether the scores cannot be told apart."""
        return self.p >= 1 - statistics.CONFIDENCE

    def ratio(self, field: str) -> float | None:
        """peftkit's median over the other's; None where either was not taken."""
        mine, other = self.own.median(field), self.peer.median(field)
        return mine / other if mine is not None and other else None


def parity(found: Findings) -> list[Parity]:
    """Every row of another implementation whose method peftkit ran at the same size, in the order of the budgets."""
    made: dict[str, Parity] = {}
    for contest in found.contests:
        for peer in contest.rows:
            own = _counterpart(contest, peer)
            if own is None or peer.name in made:
                continue
            tested = _paired(found, own, peer)
            if tested is not None:
                made[peer.name] = Parity(own=own, peer=peer, difference=tested[0], p=tested[1])
    return list(made.values())


def _counterpart(contest: Contest, peer: Row) -> Row | None:
    if peer.first.subject == "peftkit" or peer.baseline:
        return None

    def fits(row: Row) -> bool:
        low, high = sorted((row.parameters, peer.parameters))
        return (
            row.first.subject == "peftkit"
            and row.first.method == NAMES.get(peer.first.method, peer.first.method)
            and row.first.quantization == peer.first.quantization
            and high <= ALIKE * max(low, 1)
        )

    def alike(row: Row) -> int:
        """How many fields of the two configs are equal."""
        return sum(peer.first.config.get(name) == value for name, value in row.first.config.items())

    return max(filter(fits, contest.rows), key=alike, default=None)


def _paired(found: Findings, one: Row, other: Row) -> tuple[Estimate, float] | None:
    """The difference of two rows on the seeds that both have; None without any."""
    seeds = sorted(set(one.seeds) & set(other.seeds))
    if not seeds:
        return None
    beside = [r for r in found.rows if r is not one and r is not other and set(seeds) <= set(r.seeds)]
    tables = [row.table[lines(row, seeds)] for row in (one, other, *beside)]
    return statistics.paired_test(tables[0], tables[1], found.groups, difference_variances(tables)[0, 1])
