"""Folding a low-rank update into a weight in place, and taking it out again with every bit restored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peftkit_kernels._op import Function, Op, declare
from peftkit_kernels.errors import KernelError
from peftkit_kernels.merge_lora import reference

_FACTORS = "Tensor down, Tensor up, float scale"


def _no_result(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> None:
    return None


def _fake_residual(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> reference.Residual:
    context = torch.library.get_ctx()
    sizes = [context.new_dynamic_size() for _ in range(3)]
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    kinds = (torch.uint8, torch.int8, bits)
    gaps, codes, escapes = (weight.new_empty(n, dtype=kind) for n, kind in zip(sizes, kinds, strict=True))
    starts = weight.new_empty((3, weight.shape[0] + 1), dtype=torch.int32)
    return gaps, codes, escapes, starts, weight.new_empty(1, dtype=torch.int64)


def _fake_checksum(
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    gaps: Tensor,
    codes: Tensor,
    escapes: Tensor,
    starts: Tensor,
) -> Tensor:
    return weight.new_empty(1, dtype=torch.int64)


OP = declare(
    Op(
        name="merge_lora",
        summary="weight + scale * up @ down in place, rounded once; undone exactly.",
        functions=(
            Function(
                schema=f"merge_lora_(Tensor(a!) weight, {_FACTORS}) -> ()",
                reference=reference.merge_lora_,
                fake=_no_result,
            ),
            Function(
                schema=f"merge_lora_reversibly_(Tensor(a!) weight, {_FACTORS}) "
                "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
                reference=reference.merge_lora_reversibly_,
                fake=_fake_residual,
            ),
            Function(
                schema=f"unmerge_lora_(Tensor(a!) weight, {_FACTORS}, "
                "Tensor gaps, Tensor codes, Tensor escapes, Tensor starts) -> Tensor",
                reference=reference.unmerge_lora_,
                fake=_fake_checksum,
            ),
            Function(
                schema="checksum(Tensor tensor) -> Tensor",
                reference=reference.checksum,
                fake=lambda tensor: tensor.new_empty(1, dtype=torch.int64),
            ),
        ),
        sources={"cpu": "merge_lora.cpp", "cuda": "merge_lora.cu"},
    )
)
_merge, _merge_reversibly, _unmerge, _checksum = OP.functions


@dataclass(frozen=True, kw_only=True)
class Undo:
    """What restores a weight from before a merge, beside the factors: the few elements that subtracting gets wrong."""

    gaps: Tensor
    codes: Tensor
    escapes: Tensor
    starts: Tensor
    before: Tensor
    """Checksum of the weight from before the merge."""
    after: Tensor
    """Checksum of the merged weight."""
    factors: tuple[Tensor, Tensor, float]
    """Checksums of down and up, and the scale."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.gaps, self.codes, self.escapes, self.starts, self.before, self.after))


def _checked(weight: Tensor, down: Tensor, up: Tensor) -> None:
    """Raises ValueError or TypeError unless the three fit together."""
    if weight.dim() != 2 or down.dim() != 2 or up.dim() != 2:
        raise ValueError(
            f"merge_lora: expected matrices, found weight {tuple(weight.shape)}, down {tuple(down.shape)}, "
            f"up {tuple(up.shape)}"
        )
    if (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"merge_lora: expected down (r, in) and up (out, r) for a weight (out, in) = {tuple(weight.shape)}, "
            f"found down {tuple(down.shape)} and up {tuple(up.shape)}"
        )
    for name, tensor in (("weight", weight), ("down", down), ("up", up)):
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise TypeError(f"merge_lora: {name} is {tensor.dtype}; expected float64, float32, bfloat16 or float16")
        if tensor.device != weight.device:
            raise ValueError(
                f"merge_lora: weight is on {weight.device} and {name} on {tensor.device}; move them together"
            )
    if torch.float64 in (weight.dtype, down.dtype, up.dtype) and {weight.dtype, down.dtype, up.dtype} != {
        torch.float64
    }:
        raise TypeError("merge_lora: float64 does not mix with other dtypes; give all three in it, or none")


def _sums(weight: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _checksum(weight), _checksum(down.contiguous()), _checksum(up.contiguous())


@torch.no_grad()
def merge_lora_(weight: Tensor, down: Tensor, up: Tensor, scale: float = 1.0) -> None:
    """Makes weight + scale * up @ down of a weight in place, computed in float32 at the least and rounded once.

    Args:
        weight: (out, in).
        down: (r, in).
        up: (out, r).

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a dtype that is no floating-point type of 2 bytes or more.
    """
    _checked(weight, down, up)
    whole = weight.contiguous()
    _merge(whole, down.contiguous(), up.contiguous(), scale)
    if whole is not weight:
        weight.copy_(whole)


@torch.no_grad()
def merge_lora_reversibly_(weight: Tensor, down: Tensor, up: Tensor, scale: float = 1.0) -> Undo:
    """The same, and what `unmerge_lora_` needs; the arguments and errors of `merge_lora_`.

    A typical update leaves 1 to 5 percent of bfloat16 elements that subtracting it does not bring back; they are kept
    in two bytes each.
    """
    _checked(weight, down, up)
    whole = weight.contiguous()
    gaps, codes, escapes, starts, before = _merge_reversibly(whole, down.contiguous(), up.contiguous(), scale)
    if whole is not weight:
        weight.copy_(whole)
    after, of_down, of_up = _sums(whole, down, up)
    return Undo(
        gaps=gaps,
        codes=codes,
        escapes=escapes,
        starts=starts,
        before=before,
        after=after,
        factors=(of_down, of_up, scale),
    )


@torch.no_grad()
def unmerge_lora_(weight: Tensor, down: Tensor, up: Tensor, undo: Undo) -> None:
    """Restores every bit of the weight from before `merge_lora_reversibly_`, in place.

    Args:
        weight: (out, in), as merged.
        down: (r, in), as merged.
        up: (out, r), as merged.

    Raises:
        KernelError: the weight or a factor has changed since the merge, and nothing was done; or the restored weight
            is not the one from before, because `undo` is damaged.
    """
    _checked(weight, down, up)
    whole = weight.contiguous()
    for name, found, wanted in zip(
        ("the weight", "down", "up"), _sums(whole, down, up), (undo.after, *undo.factors[:2]), strict=True
    ):
        if not torch.equal(found.cpu(), wanted.cpu()):
            raise KernelError(f"unmerge_lora_: {name} has changed since the merge; nothing was done")
    residual = (t.to(weight.device) for t in (undo.gaps, undo.codes, undo.escapes, undo.starts))
    restored = _unmerge(whole, down.contiguous(), up.contiguous(), undo.factors[2], *residual)
    if not torch.equal(restored.cpu(), undo.before.cpu()):
        raise KernelError("unmerge_lora_: the weight is not the one from before the merge; `undo` is damaged")
    if whole is not weight:
        weight.copy_(whole)
