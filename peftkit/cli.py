"""The command line: `peftkit methods | plan | doctor | bench`. The one place that prints.

Only what a command needs is imported, when it runs. A PeftkitError ends a command with its message and exit code 2.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkit.errors import BackboneError, ConfigError, PeftkitError, nearest

if TYPE_CHECKING:
    from torch import nn

    from peftkit.plan import Plan
    from peftkit.spec import Method

app = typer.Typer(
    name="peftkit",
    help="Parameter-efficient fine-tuning: wrap any model, and report which method is worth its parameters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Compare methods on a suite and report what came out.", no_args_is_help=True)
app.add_typer(bench, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


class Task(StrEnum):
    """What the model is built for."""

    auto = "auto"
    base = "base"
    seq_cls = "seq-cls"
    token_cls = "token-cls"
    qa = "qa"
    causal_lm = "causal-lm"
    seq2seq = "seq2seq"
    image_cls = "image-cls"


AUTO_CLASSES = {
    Task.base: "AutoModel",
    Task.seq_cls: "AutoModelForSequenceClassification",
    Task.token_cls: "AutoModelForTokenClassification",
    Task.qa: "AutoModelForQuestionAnswering",
    Task.causal_lm: "AutoModelForCausalLM",
    Task.seq2seq: "AutoModelForSeq2SeqLM",
    Task.image_cls: "AutoModelForImageClassification",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line and exits: 0 when it worked, 2 with one message when it could not.

    Args:
        arguments: what follows the program's name; None: this process's.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="peftkit")
    except PeftkitError as error:
        print(f"peftkit: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from peftkit import __version__

        print(f"peftkit {__version__}")
        raise typer.Exit


# methods ------------------------------------------------------------------------------------------------------------


def facts(method: Method) -> dict[str, Any]:
    """What a method declares, as plain values."""
    return {
        "name": method.name,
        "title": method.title,
        "config": method.config.__name__,
        "summary": method.summary,
        "paper": None if method.paper is None else {"citation": str(method.paper), "title": method.paper.title},
        "attach": method.attach.value,
        "default_targets": list(method.default_targets),
        "mergeable": method.mergeable,
        "starts_as_identity": method.starts_as_identity,
        "quantized_base": method.quantized_base,
        "per_row": method.per_row,
        "embeddings": method.embeddings,
        "knob": method.knob.field if method.knob else None,
        "peft_type": method.peft.peft_type if method.peft else None,
    }


@app.command()
def methods(as_json: Json = False) -> None:
    """List the registered methods with what they declare."""
    from peftkit.methods import METHODS

    found = [facts(method) for method in METHODS.values()]
    if as_json:
        print(json.dumps(found, indent=2))
        return
    headings = ("name", "method", "paper", "attaches to", "merges", "quantized base", "default targets", "peft format")
    rows = [
        (
            fact["name"],
            fact["title"],
            fact["paper"]["citation"] if fact["paper"] else "-",
            fact["attach"],
            _yes(fact["mergeable"]),
            _yes(fact["quantized_base"]),
            ", ".join(fact["default_targets"]) or "-",
            fact["peft_type"] or "-",
        )
        for fact in found
    ]
    _table(headings, rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table: fitted to the terminal, or in full width when the output is a file or a pipe."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=10_000)
    console.print(table)


# plan ---------------------------------------------------------------------------------------------------------------


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A folder with config.json, or a model's name on the hub.")],
    method: Annotated[str, typer.Option("--method", "-m", help="A name that `peftkit methods` lists.")] = "lora",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="A field of the method's config; repeatable."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", "-b", help="Solve the method's size for so many trainable parameters.")
    ] = None,
    task: Annotated[Task, typer.Option("--task", "-t", help="auto: the class that the model's config names.")] = (
        Task.auto
    ),
    labels: Annotated[int | None, typer.Option("--labels", help="Number of classes of a classification head.")] = None,
    as_json: Json = False,
) -> None:
    """Show where a method would attach to a model, and how many parameters it would train. Loads no weights."""
    from peftkit.budget import fit_budget
    from peftkit.methods import METHODS
    from peftkit.plan import plan as make_plan

    if method not in METHODS:
        raise ConfigError(f"no method {method!r}; {nearest(method, METHODS)}")
    cls = METHODS[method].config
    fields = parse_options(option or ())
    skeleton = load_skeleton(model, task, labels)
    config = cls(**fields) if budget is None else fit_budget(skeleton, method, parameters=budget, **fields)
    found = make_plan(skeleton, config)
    if as_json:
        print(json.dumps(_plan_facts(found), indent=2, default=str))
        return
    if budget is not None:
        knob = METHODS[method].knob
        chosen = f"{knob.field}={getattr(config, knob.field)}" if knob else "no size to choose"
        print(f"budget {budget:,}: {chosen}, {budget - found.trainable:,} parameters left over\n")
    print(found)


def _plan_facts(found: Plan) -> dict[str, Any]:
    return {
        "method": found.method.name,
        "config": found.config.to_dict(),
        "trainable": found.trainable,
        "total": found.total,
        "shared": found.shared,
        "sites": [{"path": s.path, "module": s.kind, "shape": s.shape, "trainable": s.count} for s in found.sites],
        "extras": [{"path": s.path, "module": s.kind, "shape": s.shape, "trainable": s.count} for s in found.extras],
        "notes": list(found.notes),
    }


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Config fields from `key=value` words; a value is read as YAML, so lists and mappings work too.

    Raises:
        ConfigError: a word without "=", a key given twice, or a value that is not YAML.
    """
    import yaml

    found: dict[str, Any] = {}
    for word in options:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"-o {word}: expected KEY=VALUE, such as -o r=16")
        if key in found:
            raise ConfigError(f"-o {word}: {key} is given twice")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"-o {word}: {text!r} is not a YAML value; quote it, or write a list as [a, b]") from None
        # YAML 1.1 reads 1e-3 as a text because it has no dot.
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
            value = float(value)
        found[key] = value
    return found


def load_skeleton(name: str, task: Task, labels: int | None) -> nn.Module:
    """A transformers model on the meta device, built from its config alone.

    Args:
        name: a folder with config.json, or a name on the hub.
        task: which head it gets.
        labels: number of classes; None: what the config says.

    Raises:
        BackboneError: the config cannot be read, or transformers has no such model for the task.
    """
    import torch
    import transformers

    try:
        extra = {} if labels is None else {"num_labels": labels}
        config = transformers.AutoConfig.from_pretrained(name, **extra)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"cannot read the config of {name!r}: expected a folder with a transformers config.json or a model's name "
            f"on the hub; {first}"
        ) from None
    try:
        with torch.device("meta"):
            model: nn.Module = _model_class(config, task)(config)
    except (ValueError, KeyError) as error:
        raise BackboneError(
            f"transformers cannot build a {config.model_type} model for task {task.value!r}: "
            f"{str(error).splitlines()[0]}; choose another --task"
        ) from None
    return model


def _model_class(config: Any, task: Task) -> Callable[[Any], Any]:
    """What builds the model: the class that the config names, or the auto class of the task."""
    import transformers

    if task is Task.auto:
        for name in getattr(config, "architectures", None) or ():
            named = getattr(transformers, name, None)
            if named is not None:
                return named  # type: ignore[no-any-return]  # transformers is untyped
        task = Task.base
    return getattr(transformers, AUTO_CLASSES[task]).from_config  # type: ignore[no-any-return]  # transformers is untyped


# doctor -------------------------------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices, what is built, and what is missing for what."""
    from peftkit.doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    print(f"peftkit {found.peftkit}, Python {found.python}, {found.system}\n")
    print("packages")
    for package in found.packages:
        kind = "" if package.required else "  (optional)"
        print(f"  {package.name:<20} {package.version or 'missing':<12} {package.needed_for}{kind}")
    print("\ndevices")
    for device in found.devices:
        memory = "" if device.memory_bytes is None else f", {device.memory_bytes / 2**30:.1f} GiB"
        print(f"  {device.name:<8} {device.description}{memory}")
    print(f"  PyTorch uses {found.threads} thread{'s' if found.threads != 1 else ''} for one operation on the CPU")
    print("\ncompiled operations")
    print(f"  {', '.join(found.built) or 'none is built'}")
    if found.third_party_methods:
        print(f"\nmethods registered by other packages\n  {', '.join(found.third_party_methods)}")
    print("\nmissing")
    for line in found.missing:
        print(f"  {line}")


# bench --------------------------------------------------------------------------------------------------------------


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
    engine = _bench_module("engine")
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


if __name__ == "__main__":
    main()
