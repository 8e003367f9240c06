"""`peftkit plan`: where a method would attach, and how many parameters it would train."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftkit.cli.app import Json, app
from peftkit.cli.skeleton import Task, load_skeleton
from peftkit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from peftkit.plan import Plan


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
