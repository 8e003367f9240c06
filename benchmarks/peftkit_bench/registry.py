"""Names to classes that are imported when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from peftkit.errors import nearest
from peftkit_bench.spec import SuiteError


def imported(names: Mapping[str, str], name: str, package: str, where: str) -> Any:
    """The class that a name stands for.

    Args:
        names: "module:Class" by name.
        package: the modules are in it.
        where: the place in a suite, for the message.

    Raises:
        SuiteError: there is no such name.
    """
    if name not in names:
        raise SuiteError(f"{where}: {nearest(name, names)}")
    module, _, cls = names[name].partition(":")
    return getattr(importlib.import_module(f"{package}.{module}"), cls)
