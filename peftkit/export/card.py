"""The model card of an export: method, paper, base and its hash, data, metrics, what was converted, the certificate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from peftkit import backbones
from peftkit.certificate import FILE, MergeReport
from peftkit.export.result import Export
from peftkit.export.source import Source
from peftkit.quantization import original_class

LONGEST_TABLE = 32
"""Weights up to which a card has a row for each."""
_LOAD = {
    "peft": (
        "python",
        "from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, {path})",
    ),
    "vllm": ("", "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={path}"),
    "gguf": ("", "llama-cli -m base.gguf --lora {file}"),
    "merged": (
        "python",
        "import transformers\n\nmodel = transformers.{kind}.from_pretrained({path})",
    ),
}


def card(source: Source, made: Export, *, max_lora_rank: int = 0, file: str = "adapter.gguf") -> bytes:
    """The text of README.md.

    Args:
        max_lora_rank: what vLLM has to be told to allow.
        file: name of the GGUF file.
    """
    method = source.planned.method
    base = source.base_name or original_class(source.model).__name__
    language, code = _LOAD[made.target]
    code = code.format(
        path='"path/to/this/folder"' if language else "path/to/this/folder",
        base=base,
        rank=max_lora_rank,
        file=file,
        kind=original_class(source.model).__name__,
    )
    about = dict(source.origin.get("about", {}))
    parts = [
        "\n".join(_front_matter(source, made)),
        f"# {method.title} for {base}",
        "\n".join(_facts(source, made, base)),
        *_section("Data", about.pop("data", None)),
        *_section("Metrics", about.pop("metrics", None)),
        *_section("Origin", about or None),
        *_conversion(made),
        *_certificate(made.report or source.report),
        f"## Use\n\n```{language}\n{code}\n```",
    ]
    return ("\n\n".join(parts) + "\n").encode()


def _front_matter(source: Source, made: Export) -> Iterator[str]:
    """YAML that model hubs read; a JSON string is a YAML string whatever it holds."""
    yield "---"
    if source.base_name:
        yield f"base_model: {json.dumps(source.base_name)}"
        yield f"base_model_relation: {'finetune' if made.target == 'merged' else 'adapter'}"
    yield f"library_name: {'transformers' if made.target == 'merged' else made.target}"
    task = source.planned.config.task_type or backbones.task_type(source.model)
    if task == "CAUSAL_LM":
        yield "pipeline_tag: text-generation"
    yield "tags:"
    yield from (f"- {tag}" for tag in dict.fromkeys(("peft", "lora", source.planned.method.name)))
    yield "---"


def _facts(source: Source, made: Export, base: str) -> Iterator[str]:
    method, planned = source.planned.method, source.planned
    paper = f" ({method.paper.title}. {method.paper})" if method.paper else ""
    yield f"- method: {method.title}{paper}"
    config = {k: v for k, v in planned.config.to_dict().items() if v is not None and v not in ({}, [])}
    yield f"- config: `{json.dumps(config)}`"
    yield f"- trained parameters: {planned.trainable:,} of {planned.total:,}"
    yield f"- base model: {base} ({original_class(source.model).__name__})"
    yield f"- hash of the base weights: {base_hash(source.origin)}"
    if made.extras:
        yield f"- modules trained whole: {', '.join(made.extras)}"


def base_hash(origin: Mapping[str, Any]) -> str:
    """One hash of the base weights, from the digests of its tensors: "sha256:" and 32 digits; "unknown" without them.

    Two bases of one content have one hash, in whichever order their tensors are stored.
    """
    tensors = origin.get("base", {}).get("tensors")
    if not tensors:
        return "unknown"
    return "sha256:" + hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()[:32]


def _section(title: str, value: Any) -> Iterator[str]:
    if value is None:
        return
    if isinstance(value, Mapping):
        lines = [f"- {key}: {_text(found)}" for key, found in sorted(value.items())]
    elif isinstance(value, list | tuple):
        lines = [f"- {_text(found)}" for found in value]
    else:
        lines = [_text(value)]
    yield f"## {title}\n\n" + "\n".join(lines)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _conversion(made: Export) -> Iterator[str]:
    if not made.sites:
        return
    text = f"## Conversion\n\n{made.summary}."
    if not made.exact and len(made.sites) <= LONGEST_TABLE:
        text += "\n\n| weight | rank | error / update |\n| --- | --- | --- |\n"
        text += "\n".join(f"| `{s.path}` | {s.rank} | {s.error_relative:.2e} |" for s in made.sites)
    if made.notes:
        text += "\n\n" + "\n".join(f"- {note}" for note in made.notes)
    yield text


def _certificate(report: MergeReport | None) -> Iterator[str]:
    if report is not None:
        lines = str(report).splitlines()
        if len(report.sites) > LONGEST_TABLE:
            lines = [lines[-1], f"({FILE} has every parameter)"]
        yield "## Certificate of the merge\n\n```\n" + "\n".join(lines) + "\n```"
