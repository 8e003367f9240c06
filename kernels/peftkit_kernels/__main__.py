"""python -m peftkit_kernels status|build: what is compiled, and compiling it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftkit_kernels import Op


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of one command: 0, or 1 when something asked for could not be built."""
    parser = argparse.ArgumentParser(prog="python -m peftkit_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("status", help="for each operation and device: built, runnable, and why not")
    building = commands.add_parser("build", help="compile the CPU code, and with --cuda the CUDA code")
    building.add_argument("ops", nargs="*", help="operations to build; none: all")
    building.add_argument("--cuda", action="store_true", help="the CUDA code too")
    building.add_argument("--force", action="store_true", help="compile what is up to date, too")
    building.add_argument("--arch", action="append", help="a compute capability such as 90; may be repeated")
    building.add_argument("--if-possible", action="store_true", help="no error where there is no compiler")
    chosen = parser.parse_args(arguments)
    if chosen.command == "build":
        # Building must work whatever is, or is required to be, there already.
        os.environ["PEFTKIT_NATIVE"] = "off"
    return _status() if chosen.command == "status" else _compile(chosen)


def _status() -> int:
    from peftkit_kernels import status

    rows = [("operation", "device", "built", "runnable", "")]
    rows += [(s.op, s.device, "yes" if s.built else "no", "yes" if s.runnable else "no", s.note) for s in status()]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _compile(chosen: argparse.Namespace) -> int:
    from peftkit_kernels import OPS, BuildError, _build

    unknown = [name for name in chosen.ops if name not in OPS]
    if unknown:
        print(f"no operation is named {unknown[0]!r}; there are {', '.join(OPS)}", file=sys.stderr)
        return 1
    devices = ["cpu", "cuda"] if chosen.cuda else ["cpu"]
    for device in tuple(devices):
        try:
            _build.compiler(device)
        except BuildError as error:
            print(str(error), file=sys.stderr)
            if not chosen.if_possible:
                return 1
            devices.remove(device)
    wanted = [(op, d) for d in devices for op in OPS.values() if d in op.sources and op.name in (chosen.ops or OPS)]

    def one(number: int, op: Op, device: str) -> bool:
        label = f"[{number}/{len(wanted)}] {op.name} for {device}"
        try:
            done = _build.build(
                op.unit,
                device,
                force=chosen.force,
                architectures=chosen.arch if device == "cuda" else None,
                started=lambda: print(f"{label} ...", flush=True),
            )
        except BuildError as error:
            print(f"{label} failed\n{error}", file=sys.stderr, flush=True)
            return False
        print(f"{label}: {f'{done.seconds:.1f} s' if done.seconds else 'up to date'}", flush=True)
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(lambda job: one(*job), [(i, op, d) for i, (op, d) in enumerate(wanted, 1)]))
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
