"""Folders of tiny models and adapters, and what merging in memory makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit
from peftkit.testing.backbones import BACKBONES
from peftkit.testing.subject import Subject, perturb

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


def base_folder(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A tiny model in a folder of its own."""
    BACKBONES[name](dtype).save_pretrained(folder / "base", **options)
    return folder / "base"


def adapter_folder(folder: Path, base: Path, config: Any, *, name: str = "adapter", seed: int = 3, noise: float = 0.1):
    """A random adapter for the model in a folder, with the fingerprint of its weights."""
    model = loaded(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peftkit.wrap(model, config)
    perturb(model, seed=seed, noise=noise)
    return peftkit.save(model, folder / name)


def class_of(base: Path) -> Any:
    """The class that a folder's config names."""
    import transformers

    return getattr(transformers, transformers.AutoConfig.from_pretrained(base).architectures[0])


def loaded(base: Path, cls: Any = None) -> nn.Module:
    """The model of a folder, in the dtype that it is stored in."""
    return (cls or class_of(base)).from_pretrained(base, dtype="auto").eval()


def merged_in_memory(folder: Path, base: Path, *adapters: Path, cls: Any = None, **options: Any):
    """The folder that `peftkit.merge` and `save_pretrained` make, and the report."""
    model = loaded(base, cls)
    for number, adapter in enumerate(adapters):
        peftkit.load(model, adapter / f"a{number}" if (adapter / f"a{number}").is_dir() else adapter, name=f"a{number}")
    names = [f"a{number}" for number in range(len(adapters))]
    report = peftkit.merge(model, *names)
    peftkit.merge_and_unload(model).save_pretrained(folder / "memory", **options)
    return folder / "memory", report


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every file with weights."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewritten(base: Path, change: Any) -> None:
    """Gives a folder of one file other tensors: `change` gets them and gives those to store."""
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors", metadata={"format": "pt"})


def subject(method: str, backbone: str, **fields: Any) -> Subject:
    """A method on a tiny model, as the laws take it."""
    chosen = peftkit.METHODS[method]
    return Subject(method=chosen, config=chosen.config(**fields), backbone=BACKBONES[backbone])
