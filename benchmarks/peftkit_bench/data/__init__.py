"""Sources of examples by the name that a suite gives; each in a module of its own, imported on first use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftkit_bench.registry import imported

if TYPE_CHECKING:
    from peftkit_bench.data.dataset import Source

SOURCES: Mapping[str, str] = {
    "files": "files:Files",
    "hub": "hub:Hub",
    "docstring-origin": "docstrings:DocstringOrigin",
    "python-tags": "python_tags:PythonTags",
    "python-source": "python_source:PythonSource",
}
"""Module of this package and class by name. Another source is one module, and one entry here."""


def source_class(name: str) -> type[Source]:
    """The class of a source, a frozen dataclass whose fields are its options.

    Raises:
        SuiteError: there is no such source.
    """
    found: type[Source] = imported(SOURCES, name, __name__, "data, source")
    return found
