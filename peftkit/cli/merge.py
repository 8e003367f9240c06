"""`peftkit merge`: the folder of a merged model, written tensor by tensor, in bounded memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftkit.cli.app import Json, app
from peftkit.errors import ConfigError

if TYPE_CHECKING:
    from peftkit.shards.running import Progress


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="A model's folder: config.json and safetensors.")],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER[=WEIGHT]", help="An adapter's folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    more: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="ADAPTER[=WEIGHT]", help="A further adapter; repeatable."),
    ] = None,
    into: Annotated[str | None, typer.Option("--into", help="bf16, fp16 or fp32; default: as the base is.")] = None,
    max_memory: Annotated[str | None, typer.Option("--max-memory", help="Room for buffers, such as 2GB.")] = None,
    shard_size: Annotated[
        str | None, typer.Option("--shard-size", help="Size of a file at most, such as 5GB; default: the base's files.")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", help="base: take another base than the adapter knows; unexpected: drop tensors."),
    ] = None,
    minimum_effect: Annotated[
        float, typer.Option("--minimum-effect", help="Least share of the change that has to be stored.")
    ] = 0.9,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model folder at OUT.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen and how big it will be.")] = False,
    as_json: Json = False,
) -> None:
    """Fold adapters into a model's folder, tensor by tensor. Interrupted and run again, it goes on where it was."""
    import dataclasses
    import json

    from peftkit.shards import merge_shards, plan_shards

    adapters = weights([adapter, *(more or ())])
    options = {
        "into": into,
        "max_memory": max_memory,
        "shard_size": shard_size,
        "ignore": tuple(ignore or ()),
        "overwrite": overwrite,
    }
    if dry_run:
        plan = plan_shards(base, adapters, out, **options)  # type: ignore[arg-type]  # checked by it
        print(json.dumps({**dataclasses.asdict(plan), "bytes": plan.size}, indent=2) if as_json else plan)
        return
    try:
        with _bar() as progress:
            report = merge_shards(base, adapters, out, **options, minimum_effect=minimum_effect, progress=progress)  # type: ignore[arg-type]  # as above
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it was", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(report.to_json())
        return
    print(str(report).splitlines()[-1])
    print(f"written: {out} (merge_report.json has every parameter)")


def weights(words: list[str]) -> dict[Path, float]:
    """Adapter folders and their weights, from words such as "folder" and "folder=0.5".

    Raises:
        ConfigError: an adapter is given twice, or a weight is no number.
    """
    found: dict[Path, float] = {}
    for word in words:
        folder, equals, number = word.rpartition("=")
        if not equals or Path(word).exists():
            folder, number = word, "1"
        try:
            weight = float(number)
        except ValueError:
            raise ConfigError(f"{word}: expected FOLDER or FOLDER=WEIGHT, such as my-adapter=0.5") from None
        if Path(folder) in found:
            raise ConfigError(f"{folder} is given twice; give it once, with a weight")
        found[Path(folder)] = weight
    return found


@contextmanager
def _bar() -> Iterator[Progress | None]:
    """A bar of bytes, rate and time left on the terminal; nothing where standard error is none."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("merging", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
