"""`peftkit methods`: what is registered, and what it declares."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from peftkit.cli.app import Json, app
from peftkit.cli.console import table, yes

if TYPE_CHECKING:
    from peftkit.spec import Method


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
            yes(fact["mergeable"]),
            yes(fact["quantized_base"]),
            ", ".join(fact["default_targets"]) or "-",
            fact["peft_type"] or "-",
        )
        for fact in found
    ]
    table(headings, rows)
