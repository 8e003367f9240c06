"""Comparing methods and timings: `peftkit bench run | report | compare | pack | speed | ops`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from peftkit.cli.app import bench
from peftkit.errors import ConfigError, nearest


@bench.command("run")
def bench_run(
    suite: Annotated[str, typer.Argument(help="A suite file, or the name of one that comes with peftkit.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the records and the report; default: reports/NAME.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Cells at a time; 0: one for each GPU, else one.")] = 0,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            help="Run on a Ray cluster: its address; 'auto': the one that this machine is in; 'local': a new one.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show cells, counts, memory and time; run nothing.")
    ] = False,
    model: Annotated[
        str, typer.Option("--model", help="In place of a suite: a model's folder, or its name on a hub.")
    ] = "",
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="JSONL, CSV or Parquet: one file, or train, validation and test; or a hub name."),
    ] = None,
    task: Annotated[str, typer.Option("--task", help="seq-cls, token-cls, qa, causal-lm or seq2seq.")] = "seq-cls",
    methods: Annotated[
        str, typer.Option("--methods", help="Names, by commas; peft:boft is Hugging Face peft's; lora@nf4: on NF4.")
    ] = "lora,adalora,bottleneck,prefix,ia3,bitfit,full,head",
    budget: Annotated[
        str, typer.Option("--budget", help="Trainable parameters besides the head: 0.5%, 74000; several by commas.")
    ] = "0.5%",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs that count, for each method.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps of each run.")] = 200,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows of a step.")] = 32,
    learning_rates: Annotated[
        str, typer.Option("--learning-rates", help="The grid, by commas; default: 0.0001 to 0.03, two a decade.")
    ] = "",
    trials: Annotated[
        int, typer.Option("--trials", min=0, help="Trials of Optuna for each method in place of the grid.")
    ] = 0,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="The task's column and the file's: text=sentence.")
    ] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="Where the task has several.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Inputs are cut to so many tokens.")] = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="How frozen weights are stored: nf4, int8, ...")
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="float32 or bfloat16.")] = "float32",
) -> None:
    """Compare methods and report. Interrupted and run again, it goes on where it was."""
    if bool(suite) == bool(model):
        raise ConfigError("give either a suite, such as `peftkit bench run quick`, or --model and --data")
    chosen: Any
    if suite:
        if data:
            raise ConfigError("--data goes with --model; a suite names its own data")
        chosen = find_suite(suite)
        module, name = _bench_module("suite").runner(chosen), chosen.stem
    else:
        chosen = _bench_module("adhoc").suite(
            model=model,
            data=[part for each in data or [] for part in each.split(",")],
            task=task,
            methods=_listed(methods),
            budgets=_listed(budget),
            seeds=seeds,
            steps=steps,
            batch_size=batch_size,
            trials=trials,
            columns=columns or [],
            metric=metric,
            max_tokens=max_tokens,
            quantization=quantization,
            precision=precision,
            **({"learning_rates": _rates(learning_rates)} if learning_rates else {}),
        )
        module, name, chosen = "engine", chosen.name, (chosen,)
    engine = _bench_module(module)
    if dry_run:
        print(_bench_module("preview").text(chosen) if module == "engine" else engine.dry_run(chosen))
        return
    options: dict[str, Any] = {"jobs": jobs, "ray": ray}
    if module != "engine":
        if ray is not None:
            raise ConfigError("--ray: a suite of merges runs one merge at a time, on this machine")
        options = {"jobs": max(1, jobs)}
    try:
        written = engine.run(chosen, out or Path("reports") / name, progress=not quiet, **options)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it was", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"records and report: {written}")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _rates(text: str) -> list[float]:
    try:
        return sorted(float(part) for part in _listed(text))
    except ValueError:
        raise ConfigError(f"--learning-rates: expected numbers by commas, such as 1e-4,1e-3, found {text!r}") from None


@bench.command("compare")
def bench_compare(
    first: Annotated[str, typer.Argument(help="A contender, as the report names it.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    records: Annotated[list[Path] | None, typer.Argument(help="Folders with records; default: reports/*.")] = None,
    budget: Annotated[int | None, typer.Option("--budget", help="Only at this budget.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Is the first better than the second? The paired test, the effect, its interval, and what would settle it."""
    folders = records or sorted(
        {path.parent for end in ("", ".xz") for path in Path("reports").glob(f"*/records.jsonl{end}")}
    )
    if not folders:
        raise ConfigError("no records in reports/*; name the folders that `peftkit bench run --out` has written")
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; expected one that `peftkit bench run --out` has written")
    compare = _bench_module("report.compare")
    try:
        print((compare.json_text if json else compare.text)(folders, first, second, budget=budget))
    except ValueError as error:
        raise ConfigError(str(error)) from None


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


@bench.command("pack")
def bench_pack(
    records: Annotated[Path, typer.Argument(help="Folder with records.")],
    out: Annotated[Path, typer.Argument(help="Folder for the small copy.")],
) -> None:
    """Make a copy small enough to commit: records and predictions compressed, report.md with its plots."""
    if not records.is_dir():
        raise ConfigError(f"{records} is not a folder; expected one that `peftkit bench run --out` has written")
    try:
        written = _bench_module("packing").pack(records, out)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    size = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    print(f"packed: {written}, {size / 1e3:,.0f} kB")


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
