"""The command line itself: its options, how it ends, and the groups that commands register with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from peftkit.errors import PeftkitError

app = typer.Typer(
    name="peftkit",
    help="Parameter-efficient fine-tuning: wrap any model, and report which method is worth its parameters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Compare methods on a suite and report what came out.", no_args_is_help=True)
app.add_typer(bench, name="bench")

WITHOUT_VALUE = {"--ray": "auto"}
"""Options that may stand without a value, and the value that they then have."""

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command line and exits: 0 when it worked, 2 with one message when it could not.

    Args:
        arguments: what follows the program's name; None: this process's.
    """
    try:
        app(args=_completed(sys.argv[1:] if arguments is None else arguments), prog_name="peftkit")
    except PeftkitError as error:
        print(f"peftkit: {error}", file=sys.stderr)
        sys.exit(2)


def _completed(arguments: Sequence[str]) -> list[str]:
    """The arguments with a value after each option that may stand without one."""
    found: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        found.append(argument)
        if argument in WITHOUT_VALUE and following.startswith("-"):
            found.append(WITHOUT_VALUE[argument])
    return found


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from peftkit import __version__

        print(f"peftkit {__version__}")
        raise typer.Exit
