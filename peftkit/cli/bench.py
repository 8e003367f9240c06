"""Comparing methods and timings: `peftkit bench run | report | speed | ops`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit.cli.app import bench
from peftkit.errors import ConfigError, nearest


@bench.command("run")
def bench_run(
    suite: Annotated[str, typer.Argument(help="A suite file, or the name of one that comes with peftkit.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the records and the report.")] = Path("reports"),
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Processes at a time.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be run, and run nothing.")] = False,
) -> None:
    """Run a suite and write its report. Interrupted and run again, it goes on where it was."""
    path = find_suite(suite)
    engine = _bench_module(_bench_module("suite").runner(path))
    if dry_run:
        print(engine.dry_run(path))
        return
    try:
        written = engine.run(path, out, jobs=jobs, progress=not quiet)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it was", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"records and report: {written}")


@bench.command("report")
def bench_report(
    records: Annotated[list[Path], typer.Argument(help="Folders with records.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the report; default: the first folder.")] = None,
) -> None:
    """Write the report of records that exist already."""
    for folder in records:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; expected one that `peftkit bench run --out` has written")
    try:
        written = _bench_module("report").write(records, out or records[0])
    except ValueError as error:  # the report knows records only, not peftkit's exceptions
        raise ConfigError(str(error)) from None
    print(f"report: {written}")


@bench.command("speed")
def bench_speed(
    out: Annotated[Path | None, typer.Option("--out", help="JSONL file that the timings are appended to.")] = None,
    threads: Annotated[int, typer.Option("--threads", help="Threads of torch; 0: as many as it takes.")] = 0,
    only: Annotated[
        str, typer.Option("--only", help="Comparisons by name: decode, prefill, training, wrapping, merging, import.")
    ] = "",
) -> None:
    """Time adapted models against the backbone and Hugging Face peft, interleaved in this process."""
    from importlib.util import find_spec

    import torch

    speed = _bench_module("speed")
    if find_spec("peft") is None:
        raise ConfigError("peft is not installed, which the comparison needs; pip install 'peftkit[compare]'")
    if threads:
        torch.set_num_threads(threads)
    try:
        timings = speed.measure(lambda text: print(text, file=sys.stderr, flush=True), only.replace(",", " ").split())
    except ValueError as error:
        raise ConfigError(str(error)) from None
    print(speed.table(timings))
    if out is not None:
        _bench_module("timing").append(timings, out)
        print(f"records: {out}")


@bench.command("ops")
def bench_ops(
    out: Annotated[
        Path | None, typer.Option("--out", help="JSONL file that the timings are appended to, or a folder for one.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda; default: what is here.")] = "",
    threads: Annotated[int, typer.Option("--threads", help="Threads of torch; 0: as many as it takes.")] = 0,
    only: Annotated[str, typer.Option("--only", help="Operations by name, such as merge_lora.")] = "",
) -> None:
    """Time compiled operations against bitsandbytes and Hugging Face peft, interleaved in this process."""
    import torch

    ops = _bench_module("ops")
    if device not in ("", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device is visible to PyTorch; leave --device out to time the CPU code")
    if threads:
        torch.set_num_threads(threads)
    chosen = only.replace(",", " ").split()
    timings: list[Any] = []
    try:
        for kind in (device,) if device else ("cpu", "cuda"):
            if kind == "cuda" and not torch.cuda.is_available():
                timings += ops.not_measured(kind, "no GPU", chosen)
                continue
            timings += ops.measure(torch.device(kind), lambda text: print(text, file=sys.stderr, flush=True), chosen)
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed, which the comparison needs; pip install 'peftkit[compare,quantized]'"
        ) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    print(ops.table(timings))
    if out is not None:
        best = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
        file = out if out.suffix else ops.file_for(out, best)
        _bench_module("timing").append([timing for timing in timings if timing.median_seconds is not None], file)
        print(f"records: {file}")


def find_suite(name: str) -> Path:
    """The path of a suite, given as a file or as the name of one that comes with peftkit.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = _own_suites()
    if name in known:
        return known[name]
    raise ConfigError(f"no suite {name!r}: expected a YAML file or a suite's name; {nearest(name, known)}")


def _own_suites() -> dict[str, Path]:
    """Suites that come with peftkit, by name: inside the installed package, or beside it in a checkout."""
    from importlib.util import find_spec

    spec = find_spec("peftkit_bench")
    for package in (spec.submodule_search_locations if spec is not None else None) or ():
        for folder in (Path(package) / "suites", Path(package).parent / "suites"):
            found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
            if found:
                return found
    return {}


def _bench_module(name: str) -> Any:
    """A module of peftkit_bench.

    Raises:
        ConfigError: this installation has no benchmarks.
    """
    import importlib

    try:
        return importlib.import_module(f"peftkit_bench.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("peftkit_bench"):
            raise
        raise ConfigError(
            f"{error.name} is not installed, which `peftkit bench` needs; install peftkit's wheel or use make venv"
        ) from None
