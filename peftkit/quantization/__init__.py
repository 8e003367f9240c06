"""How the parameters of a module are read and written, whatever their storage. One file a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from peftkit.errors import MergeError
from peftkit.quantization.plain import PlainWeights

if TYPE_CHECKING:
    from peftkit_kernels import Stored


class BaseWeights(Protocol):
    """The parameters of one module, readable and perhaps writable."""

    can_write: bool

    def read(self) -> dict[str, Tensor]:
        """Parameters by name in float32 (float64 stays), weights of projections as (out, in). Copies."""
        ...

    def store(self, name: str, value: Tensor) -> Stored:
        """Writes a parameter, given as `read` gives it, rounded once to its stored dtype, in place.

        Returns:
            What of the change is stored.
        """
        ...

    def turn(self, name: str, value: Tensor) -> Tensor:
        """Between (out, in) and the orientation in which the parameter is stored; its own inverse."""
        ...

    def stored(self) -> dict[str, Tensor]:
        """The tensors as they are stored, for a backup. Not copies."""
        ...


def weights_of(module: nn.Module) -> BaseWeights:
    """Access to the module's own parameters.

    Raises:
        MergeError: the module stores its weight in a way that no backend here knows.
    """
    for parameter in module.parameters(recurse=False):
        if parameter.is_meta:
            raise MergeError(
                f"a weight of {type(module).__name__} is on the meta device: offloaded, or never loaded; load the base "
                "model without offloading to merge"
            )
        if not parameter.is_floating_point():
            raise MergeError(
                f"{type(module).__name__} stores its weight as {parameter.dtype}, which no backend of this version can "
                "read; load the base model in bfloat16, float16 or float32 to merge"
            )
    return PlainWeights(module)


__all__ = ["BaseWeights", "PlainWeights", "weights_of"]
