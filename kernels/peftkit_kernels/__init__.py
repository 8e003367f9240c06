"""Operations on adapters and frozen weights: plain torch everywhere, compiled code where it was built.

PEFTKIT_NATIVE=off|auto|require chooses: plain torch only, compiled code where it is there (the default), or an error
where it is not.
"""

from peftkit_kernels import dora_scale as _dora_scale
from peftkit_kernels import int8_linear as _int8_linear
from peftkit_kernels import lora_linear as _lora_linear
from peftkit_kernels import merge_lora as _merge_lora
from peftkit_kernels import multi_lora as _multi_lora
from peftkit_kernels import nf4_linear as _nf4_linear
from peftkit_kernels import prefix_attention as _prefix_attention
from peftkit_kernels import quantize_blockwise as _quantize_blockwise
from peftkit_kernels import store_rounded as _store_rounded
from peftkit_kernels._op import Op, Status, status_of
from peftkit_kernels.dora_scale import dora_norms, dora_scale, row_squares
from peftkit_kernels.errors import BuildError, KernelError, NotBuilt
from peftkit_kernels.int8_linear import int8_linear, pack_int8, quantize_rows
from peftkit_kernels.lora_linear import frozen_linear, lora_linear
from peftkit_kernels.merge_lora import Undo, merge_lora_, merge_lora_reversibly_, unmerge_lora_
from peftkit_kernels.multi_lora import Stack, multi_lora, multi_lora_, multi_lora_linear, stacked
from peftkit_kernels.nf4_linear import nf4_linear, nf4_lora_linear
from peftkit_kernels.prefix_attention import prefix_attention
from peftkit_kernels.quantize_blockwise import Nested, Quantized, dequantize_blockwise, quantize_blockwise
from peftkit_kernels.store_rounded import Stored, store_rounded_

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        _merge_lora.OP,
        _store_rounded.OP,
        _lora_linear.OP,
        _dora_scale.OP,
        _quantize_blockwise.OP,
        _nf4_linear.OP,
        _int8_linear.OP,
        _multi_lora.OP,
        _prefix_attention.OP,
    )
}


def status() -> list[Status]:
    """Every operation on every kind of device: built, runnable, and what is missing."""
    return [status_of(op, device) for op in OPS.values() for device in ("cpu", "cuda")]


def has_code(op: str, device: str) -> bool:
    """Whether an operation has code to compile for a kind of device."""
    return device in OPS[op].sources


__all__ = [
    "OPS",
    "BuildError",
    "KernelError",
    "Nested",
    "NotBuilt",
    "Op",
    "Quantized",
    "Stack",
    "Status",
    "Stored",
    "Undo",
    "dequantize_blockwise",
    "dora_norms",
    "dora_scale",
    "frozen_linear",
    "has_code",
    "int8_linear",
    "lora_linear",
    "merge_lora_",
    "merge_lora_reversibly_",
    "multi_lora",
    "multi_lora_",
    "multi_lora_linear",
    "nf4_linear",
    "nf4_lora_linear",
    "pack_int8",
    "prefix_attention",
    "quantize_blockwise",
    "quantize_rows",
    "row_squares",
    "stacked",
    "status",
    "status_of",
    "store_rounded_",
    "unmerge_lora_",
]
