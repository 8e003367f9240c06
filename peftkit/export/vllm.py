"""Writes a LoRA folder for vLLM, after a preflight that refuses what it would ignore or reject."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peftkit import backbones
from peftkit.errors import ConfigError, ExportError
from peftkit.export import destination, peft
from peftkit.export.factors import factors_of
from peftkit.export.result import Export
from peftkit.export.source import Source
from peftkit.quantization import original_class
from peftkit.spec import Attach

VERSION = "0.33"
"""The version of vLLM whose sources the facts in this file are from."""
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that max_lora_rank can have (vllm/config/lora.py, MaxLoRARanks)."""
DEFAULT_RANK = 16
"""The value of max_lora_rank that vLLM starts with (vllm/config/lora.py, LoRAConfig)."""
HEADS = ("score", "classifier")
"""Modules trained whole that vLLM reads (vllm/lora/peft_helper.py, _validate_features)."""
LARGEST_VOCABULARY = 258048
"""Above it, an adapter on the output head is rejected (vllm/lora/layers/logits_processor.py)."""

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_BOTH = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Served:
    """One architecture as vLLM has it."""

    modules: tuple[str, ...]
    """Last names of modules that take adapters: every linear layer by the names before fusing, and the class's own
    `embedding_modules`. A name beyond these ends in an error."""
    blocks: str = r"model\.layers\.\d+\."
    """Where the blocks are. An adapter at another path is accepted and has no effect, for the last name alone is
    checked when it is loaded (vllm/lora/lora_model.py, from_local_checkpoint; vllm/lora/model_manager.py,
    activate_adapter)."""


ARCHITECTURES = {
    "llama": Served((*_PROJECTIONS, *_BOTH)),
    "mistral": Served(_PROJECTIONS),
    "qwen2": Served(_PROJECTIONS),
    "qwen3": Served((*_PROJECTIONS, *_BOTH)),
    "gemma": Served(_PROJECTIONS),
    "gemma2": Served(_PROJECTIONS),
    "gemma3_text": Served(_PROJECTIONS),
    "granite": Served((*_PROJECTIONS, *_BOTH)),
    "phi3": Served((*_FUSED, *_BOTH)),
    "opt": Served(("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), r"model\.decoder\.layers\.\d+\."),
}
"""model_type -> what its class in vllm/model_executor/models declares, of those that have `SupportsLoRA`."""


def write(
    source: Source,
    out: Path,
    *,
    rank: int | None = None,
    error: float | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    max_lora_rank: int | None = None,
) -> Export:
    """Writes a LoRA folder that vLLM serves as it is meant, and gives what is in it.

    Args:
        max_lora_rank: what the server is started with; None: the note says what it needs.

    Raises:
        ExportError: vLLM would reject the adapter, or ignore a part of it; the message has every reason.
        ConfigError: max_lora_rank is no value that vLLM takes.
    """
    if max_lora_rank is not None and max_lora_rank not in RANKS:
        raise ConfigError(f"vLLM takes max_lora_rank {', '.join(map(str, RANKS))}; found {max_lora_rank}")
    destination.check_folder(out, source, overwrite)
    reasons = list(preflight(source))
    if reasons:
        raise ExportError(_refusal(reasons))
    found = list(factors_of(source, rank=rank, error=error, dtype=dtype))
    needed = max(1, *(f.rank for f in found))
    allowed = RANKS[-1] if max_lora_rank is None else max_lora_rank
    if needed > allowed:
        raise ExportError(
            _refusal(
                [
                    f"its rank is {needed}, and vLLM rejects ranks above max_lora_rank, "
                    + ("which is 512 at most" if max_lora_rank is None else f"here {allowed}")
                    + f"; convert it to a smaller one with --rank {allowed}"
                ]
            )
        )
    flag = next(r for r in RANKS if r >= needed)
    notes = [f"start vLLM with --enable-lora --max-lora-rank {flag}"] if flag > DEFAULT_RANK else []
    return peft.write_found(
        source, out, found, target="vllm", dtype=dtype, notes=notes, max_lora_rank=max(flag, DEFAULT_RANK)
    )


def _refusal(reasons: list[str]) -> str:
    listed = "; ".join(reasons) if len(reasons) == 1 else "".join(f"\n  - {r}" for r in reasons)
    return f"vLLM {VERSION} would not serve this adapter as it was trained: {listed}"


def preflight(source: Source) -> Iterator[str]:
    """The reasons for which vLLM would reject the adapter or ignore a part of it, each with the next step."""
    method, planned, model = source.planned.method, source.planned, source.model
    if not method.mergeable or method.attach is Attach.PARAMETERS:
        yield (
            f"{method.name} is no change of projections, and vLLM serves LoRA only: "
            + ("merge it (--to merged) and serve the merged model" if method.mergeable else "serve it with peftkit")
        )
        return
    kind = backbones.model_type(model)
    served = ARCHITECTURES.get(kind)
    if served is None:
        yield (
            f"which modules of {kind or original_class(model).__name__} models take adapters in vLLM is not known "
            f"here ({', '.join(ARCHITECTURES)} are); merge it (--to merged), or export it with --to peft and compare "
            "the served answers with those of peft"
        )
    else:
        yield from _misplaced(source, served)
    yield from _unserved_heads(source)
    if any(s.path.rsplit(".", 1)[-1] == "lm_head" for s in planned.sites):
        vocabulary = max(s.out_features for s in planned.sites if s.path.endswith("lm_head"))
        if vocabulary > LARGEST_VOCABULARY:
            yield (
                f"lm_head has {vocabulary:,} outputs, and vLLM takes adapters there up to {LARGEST_VOCABULARY:,} only; "
                "train without lm_head, or merge it (--to merged)"
            )


def _misplaced(source: Source, served: Served) -> Iterator[str]:
    """Sites that vLLM has no place for, or that it would not find under their path."""
    name = original_class(source.model).__name__
    if not name.endswith(("ForCausalLM", "ForSequenceClassification", "ForTokenClassification")):
        yield (
            f"it was trained on {name}, whose modules have other paths than those of the ForCausalLM class that vLLM "
            "serves, so vLLM would load it and use the base; load the adapter's weights into a ForCausalLM model"
        )
        return
    paths = [s.path for s in source.planned.sites]
    unknown = [p for p in paths if p.rsplit(".", 1)[-1] not in served.modules and p.rsplit(".", 1)[-1] not in HEADS]
    if unknown:
        yield (
            f"{unknown[0]} takes no adapter in vLLM (of {backbones.model_type(source.model)} models "
            f"{', '.join(served.modules)} do); train without it, or merge it (--to merged)"
        )
    outside = [
        p
        for p in paths
        if p not in unknown
        and not re.fullmatch(rf"(?:{served.blocks}[\w.]+|model\.embed_tokens|lm_head|score|classifier)", p)
    ]
    if outside:
        yield (
            f"{outside[0]} is no path of the model that vLLM serves, so vLLM would load the adapter and ignore it "
            f"there; train it on the plain {backbones.model_type(source.model)} model"
        )
    tied = {n for names in backbones.tied(source.model).values() for n in names}
    for path in paths:
        if path.rsplit(".", 1)[-1] in _BOTH and f"{path}.weight" in tied:
            yield (
                f"{path} is tied to another module, and whether vLLM applies an adapter to one of the two is not "
                "known; train without it"
            )


def _unserved_heads(source: Source) -> Iterator[str]:
    """Modules trained whole that vLLM does not read."""
    names = sorted({s.path for s in source.planned.extras})
    if not names:
        return
    others = [n for n in names if n not in HEADS]
    if others:
        yield (
            f"{', '.join(others)} {'was' if len(others) == 1 else 'were'} trained whole (modules_to_save), of which "
            f"vLLM reads {' or '.join(HEADS)} only; merge it (--to merged)"
        )
    elif len(names) > 1:
        yield f"vLLM reads one module that was trained whole, found {', '.join(names)}; merge it (--to merged)"
