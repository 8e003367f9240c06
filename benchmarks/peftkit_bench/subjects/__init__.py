"""Who implements the methods that are compared, by name; each in a module of its own, imported on first use."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

from peftkit.errors import nearest
from peftkit_bench.spec import SuiteError

if TYPE_CHECKING:
    from peftkit_bench.spec import Subject

NAMES = ("peftkit", "peft")


@functools.cache
def subject(name: str) -> Subject:
    """The subject of that name, the same one on every call.

    Raises:
        SuiteError: there is none, or the package that it needs is not installed.
    """
    if name == "peftkit":
        from peftkit_bench.subjects.peftkit import PeftkitSubject

        return PeftkitSubject()
    if name == "peft":
        if importlib.util.find_spec("peft") is None:
            raise SuiteError("methods of Hugging Face peft need that package: pip install 'peftkit[compare]'")
        from peftkit_bench.subjects.peft import PeftSubject

        return PeftSubject()
    raise SuiteError(f"no subject {name!r}; {nearest(name, NAMES)}")
