"""What a model folder holds besides weights: what is copied, what is left out and why, the config and the card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from peftkit import checkpoint
from peftkit.certificate import FILE, MergeReport
from peftkit.shards.skeleton import Given
from peftkit.swap import original_class

COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".spm", ".yaml", ".yml")
"""Endings of small files that are copied."""
NAMED = ("license", "licence", "notice", "use_policy", "copying")
"""Beginnings of names that are copied whatever their ending."""
OWN = ("config.json", "readme.md", FILE, "adapter_config.json", "peftkit.json")
"""Files that are not copied because OUT has its own, or that belong to an adapter."""
FOLDERS = ("chat_templates", "additional_chat_templates")
LARGEST = 512 * 1024 * 1024
"""Bytes; a larger file is left out."""
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Small:
    """The files beside the weights."""

    base: Path
    names: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    """Names and reasons."""

    @property
    def size(self) -> int:
        """Bytes of the files that are copied."""
        return sum((self.base / name).stat().st_size for name in self.names)

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Names and bytes of the files that are copied."""
        for name in self.names:
            yield name, (self.base / name).read_bytes()


def small(base: Path) -> Small:
    """What of a model folder is copied, and what is left out."""
    names, left_out = [], []
    for path in sorted(base.iterdir()):
        if path.is_dir():
            if path.name in FOLDERS:
                names += [
                    f"{path.name}/{p.name}" for p in sorted(path.iterdir()) if p.is_file() and p.suffix == ".jinja"
                ]
            elif not path.name.startswith("."):
                left_out.append((f"{path.name}/", "a subfolder"))
            continue
        reason = _reason(path)
        if reason is None:
            names.append(path.name)
        elif reason:
            left_out.append((path.name, reason))
    return Small(base, tuple(names), tuple(left_out))


def _reason(path: Path) -> str | None:
    """Why a file is left out; "" where there is nothing to say; None: it is copied."""
    name = path.name.lower()
    if not path.is_file() or name.startswith(".") or name in OWN:
        return ""
    if name.endswith(".index.json"):
        return "" if ".safetensors" in name else "the index of other weights"
    if name.startswith("model") and name.endswith(".safetensors"):
        return ""
    if name.endswith(".py"):
        return "code, which is never taken over"
    if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt", ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")):
        return "weights in another form, which the merge does not change"
    if path.stat().st_size > LARGEST:
        return "too large for a file beside weights"
    known = name.endswith(COPIED) or name.startswith(NAMED)
    return None if known else "no file that a model is loaded from"


def config(raw: bytes, model: nn.Module, into: str | None) -> bytes:
    """The base's config.json, with the class, the labels and the dtype of the merged model where they differ."""
    fields: dict[str, Any] = json.loads(raw)
    before = json.dumps(fields)
    name = original_class(model).__name__
    if fields.get("architectures") and name not in fields["architectures"]:
        fields["architectures"] = [name]
        own = getattr(model, "config", None)
        if own is not None and getattr(own, "id2label", None) and "For" in name and "LM" not in name:
            fields["id2label"] = {str(k): v for k, v in own.id2label.items()}
            fields["label2id"] = dict(own.label2id)
    own = getattr(model, "config", None)
    labels = getattr(own, "num_labels", None)
    if "id2label" in fields and labels is not None and len(fields["id2label"]) != labels:
        fields["id2label"] = {str(k): v for k, v in own.id2label.items()}  # type: ignore[union-attr]  # it has labels
        fields["label2id"] = dict(own.label2id)  # type: ignore[union-attr]  # it has labels
    if into is not None:
        _set_dtype(fields, DTYPE_NAMES[into])
        fields.setdefault("dtype", DTYPE_NAMES[into])
    if json.dumps(fields) == before:
        return raw
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


def _set_dtype(fields: dict[str, Any], dtype: str) -> None:
    for key, value in fields.items():
        if key in ("dtype", "torch_dtype"):
            fields[key] = dtype
        elif key.endswith("_config") and isinstance(value, dict):
            _set_dtype(value, dtype)


def card(base: Path, model: nn.Module, given: Sequence[Given], report: MergeReport, into: str | None) -> str:
    """A model card: what was merged into what, and what of it is kept."""
    tags = sorted({g.planned.method.name for g in given if g.planned is not None})
    lines = ["---", "tags:", "- peftkit", "- merge", *(f"- {tag}" for tag in tags), "---", ""]
    lines += [f"# {base.resolve().name} with {', '.join(g.label for g in given)} merged in", ""]
    lines.append(f"- model: {original_class(model).__name__}, loads like its base, without peftkit")
    lines.append(f"- base: {base.resolve().name}")
    for adapter in given:
        assert adapter.planned is not None
        method = adapter.planned.method
        paper = f" ({method.paper})" if method.paper else ""
        lines.append(f"- adapter: {adapter.label}, {method.title}{paper}")
        about = checkpoint.provenance(adapter.path).get("about")
        if isinstance(about, dict):
            lines += [f"  - {key}: {json.dumps(value)}" for key, value in sorted(about.items())]
    lines.append(f"- stored as: {DTYPE_NAMES[into] if into else 'in the dtype of each weight of the base'}")
    lines.append(
        f"- certificate ({FILE}): {len(report.sites)} parameters changed, least effect kept "
        f"{report.effect_kept:.4f}, in "
        f"total {report.total_effect:.4f}; largest error {report.error_relative:.2e} of the change"
    )
    return "\n".join(lines) + "\n"
