"""How often the statistics are right where the truth is known: `python -m peftkit_bench.simulation [--out FILE]`.

Each data set is drawn from one model. Method a, trained with seed s, meets example i of group g with skill

    z = a + u + d + m + e

u: of the run (RUN; several times that for method 1 where runs are uneven), d: how easy the example is, the same for all
(GROUP for its group, EXAMPLE for itself), m: how well it suits the method (METHOD), e: of this run on this example
(NOISE); independent normals with mean 0 and these standard deviations. What is counted follows from z; with Φ the
normal distribution function and all but u integrated out, the true score of a run is the metric's formula of its
expected counts, that of a method the mean of this over u.

- accuracy: right with probability Φ(z).
- entity F1: Poisson(1.5) entities; each is found with probability Φ(z); besides Poisson(0.6 Φ(-z)) wrong ones.
- perplexity: 10 + Poisson(30) tokens of 3 - 0.3 z nats each.
- BLEU: a reference of 8 + Poisson(12) tokens, a translation 3 shorter to 1 longer; Φ(z) 0.8^(n-1) of its
  n-grams match.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from peftkit_bench import power
from peftkit_bench.metrics import METRICS, Metric
from peftkit_bench.resampling import bootstrap, mcnemar, paired_bootstrap, permutation_test
from peftkit_bench.runs import difference_variances, run_variances
from peftkit_bench.statistics import compare_all, estimate, holm, paired_test
from peftkit_bench.tables import influence, table

Numbers = NDArray[np.float64]
RUN, GROUP, EXAMPLE, METHOD, NOISE = 0.05, 0.6, 0.8, 0.3, 0.5
SKILL = 0.8
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
TABLES: dict[str, Callable[[Metric, Any], Numbers]] = {"jackknife": table, "influence": influence}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A draw's size and spread."""

    metric: str
    seeds: int
    examples: int
    group_size: int = 1
    skills: tuple[float, ...] = (SKILL,) * 4
    """One for each method."""
    run: float = RUN
    method: float = METHOD
    uneven: float = 1.0
    """How much farther the runs of method 1 scatter than those of the others."""

    @property
    def deviations(self) -> Numbers:
        """Standard deviation of u for each method."""
        found = np.full(len(self.skills), self.run)
        found[1:2] *= self.uneven
        return found

    @property
    def groups(self) -> list[int] | None:
        """Group of each example; None: each is its own."""
        return None if self.group_size == 1 else [i // self.group_size for i in range(self.examples)]

    @property
    def spread(self) -> float:
        """Standard deviation of z about a + u."""
        return math.sqrt(GROUP**2 + EXAMPLE**2 + self.method**2 + NOISE**2)

    def draw(self, rng: np.random.Generator) -> tuple[Numbers, Numbers]:
        """Counts, (methods, seeds, examples, k), and the run's part u of each, (methods, seeds)."""
        methods = len(self.skills)
        runs = self.deviations[:, None] * rng.normal(size=(methods, self.seeds))
        group = np.repeat(rng.normal(size=-(-self.examples // self.group_size)), self.group_size)[: self.examples]
        easy = GROUP * group + EXAMPLE * rng.normal(size=self.examples)
        fits = self.method * rng.normal(size=(methods, 1, self.examples))
        noise = NOISE * rng.normal(size=(methods, self.seeds, self.examples))
        z = np.asarray(self.skills)[:, None, None] + runs[..., None] + easy + fits + noise
        return DRAWS[self.metric](rng, z), runs

    def truth(self, skill: float, run: Numbers | None = None, *, uneven: bool = False) -> Any:
        """The true score of a method, or of its runs.

        Args:
            skill: of the method.
            run: u of each run; None: the mean over runs.
            uneven: whether its runs are those of method 1.
        """
        u = self.deviations[int(uneven)] * NODES if run is None else run
        counts = EXPECTED[self.metric]((skill + u) / math.sqrt(1 + self.spread**2), skill + u)
        found = METRICS[self.metric].formula(np.stack(counts, axis=-1))
        return float(WEIGHTS @ found / WEIGHTS.sum()) if run is None else found


def _accuracy(rng: np.random.Generator, z: Numbers) -> Numbers:
    return np.asarray(rng.random(z.shape) < ndtr(z), dtype=np.float64)[..., None]


def _entities(rng: np.random.Generator, z: Numbers) -> Numbers:
    held = np.broadcast_to(rng.poisson(1.5, z.shape[-1]), z.shape)
    right = rng.binomial(held, ndtr(z))
    return np.stack([right, rng.poisson(0.6 * ndtr(-z)), held - right], axis=-1).astype(np.float64)


def _nats(rng: np.random.Generator, z: Numbers) -> Numbers:
    tokens = np.broadcast_to(10 + rng.poisson(30, z.shape[-1]), z.shape).astype(np.float64)
    return np.stack([tokens * (3 - 0.3 * z), tokens], axis=-1)


def _translations(rng: np.random.Generator, z: Numbers) -> Numbers:
    reference = np.broadcast_to(8 + rng.poisson(12, z.shape[-1]), z.shape)
    length = reference + rng.integers(-3, 2, z.shape)
    share = ndtr(z)
    matched = [rng.binomial(length - n, share * 0.8**n) for n in range(4)]
    return np.stack([*matched, *(length - n for n in range(4)), length, reference], axis=-1).astype(np.float64)


DRAWS: dict[str, Callable[[np.random.Generator, Numbers], Numbers]] = {
    "accuracy": _accuracy,
    "entity F1": _entities,
    "perplexity": _nats,
    "BLEU": _translations,
}
EXPECTED: dict[str, Callable[[Numbers, Numbers], list[Any]]] = {
    "accuracy": lambda x, _: [ndtr(x)],
    "entity F1": lambda x, _: [1.5 * ndtr(x), 0.6 * ndtr(-x), 1.5 * ndtr(-x)],
    "perplexity": lambda _, skill: [40 * (3 - 0.3 * skill), np.full_like(skill, 40.0)],
    "BLEU": lambda x, _: [
        *((19.0 - n) * ndtr(x) * 0.8**n for n in range(4)),
        *(np.full_like(x, 19.0 - n) for n in range(4)),
        np.full_like(x, 19.0),
        np.full_like(x, 20.0),
    ],
}
"""Expected counts, given Φ's argument for a random example, and a + u."""


def coverage(
    model: Model, rounds: int, ways: Sequence[str] = ("jackknife",), seed: int = 0
) -> dict[str, dict[str, float]]:
    """How often the 95 % intervals of a score and of a difference hold the truth: shares of the rounds by way.

    With several seeds the truth is the method's. With one it is the run's own; "score of the method" is then how often
    the same interval holds the method's, for which it was not made.
    """
    rng = np.random.default_rng(seed)
    metric = METRICS[model.metric]
    score = model.truth(model.skills[0])
    apart = score - model.truth(model.skills[1], uneven=True)
    hits: dict[str, Counter[str]] = {way: Counter() for way in ways}
    for _ in range(rounds):
        counts, runs = model.draw(rng)
        own = [float(model.truth(a, u).mean()) for a, u in zip(model.skills[:2], runs[:2], strict=True)]
        for way in ways:
            tables = [TABLES[way](metric, each) for each in counts]
            one = estimate(tables[0], model.groups, run_variances(tables)[0])
            two, _ = paired_test(tables[0], tables[1], model.groups, difference_variances(tables)[0, 1])
            held = {"score": one.low <= score <= one.high, "difference": two.low <= apart <= two.high}
            if model.seeds == 1:
                held = {f"{name} of the method": value for name, value in held.items()}
                held |= {"score": one.low <= own[0] <= one.high, "difference": two.low <= own[0] - own[1] <= two.high}
            hits[way] += Counter({name: int(value) for name, value in held.items()})
    return {way: {name: found[name] / rounds for name in sorted(found)} for way, found in hits.items()}


def bootstrap_coverage(model: Model, rounds: int, corrected: bool, draws: int = 999, seed: int = 0) -> dict[str, float]:
    """The same for the bootstrap."""
    rng = np.random.default_rng(seed)
    metric = METRICS[model.metric]
    hits = {"score": 0, "difference": 0}
    for number in range(rounds):
        counts, runs = model.draw(rng)
        alone = model.seeds == 1
        truths = [
            float(model.truth(a, u)[0] if alone else model.truth(a)) for a, u in zip(model.skills, runs, strict=True)
        ]
        options: Any = {"rounds": draws, "seed": number, "corrected": corrected}
        one = bootstrap(metric, counts[0], model.groups, **options)
        two = paired_bootstrap(metric, counts[0], counts[1], model.groups, **options)
        hits["score"] += one.low <= truths[0] <= one.high
        hits["difference"] += two.low <= truths[0] - truths[1] <= two.high
    return {name: count / rounds for name, count in hits.items()}


def t_and_holm(model: Model, counts: Numbers) -> bool:
    """Whether t and Holm find any two methods apart."""
    tables = {str(i): table(METRICS[model.metric], each) for i, each in enumerate(counts)}
    return any(found.significant() for found in compare_all(tables, model.groups))


def mcnemar_and_holm(model: Model, counts: Numbers) -> bool:
    """Whether McNemar's test of the first seed and Holm find any two methods apart."""
    pairs = [(a, b) for i, a in enumerate(counts) for b in counts[i + 1 :]]
    return min(holm([mcnemar(a[0, :, 0], b[0, :, 0]).p for a, b in pairs])) < power.LEVEL


def permutation_and_holm(model: Model, counts: Numbers) -> bool:
    """Whether the permutation test and Holm find any two methods apart."""
    pairs = [(a, b) for i, a in enumerate(counts) for b in counts[i + 1 :]]
    metric = METRICS[model.metric]
    found = [permutation_test(metric, a, b, model.groups, rounds=999, seed=i).p for i, (a, b) in enumerate(pairs)]
    return min(holm(found)) < power.LEVEL


RULES = {"t": t_and_holm, "McNemar": mcnemar_and_holm, "permutation": permutation_and_holm}


def any_finding(model: Model, rule: str, rounds: int, seed: int = 0) -> float:
    """Share of rounds in which a rule, with Holm's correction over all pairs, tells any two methods apart."""
    rng = np.random.default_rng(seed)
    return sum(RULES[rule](model, model.draw(rng)[0]) for _ in range(rounds)) / rounds


def found_difference(model: Model, rounds: int, seed: int = 0) -> float:
    """Share of rounds in which the t test of the first two methods, not corrected, is below 5 %."""
    rng = np.random.default_rng(seed)
    metric = METRICS[model.metric]
    hits = 0
    for _ in range(rounds):
        tables = [table(metric, each) for each in model.draw(rng)[0]]
        hits += paired_test(tables[0], tables[1], model.groups, difference_variances(tables)[0, 1])[1] < power.LEVEL
    return hits / rounds


def true_parts(model: Model, sample: int = 200, seed: int = 0) -> power.Parts:
    """The variances behind a difference of the first two methods, from many seeds and examples."""
    rng = np.random.default_rng(seed)
    wide = Model(**{**vars(model), "seeds": sample, "examples": 2000, "group_size": 1})
    tables = [table(METRICS[model.metric], each) for each in wide.draw(rng)[0]]
    found, _ = paired_test(tables[0], tables[1])
    parts = power.parts(found)
    return power.Parts(
        runs=parts.runs, groups=parts.groups, interaction=parts.interaction, degrees=len(model.skills) - 1
    )


def null(
    seeds: int,
    examples: int = 1000,
    group_size: int = 1,
    run: float = RUN,
    metric: str = "accuracy",
    uneven: float = 1.0,
) -> Model:
    """Eight "methods" that are one model: nothing but seeds tells them apart.

    Where runs are uneven, method 1 differs by what its scatter does to the mean, 0.15 points for four times RUN.
    """
    return Model(metric=metric, seeds=seeds, examples=examples, group_size=group_size, skills=(SKILL,) * 8, run=run,
                 method=0.0, uneven=uneven)  # fmt: skip


def everything(scale: float = 1.0) -> Iterator[dict[str, Any]]:
    """All rows of the full simulation.

    Args:
        scale: of the number of rounds.
    """

    def rounds(number: int) -> int:
        return max(10, round(scale * number))

    def row(what: str, model: Model, number: int, found: dict[str, float], **more: Any) -> dict[str, Any]:
        return {"what": what, **more, "metric": model.metric, "methods": len(model.skills), "seeds": model.seeds,
                "examples": model.examples, "group_size": model.group_size, "run": model.run, "uneven": model.uneven,
                "rounds": number,
                **{name: round(value, 4) for name, value in found.items()}}  # fmt: skip

    for metric in DRAWS:
        for seeds in (1, 3, 5):
            for examples, size in ((200, 1), (200, 4), (1000, 1), (1000, 4)):
                model = Model(metric=metric, seeds=seeds, examples=examples, group_size=size)
                number = rounds(400 if examples == 200 else 250)
                ways = ("jackknife",) if metric == "accuracy" else tuple(TABLES)
                for way, found in coverage(model, number, ways).items():
                    yield row("coverage", model, number, found, way=way)
        for seeds in (1, 3):
            model = Model(metric=metric, seeds=seeds, examples=200, skills=(SKILL, SKILL))
            for corrected in (False, True):
                number = rounds(200)
                found = bootstrap_coverage(model, number, corrected)
                yield row("coverage", model, number, found, way="bootstrap BCa" if corrected else "bootstrap")
    few = Model(metric="accuracy", seeds=3, examples=200, group_size=20)
    yield row("coverage", few, rounds(400), coverage(few, rounds(400))["jackknife"], way="jackknife")
    for metric in ("accuracy", "perplexity"):
        for seeds in (3, 5):
            model = Model(metric=metric, seeds=seeds, examples=1000, skills=(SKILL,) * 8, uneven=4.0)
            found = coverage(model, rounds(250))["jackknife"]
            yield row("coverage", model, rounds(250), found, way="jackknife")
    for rule, seeds, size, run, uneven, number in (
        ("t", 3, 1, RUN, 1.0, 400),
        ("t", 5, 1, RUN, 1.0, 400),
        ("t", 3, 4, RUN, 1.0, 400),
        ("t", 3, 1, 0.0, 1.0, 400),
        ("t", 3, 1, 0.2, 1.0, 400),
        ("t", 3, 1, RUN, 4.0, 400),
        ("t", 5, 1, RUN, 4.0, 400),
        ("t", 1, 1, 0.0, 1.0, 400),
        ("McNemar", 1, 1, 0.0, 1.0, 600),
        ("McNemar", 1, 1, RUN, 1.0, 600),
        ("McNemar", 1, 1, 0.2, 1.0, 600),
        ("permutation", 1, 1, 0.0, 1.0, 100),
        ("permutation", 3, 1, RUN, 1.0, 60),
        ("permutation", 3, 1, 0.2, 1.0, 60),
    ):
        model = null(seeds, 200 if rule == "permutation" else 1000, size, run, uneven=uneven)
        yield row("any false finding", model, rounds(number), {"share": any_finding(model, rule, rounds(number))},
                  rule=rule)  # fmt: skip
    for rise in (0.1, 0.2):
        model = Model(metric="accuracy", seeds=3, examples=1000, skills=(SKILL + rise, SKILL, SKILL, SKILL))
        true = model.truth(SKILL + rise) - model.truth(SKILL)
        parts = true_parts(model)
        for seeds in (3, 5, 10):
            sized = Model(**{**vars(model), "seeds": seeds})
            predicted = power.power(true, parts, seeds, 1000)
            found = {"share": found_difference(sized, rounds(400)), "predicted": predicted, "difference": true}
            yield row("power", sized, rounds(400), found, rule="t")


def shown(row: dict[str, Any]) -> str:
    """One row as a line of text."""
    fixed = ("what", "way", "rule", "metric", "methods", "seeds", "examples", "group_size", "run", "uneven", "rounds")
    found = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name not in fixed)
    how = row.get("way", row.get("rule"))
    return (
        f"{row['what']:18}{how:14}{row['metric']:11}{row['methods']:2} methods {row['seeds']:2} seeds "
        f"{row['examples']:5} examples by {row['group_size']}  u {row['run']:.2f} x {row['uneven']:g}  "
        f"{row['rounds']:4} rounds  {found}"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m peftkit_bench.simulation", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, help="file to which each row is appended as one JSON line")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rounds (1: about two minutes)")
    chosen = parser.parse_args(arguments)
    start = time.monotonic()
    for row in everything(chosen.scale):
        sys.stdout.write(shown(row) + "\n")
        sys.stdout.flush()
        if chosen.out:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            with chosen.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, sort_keys=True) + "\n")
    sys.stdout.write(f"{time.monotonic() - start:.0f} s\n")


if __name__ == "__main__":
    main()
