"""Writes a GGUF LoRA for llama.cpp, with every site's scale folded in, as it knows one alpha and each tensor's rank."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftkit import backbones, folder
from peftkit.errors import ExportError
from peftkit.export import destination
from peftkit.export.card import base_hash, card
from peftkit.export.factors import Factors, check_convertible, factors_of, scaled
from peftkit.export.result import Export, SiteExport
from peftkit.export.source import Source
from peftkit.quantization import original_class

if TYPE_CHECKING:
    from gguf import GGUFWriter

FILE = "adapter.gguf"
"""Name of the adapter in an exported folder."""


@dataclass(frozen=True)
class Architecture:
    """One model_type as llama.cpp has it."""

    name: str
    """Member of gguf.MODEL_ARCH."""
    turned: bool = False
    """Whether the converter of the base reorders the rows of q_proj and k_proj, from halves to pairs."""


ARCHITECTURES = {
    "llama": Architecture("LLAMA", turned=True),
    "mistral": Architecture("LLAMA", turned=True),
    "smollm3": Architecture("SMOLLM3", turned=True),
    "granite": Architecture("GRANITE", turned=True),
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "gemma": Architecture("GEMMA"),
    "gemma2": Architecture("GEMMA2"),
    "phi3": Architecture("PHI3"),
    "gpt2": Architecture("GPT2"),
    "starcoder2": Architecture("STARCODER2"),
}
"""model_type -> architecture, of those whose converter in llama.cpp (conversion/, of 2026) changes no weight but by
transposing GPT-2's and reordering the rows of q_proj and k_proj."""


def write(
    source: Source,
    out: Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Export:
    """Writes a GGUF LoRA, as a file that ends in .gguf or in a folder with its card, and gives what is in it.

        h = W x + scale * (alpha / rank) * b (a x),  a (rank, in), b (out, rank)

    where llama.cpp takes alpha once for all tensors and the rank from each b, and scale from the user
    (src/llama-adapter.h, get_scale). Here alpha is the largest rank and each b is multiplied by rank / alpha, so that
    a scale of 1 is the adapter as it was trained.

    Args:
        rank: largest rank of the factors; None: that of the update, which must be low-rank.
        error: largest relative error at a site; None: 0.
        dtype: of the factors.
        overwrite: whether to replace what is there.

    Raises:
        ExportError: llama.cpp cannot apply the adapter or the package gguf is missing.
        CheckpointError: it cannot be written.
    """
    alone = out.suffix == ".gguf"
    if alone:
        destination.check_file(out, overwrite)
    else:
        destination.check_folder(out, source, overwrite)
    names = tensor_names(source)
    found = list(factors_of(source, rank=rank, error=error, dtype=dtype))
    alpha = max(1, *(f.rank for f in found))
    found = [scaled(f, f.rank / alpha) for f in found]
    made = Export(
        path=out,
        target="gguf",
        method=source.planned.method.name,
        dtype=dtype,
        sites=tuple(SiteExport.of(f) for f in found),
        notes=(f"for llama.cpp's {_architecture(source)[0].name.lower()} models, with a scale of 1",),
    )
    if alone:
        destination.write_file(out, lambda path: _write(path, source, found, names, alpha))
        return made
    with tempfile.TemporaryDirectory() as room:
        file = Path(room) / FILE
        _write(file, source, found, names, alpha)
        files = {FILE: file.read_bytes(), folder.CARD: card(source, made, file=FILE)}
    destination.write_folder(out, files, None, source, made)
    return made


def tensor_names(source: Source) -> dict[str, str]:
    """llama.cpp's name of the weight at each site, by its path.

    Raises:
        ExportError: llama.cpp cannot apply the adapter to this model, or has no tensor for a site.
    """
    check_convertible(source)
    if source.planned.extras:
        raise ExportError(
            f"llama.cpp's adapters hold low-rank factors only, and {source.planned.extras[0].path} was trained whole "
            "(modules_to_save). Train with modules_to_save=(), or export with --to merged and convert the model"
        )
    architecture, gguf = _architecture(source)
    blocks = 1 + max((site.layer or 0 for site in source.planned.sites), default=0)
    known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.name), blocks)
    shared = {n: names for names in backbones.tied(source.model).values() for n in names}
    found: dict[str, str] = {}
    for site in source.planned.sites:
        key = f"{site.path}.weight"
        name = known.get_name(key, try_suffixes=(".weight",))
        if name is None:
            raise ExportError(
                f"llama.cpp's {architecture.name.lower()} models have no tensor for {key}. Train without that module, "
                "or export with --to merged and convert the model"
            )
        if key in shared:
            raise ExportError(
                f"{key} is tied to {', '.join(n for n in shared[key] if n != key)}, and llama.cpp, which finds an "
                "adapter by the name of the tensor, would use it for both or for none. Train without that module, or "
                "export with --to merged after untying the weights"
            )
        found[site.path] = name
    return found


def _architecture(source: Source) -> tuple[Architecture, Any]:
    """The architecture in llama.cpp, and the package gguf.

    Raises:
        ExportError: it is not in the table, or the package is not installed.
    """
    kind = backbones.model_type(source.model)
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        raise ExportError(
            f"how llama.cpp stores {kind or original_class(source.model).__name__} models is not known here "
            f"({', '.join(ARCHITECTURES)} are). Export with --to merged and convert the model with llama.cpp's "
            "converter"
        )
    try:
        import gguf
    except ImportError:
        raise ExportError("the package gguf is not installed; pip install 'peftkit[export]'") from None
    return architecture, gguf


def _write(path: Path, source: Source, found: Sequence[Factors], names: dict[str, str], alpha: int) -> None:
    architecture, gguf = _architecture(source)
    writer: GGUFWriter = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[getattr(gguf.MODEL_ARCH, architecture.name)])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        writer.add_name(f"{source.planned.method.title} for {source.base_name or 'an unnamed base'}")
        if source.base_name:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, source.base_name)
        writer.add_string("peftkit.base_hash", base_hash(source.origin))
        for name, tensor in _tensors(source, architecture, found, names):
            _add(writer, gguf, name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _tensors(
    source: Source, architecture: Architecture, found: Sequence[Factors], names: dict[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file by name, as row-major matrices."""
    config = source.model.config
    for factors in found:
        if not factors.rank:  # llama.cpp divides by the rank, and the adapter changes nothing here
            continue
        path, down, up = factors.site.path, factors.down, factors.up
        if architecture.turned and path.endswith((".q_proj", ".k_proj")):
            up = up[paired_rows(up.shape[0], heads(config, path.endswith(".k_proj")))]
        # Rows of the embedding's `a` are looked up by token (src/llama-graph.cpp, build_inp_embd).
        yield f"{names[path]}.lora_a", down.T.contiguous() if factors.site.role == "embedding" else down
        yield f"{names[path]}.lora_b", up.contiguous()


def heads(config: Any, keys: bool) -> int:
    """Attention heads of a model's queries, or of its keys."""
    queries = int(config.num_attention_heads)
    return int(getattr(config, "num_key_value_heads", None) or queries) if keys else queries


def paired_rows(rows: int, count: int) -> Tensor:
    """For each row of llama.cpp's projection, the row of transformers' that it is.

    transformers rotates row i of a head together with row i + half; llama.cpp's llama rotates neighbours, so its
    converter interleaves the two halves of each head.

    Args:
        rows: of the projection.
        count: of heads.
    """
    half = rows // count // 2
    start = torch.arange(count)[:, None, None] * (2 * half)
    return (start + torch.arange(half)[:, None] + half * torch.arange(2)).flatten()


def _add(writer: GGUFWriter, gguf: Any, name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor.numpy())
