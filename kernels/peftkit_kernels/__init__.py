"""Operations on adapters and frozen weights: plain torch everywhere, compiled code where it was built.

PEFTKIT_NATIVE=off|auto|require chooses: plain torch only, compiled code where it is there (the default), or an error
where it is not.
"""

from peftkit_kernels import merge_lora as _merge_lora
from peftkit_kernels import store_rounded as _store_rounded
from peftkit_kernels._op import Op, Status, status_of
from peftkit_kernels.errors import BuildError, KernelError, NotBuilt
from peftkit_kernels.merge_lora import Undo, merge_lora_, merge_lora_reversibly_, unmerge_lora_
from peftkit_kernels.store_rounded import Stored, store_rounded_

OPS: dict[str, Op] = {op.name: op for op in (_merge_lora.OP, _store_rounded.OP)}


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
    "NotBuilt",
    "Op",
    "Status",
    "Stored",
    "Undo",
    "has_code",
    "merge_lora_",
    "merge_lora_reversibly_",
    "status",
    "status_of",
    "store_rounded_",
    "unmerge_lora_",
]
