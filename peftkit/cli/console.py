"""What several commands print with."""

from __future__ import annotations

from collections.abc import Sequence


def yes(value: bool) -> str:
    """The word for a declared fact."""
    return "yes" if value else "no"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
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
