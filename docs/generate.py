"""Writes the generated parts of README.md and docs/: fact tables, the list of methods, the public names, the file map.

    python docs/generate.py            # write
    python docs/generate.py --check    # write nothing; name what is stale and exit 1

A generated part stands between two comments, `<!-- facts -->` and `<!-- /facts -->`; what is around it is written by
hand. What is in it comes from the methods' declarations and from docstrings, never from here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from peftkit_bench import suite
from peftkit_bench.data.files import Files
from peftkit_bench.spec import Contender
from peftkit_bench.tasks import TASKS, task_class

import peftkit
from peftkit.methods import BUILT_IN
from peftkit.spec import Attach, Config, Method

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "methods"
ATTACH = {
    Attach.WEIGHT: "a projection with a weight (Linear, transposed Conv1D)",
    Attach.MODULE: "the inputs and outputs of a sub-layer or block",
    Attach.ATTENTION: "the keys and values of an attention module",
    Attach.INPUT: "the embedded input of a transformer stack",
    Attach.PARAMETERS: "the backbone's own parameters, trained as copies",
}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def yes(value: bool) -> str:
    """A fact as a word."""
    return "yes" if value else "no"


def paper(method: Method) -> str:
    """The paper, linked."""
    if method.paper is None:
        return "none: a baseline"
    found = method.paper
    return f"{found.authors} {found.year}, [{found.title}](https://arxiv.org/abs/{found.arxiv})"


def slots(method: Method) -> str:
    """Where the method attaches when the config names no target."""
    return ", ".join(f"`{slot}`" for slot in method.default_targets) or "all that it can train"


def facts(method: Method) -> str:
    """What a method declares: its facts, then the fields of its config."""
    about = [
        ("name", f"`{method.name}`"),
        ("config", f"`peftkit.{method.config.__name__}`"),
        ("paper", paper(method)),
        ("trains", method.summary),
        ("attaches to", ATTACH[method.attach] + (", and Embedding" if method.embeddings else "")),
        ("default targets", slots(method)),
        ("starts as the base model", yes(method.starts_as_identity)),
        ("merges into the weights", yes(method.mergeable)),
        ("works on a quantized base", yes(method.quantized_base)),
        ("size field, solved by `fit_budget`", f"`{method.knob.field}`" if method.knob else "none"),
        (
            "Hugging Face peft's folder",
            f"`{method.peft.peft_type}`" if method.peft else "peft does not have the method",
        ),
    ]
    own = [f for f in dataclasses.fields(method.config) if f.name not in {g.name for g in dataclasses.fields(Config)}]
    shared = "The fields that every config has are in [api.md](../api.md#fields-of-every-config)."
    fields = f"{fields_table(method.config, own)}\n\n{shared}" if own else f"No fields of its own. {shared}"
    return f"{table(('fact', 'value'), about)}\n\n{fields}"


def fields_table(cls: type[Any], fields: Sequence[dataclasses.Field[Any]]) -> str:
    """Fields of a config with type, default and the docstring under each."""
    documented: dict[str, tuple[str, str]] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            documented.update(field_docs(owner))
    rows = []
    for found in fields:
        kind, text = documented[found.name]
        rows.append((f"`{found.name}`", f"`{kind}`", f"`{found.default!r}`", text))
    return table(("field", "type", "default", "meaning"), rows)


def field_docs(cls: type[Any]) -> dict[str, tuple[str, str]]:
    """Type and docstring of the fields that a class declares itself."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls)))
    body = tree.body[0].body  # type: ignore[attr-defined]  # a class
    found = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = " ".join(str(following.value.value).split())
            found[node.target.id] = (ast.unparse(node.annotation).replace("'", '"'), text)
    return found


def methods_table() -> str:
    """The README's list of methods."""
    rows = [
        (
            f"[`{m.name}`](docs/methods/{m.name}.md)",
            m.title,
            f"[{m.paper.authors} {m.paper.year}](https://arxiv.org/abs/{m.paper.arxiv})" if m.paper else "-",
            m.attach.value,
            yes(m.mergeable),
            yes(m.quantized_base),
            f"`{m.peft.peft_type}`" if m.peft else "-",
        )
        for m in BUILT_IN
    ]
    return table(("name", "method", "paper", "attaches to", "merges", "quantized base", "peft's format"), rows)


def first_sentence(text: str | None) -> str:
    """The first line of a docstring."""
    return (text or "").strip().splitlines()[0].rstrip(":") if text else ""


def public_names() -> str:
    """What `import peftkit` offers, apart from the configs."""
    configs = {m.config.__name__ for m in BUILT_IN}
    rows = []
    for name in sorted(set(peftkit.__all__) - configs, key=lambda name: (name.lower(), name)):
        value = getattr(peftkit, name)
        if inspect.isfunction(value):
            rows.append((f"`{name}{signature(value)}`", first_sentence(inspect.getdoc(value))))
        elif inspect.isclass(value):
            rows.append((f"`{name}`", first_sentence(inspect.getdoc(value))))
        elif name == "METHODS":
            rows.append(("`METHODS`", "Every registered method by name, read-only, third parties' included."))
        else:
            rows.append((f"`{name}`", first_sentence(inspect.getdoc(value))))
    return table(("name", "what comes back"), rows)


def signature(function: Callable[..., Any]) -> str:
    """Parameters without types, which the docstrings give."""
    parts, starred = [], False
    for found in inspect.signature(function).parameters.values():
        if found.kind is found.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        if found.kind is found.VAR_POSITIONAL:
            parts.append(f"*{found.name}")
            starred = True
        elif found.kind is found.VAR_KEYWORD:
            parts.append(f"**{found.name}")
        else:
            parts.append(found.name if found.default is found.empty else f"{found.name}={found.default!r}")
    return f"({', '.join(parts)})"


def configs_table() -> str:
    """The configs by method."""
    rows = [
        (f"`{m.config.__name__}`", f"[{m.name}](methods/{m.name}.md)", first_sentence(m.config.__doc__))
        for m in BUILT_IN
    ]
    return table(("config", "method", "what it says"), rows)


def every_config() -> str:
    """The fields that every config has."""
    return fields_table(Config, dataclasses.fields(Config))


def file_map() -> str:
    """One line for each file of the code: its path and the first line of its docstring."""
    rows = []
    for folder in ("peftkit", "kernels/peftkit_kernels", "benchmarks/peftkit_bench"):
        for path in sorted((ROOT / folder).rglob("*.py"), key=_in_folder_order):
            text = first_sentence(ast.get_docstring(ast.parse(path.read_text())))
            rows.append((f"`{path.relative_to(ROOT).as_posix()}`", text))
    return table(("file", "what it is"), rows)


def _in_folder_order(path: Path) -> tuple[str, bool, str]:
    return path.parent.as_posix(), path.name != "__init__.py", path.name


def comparison_tables() -> dict[str, str]:
    """The keys of a suite, and the columns, metrics and options of each task, for the page on comparing methods."""

    def keys(cls: type[Any]) -> str:
        rows = []
        for found in dataclasses.fields(cls):
            kind, text = field_docs(cls)[found.name]
            value: Any = found.default
            if found.default_factory is not dataclasses.MISSING:
                value = found.default_factory()
            default = "required" if value is dataclasses.MISSING else f"`{value!r}`"
            rows.append((f"`{found.name}`", f"`{kind}`", default, text))
        return table(("key", "type", "default", "meaning"), rows)

    tasks, columns = [task_class(name) for name in TASKS], []
    for task in tasks:
        for each in task.columns:
            also = ", ".join(f"`{name}`" for name in each.also)
            columns.append((f"`{task.name}`", f"`{each.name}`", each.what, yes(each.required), also))
    options = [
        (f"`{task.name}`", f"`{name}`", f"`{default!r}`", field_docs(task)[name][1])
        for task in tasks
        for name, default in ((f.name, f.default) for f in dataclasses.fields(cast(Any, task)))
    ]
    metrics = [(f"`{task.name}`", ", ".join(task.metrics), f"`{task.architecture}`") for task in tasks]
    return {
        "tasks": table(("task", "metrics", "models"), metrics),
        "columns": table(("task", "column", "what stands in it", "required", "also read"), columns),
        "options": table(("task", "option", "default", "meaning"), options),
        "training": keys(suite.Training),
        "tune": keys(suite.Tune),
        "contender": keys(Contender),
        "files": keys(Files),
    }


def filled(text: str, parts: dict[str, str], where: str) -> str:
    """The page with its generated parts replaced.

    Raises:
        ValueError: the page has no place for a part.
    """
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        found = pattern.search(text)
        if found is None:
            raise ValueError(f"{where}: expected <!-- {name} --> and <!-- /{name} -->, each on a line of its own")
        before, after = text[: found.end(1)], text[found.start(2) :]
        text = f"{before}{content}\n{after}"
    return text


def pages() -> dict[Path, str]:
    """Every page that has generated parts, as it should read.

    Raises:
        FileNotFoundError: a registered method has no page.
    """
    wanted: dict[Path, dict[str, str]] = {
        ROOT / "README.md": {"methods": methods_table(), "files": file_map()},
        ROOT / "docs" / "api.md": {"names": public_names(), "configs": configs_table(), "fields": every_config()},
        ROOT / "docs" / "benchmarks.md": comparison_tables(),
    }
    wanted.update({PAGES / f"{m.name}.md": {"facts": facts(m)} for m in BUILT_IN})
    return {path: filled(path.read_text(), parts, path.name) for path, parts in wanted.items()}


def stale() -> list[str]:
    """Paths of pages whose generated parts do not agree with the code."""
    return [path.relative_to(ROOT).as_posix() for path, text in pages().items() if path.read_text() != text]


def main() -> None:
    """Writes the pages, or names the stale ones with --check."""
    names = stale()
    if "--check" in sys.argv[1:]:
        sys.exit(f"stale: {', '.join(names)}; run python docs/generate.py" if names else 0)
    for path, text in pages().items():
        path.write_text(text)
    sys.stdout.write(f"written: {', '.join(names)}\n" if names else "everything was up to date\n")


if __name__ == "__main__":
    main()
