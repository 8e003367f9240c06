"""What a saved adapter holds."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import safe_open


def stored_parameters(folder: Path) -> int:
    """Number of floating-point values in the safetensors files of a folder; indices and masks are no parameters."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118  # no mapping
                view = stored.get_slice(key)
                if view.get_dtype().startswith(("F", "BF")):
                    total += math.prod(view.get_shape())
    return total
