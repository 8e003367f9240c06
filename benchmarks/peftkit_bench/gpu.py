"""Whether operations reach their aims on a GPU: `python -m peftkit_bench.gpu --out FOLDER`; peers only where installed.

Each call goes over copies of its weights that are together several times the second-level cache, recorded as a CUDA
graph and timed by events; contenders take turns. Without a GPU the same runs at small sizes, and says so.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_bench.ops import file_for
from peftkit_bench.timing import append

RANK, BLOCK, ROUNDS = 16, 64, 15
Calls = list[Callable[[], Any]]
"""The same call on one copy of its weights each."""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """One aim, and what was measured."""

    op: str
    label: str
    device: str
    seconds: float | None
    """Median of a call; None: not measured, see `note`."""
    against: str
    against_seconds: float | None
    """Median of the peer, or the least time that the bytes need at this machine's rate of copying."""
    ratio: float | None
    at_most: float | None
    """The ratio that is aimed at; None: for information."""
    compiled: bool
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the problems are."""

    layer: tuple[int, int]
    """(out, in)."""
    training_rows: int
    cache_bytes: int
    """What the copies of the weights have to exceed together."""


def sizes_for(device: torch.device) -> Sizes:
    """Real ones on a GPU, small ones on a CPU."""
    if device.type != "cuda":
        return Sizes(layer=(256, 512), training_rows=64, cache_bytes=1 << 20)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return Sizes(layer=(4096, 4096), training_rows=8192, cache_bytes=4 * cache)


def _copies(bytes_each: int, sizes: Sizes) -> int:
    return max(2, min(64, -(-sizes.cache_bytes // bytes_each)))


def _recorded(calls: Calls) -> Callable[[], Any]:
    """One replay of all calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * float(begin.elapsed_time(end))


def _together(calls: Calls) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def medians(contenders: dict[str, Calls], device: torch.device, graphs: bool = True) -> dict[str, float]:
    """Seconds of one call of each contender, which take turns."""
    record = graphs and device.type == "cuda"
    runs = {name: _recorded(calls) if record else _together(calls) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 3):
        for name, run in runs.items():
            taken = _seconds(run, device) / len(contenders[name])
            if turn >= 3:
                times[name].append(taken)
    return {name: statistics.median(found) for name, found in times.items()}


class _Problems:
    """The inputs of one run."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.sizes = device, sizes_for(device)
        self.out, self.width = self.sizes.layer
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return (0.02 * torch.randn(*shape, generator=self.generator)).to(self.device, torch.bfloat16)

    def layers(self, bytes_each: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Copies of a weight, down and up; the copies' values do not matter to the time."""
        first = (self.normal(self.out, self.width), self.normal(RANK, self.width), self.normal(self.out, RANK))
        return [first, *([t.clone() for t in first] for _ in range(_copies(bytes_each, self.sizes) - 1))]  # type: ignore[list-item]

    def copying_rate(self) -> float:
        """Bytes a second, those read and those written counted."""
        count = max(4 * self.sizes.cache_bytes, 1 << 24) // 4
        big = torch.ones(count, device=self.device)
        to = torch.empty_like(big)
        taken = medians({"": [functools.partial(to.copy_, big)]}, self.device)[""]
        return 2 * big.nbytes / taken


Found = tuple[str, dict[str, float], str, float | None, int]
"""What, seconds by contender, the peer ("" for the bytes), the ratio at most, least bytes of a call."""


def _decode(p: _Problems) -> Iterator[Found]:
    from peftkit_kernels import lora_linear

    x = p.normal(1, p.width)
    layers = p.layers(2 * p.out * p.width)
    own: Calls = [lambda w=w, d=d, u=u: lora_linear(x, w, None, d, u, 2.0) for w, d, u in layers]  # type: ignore[misc]  # bound now
    plain: Calls = [functools.partial(F.linear, x, w) for w, _, _ in layers]
    found = medians({"peftkit": own, "bfloat16 linear": plain}, p.device)
    yield "decode of one row, LoRA not merged", found, "bfloat16 linear", 1.15, 0


def _nf4(p: _Problems) -> Iterator[Found]:
    from peftkit_kernels import nf4_lora_linear, quantize_blockwise

    moved = p.out * p.width // 2 + p.out * p.width // BLOCK * 4
    layers = [(quantize_blockwise(w, "nf4", BLOCK), w, d, u) for w, d, u in p.layers(moved)]
    shape = (p.out, p.width)
    for rows in (1, 8, 16, 64):
        x = p.normal(rows, p.width)
        own: Calls = [
            lambda q=q, d=d, u=u, x=x: nf4_lora_linear(x, q.codes, q.absmax, shape, d, u, 2.0, BLOCK)  # type: ignore[misc]  # bound now
            for q, _, d, u in layers
        ]
        contenders: dict[str, Calls] = {
            "peftkit": own,
            "bfloat16 linear": [functools.partial(F.linear, x, w) for _, w, _, _ in layers],
        }
        found = medians(contenders, p.device)
        label = f"NF4 with LoRA, {rows} row{'s' if rows > 1 else ''}"
        if rows == 1:
            yield label, found, "", 1.4, moved + 2 * RANK * (p.out + p.width)
        yield label, found, "bfloat16 linear", None, 0


def _nf4_against_bitsandbytes(p: _Problems) -> Iterator[Found]:
    from peftkit_kernels import nf4_lora_linear, quantize_blockwise

    layers = p.layers(p.out * p.width // 2)
    own: Calls = []
    theirs: Calls = []
    x = p.normal(1, p.width)
    for w, d, u in layers:
        q = quantize_blockwise(w, "nf4", BLOCK)
        own.append(functools.partial(nf4_lora_linear, x, q.codes, q.absmax, (p.out, p.width), d, u, 2.0, BLOCK))
    contenders: dict[str, Calls] = {"peftkit": own}
    if importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes

        def call(codes: Tensor, state: Any, down: Tensor, up: Tensor) -> Tensor:
            found: Tensor = bitsandbytes.matmul_4bit(x, codes, state)
            return found + 2.0 * F.linear(F.linear(x, down), up)

        for w, d, u in layers:
            codes, state = bitsandbytes.functional.quantize_4bit(w, blocksize=BLOCK, quant_type="nf4")
            theirs.append(functools.partial(call, codes.t(), state, d, u))
        contenders["bitsandbytes, then LoRA"] = theirs
    yield "NF4 with LoRA, 1 row", medians(contenders, p.device), "bitsandbytes, then LoRA", 1 / 1.5, 0


def _training(p: _Problems) -> Iterator[Found]:
    from peftkit_kernels import lora_linear

    weight, down, up = p.layers(1 << 62)[0]
    x = p.normal(p.sizes.training_rows, p.width).requires_grad_()
    grad = p.normal(p.sizes.training_rows, p.out)
    leaves = (down.requires_grad_(), up.requires_grad_())

    def own() -> None:
        torch.autograd.grad(lora_linear(x, weight, None, *leaves, 2.0), (x, *leaves), grad)

    def frozen() -> None:
        torch.autograd.grad(F.linear(x, weight), (x,), grad)

    found = medians({"peftkit": [own] * 4, "frozen linear": [frozen] * 4}, p.device, graphs=False)
    yield f"LoRA training step, {p.sizes.training_rows} rows", found, "frozen linear", 1.12, 0


def _merging(p: _Problems) -> Iterator[Found]:
    from peftkit_kernels import merge_lora_

    layers = p.layers(2 * p.out * p.width)
    own: Calls = [functools.partial(merge_lora_, w, d, u, 0.1) for w, d, u in layers]
    yield "merge bfloat16", medians({"peftkit": own}, p.device), "", 1 / 0.8, 4 * p.out * p.width


def _mixed(p: _Problems) -> Iterator[Found]:
    from peftkit_kernels import multi_lora_, stacked

    count = 32
    moved = count * 2 * RANK * (p.out + p.width) + count * 2 * (p.width + 2 * p.out)
    stacks = []
    for _ in range(_copies(moved, p.sizes)):
        stacks.append(stacked([(p.normal(RANK, p.width), p.normal(p.out, RANK), 1.0) for _ in range(2)] * (count // 2)))
    x, base = p.normal(count, p.width), p.normal(count, p.out)
    adapter = torch.arange(count, device=p.device)
    own: Calls = [functools.partial(multi_lora_, base, x, stack, adapter) for stack in stacks]
    yield f"{count} rows of {count} adapters", medians({"peftkit": own}, p.device), "", 1.5, moved


FILES = {
    "lora_linear": (_decode, _training),
    "nf4_linear": (_nf4, _nf4_against_bitsandbytes),
    "merge_lora": (_merging,),
    "multi_lora": (_mixed,),
}


def measure(device: torch.device, progress: Callable[[str], None] = lambda text: None) -> list[Aim]:
    """Every aim; one that fails says why and does not keep the others from being measured."""
    from peftkit_kernels import OPS

    problems = _Problems(device)
    progress("the rate of copying")
    rate = problems.copying_rate()
    out, width = problems.sizes.layer
    aims: list[Aim] = []
    for op, parts in FILES.items():
        make = functools.partial(Aim, op=op, device=device.type, compiled=OPS[op].compiled_for(device.type))
        for part in parts:
            progress(f"{op}: {part.__name__.strip('_')}")
            try:
                with torch.no_grad() if part is not _training else torch.enable_grad():
                    results = list(part(problems))
            except Exception as error:
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                label = part.__name__.strip("_")
                aims.append(
                    make(
                        label=label, seconds=None, against="", against_seconds=None, ratio=None, at_most=None, note=why
                    )
                )
                continue
            for label, seconds, against, at_most, moved in results:
                other = seconds.get(against) if against else moved / rate
                aims.append(
                    make(
                        label=f"{label}, {out}x{width}",
                        seconds=seconds["peftkit"],
                        against=against or "the bytes",
                        against_seconds=other,
                        ratio=None if other is None else seconds["peftkit"] / other,
                        at_most=at_most,
                        note="" if other is not None else "not measured: the peer is not installed",
                    )
                )
    return aims


def table(aims: Sequence[Aim]) -> str:
    """The aims as a Markdown table."""
    lines = ["| operation | what | peftkit | against | ratio | at most | met |", "|---|---|---:|---|---:|---:|---|"]
    for aim in aims:
        here = aim.device == "cuda" and aim.seconds is not None
        own = f"{1e6 * (aim.seconds or 0):.1f} µs{'' if aim.compiled else ' (plain torch)'}" if here else "not measured"
        ratio = aim.note or ("no GPU" if not here else f"{aim.ratio:.2f}")
        met = "-"
        if here and aim.ratio is not None and aim.at_most is not None:
            met = "yes" if aim.ratio <= aim.at_most else "no"
        limit = "-" if aim.at_most is None else f"{aim.at_most:.2f}"
        lines.append(f"| {aim.op} | {aim.label} | {own} | {aim.against or '-'} | {ratio} | {limit} | {met} |")
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where everything was measured, 1 where something failed; aims that are missed are in the table."""
    parser = argparse.ArgumentParser(prog="python -m peftkit_bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for the records")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where one is")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    aims = measure(device, _say)
    sys.stdout.write(table(aims) + "\n")
    if device.type != "cuda":
        sys.stdout.write(
            "no GPU: all of it ran at small sizes on the CPU, whose times say nothing here; nothing is recorded\n"
        )
    elif chosen.out is not None:
        file = file_for(chosen.out, device)
        append(aims, file)
        sys.stdout.write(f"records: {file}\n")
    return int(any(aim.seconds is None for aim in aims))


if __name__ == "__main__":
    sys.exit(main())
