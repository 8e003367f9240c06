"""When AdaLoRA's budget shrinks, where a suite does not say: the same for every implementation of it."""

from __future__ import annotations


def allocation(steps: int, tinit: int, tfinal: int) -> tuple[int, int]:
    """Steps before the budget begins to shrink, and steps at the end in which it stays.

    Both 0, the default of peftkit and of peft, would prune from the first step on and train nothing that is pruned last
    afterwards. An eighth and a half of the run stand for them: about what the paper uses on GLUE (Zhang et al. 2023,
    arXiv:2303.10512, appendix). Anything else is taken as it is.

    Args:
        steps: optimizer steps of the whole run.
        tinit: of the config.
        tfinal: of the config.
    """
    return (steps // 8, steps // 2) if tinit == tfinal == 0 else (tinit, tfinal)
