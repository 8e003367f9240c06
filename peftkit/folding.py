"""What a module's parameters become when adapters are folded into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from peftkit.errors import MergeError
from peftkit.spec import Adapter


def folded(
    path: str, adapters: Sequence[Adapter], base: Mapping[str, Tensor], turn: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    """The parameters that compute base and adapters in one, where they differ from the base.

    Args:
        path: of the module, for messages.
        adapters: inner ones first.
        base: parameters by name in float32 (float64 stays), weights of projections as (out, in).
        turn: (name, tensor) between (out, in) and the orientation in which the parameter is stored.

    Returns:
        Parameters as `base` has them; not yet rounded to the stored dtype.

    Raises:
        MergeError: an adapter cannot be folded into these parameters, or not after another one.
    """
    meant = dict(base)
    for position, adapter in enumerate(adapters):
        if position and adapter.reads_weight:
            raise MergeError(
                f"{path}: {type(adapter).__name__} reads the weight beneath it, which another adapter would have "
                "changed; merge it first in the list of adapters, or alone"
            )
        shown = {n: turn(n, v) for n, v in meant.items()} if adapter.raw else meant
        try:
            new = adapter.merged(shown)
        except MergeError as error:
            raise MergeError(f"{path}: {error}") from None
        meant.update({n: turn(n, v) for n, v in new.items()} if adapter.raw else new)
    return {n: v for n, v in meant.items() if v is not base[n]}


def trained_whole(name: str, adapters: Sequence[Adapter]) -> bool:
    """Whether all that changes a parameter is a trained copy of it."""
    return all(adapter.raw and name in adapter.replaces for adapter in adapters)
