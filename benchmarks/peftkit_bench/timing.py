"""Times of calls that are made in turn, so that a drift of the machine's speed meets all of them alike."""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit_bench.record import environment


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` times each, in an order shuffled every round."""
    order = list(calls)
    generator = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm_up):
        for name in order:
            calls[name]()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            generator.shuffle(order)
            for name in order:
                start = time.perf_counter()
                calls[name]()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def append(timings: Sequence[Any], out: Path) -> None:
    """Appends one JSON line a timing, a dataclass, with the machine and the versions, to `out`."""
    stamp = environment()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as file:
        for timing in timings:
            file.write(json.dumps({**dataclasses.asdict(timing), "environment": stamp}, sort_keys=True) + "\n")
