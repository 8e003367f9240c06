"""Who implements the methods that are compared; `SUBJECTS` by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftkit_bench.spec import Subject

NAMES = ("peftkit",)


def subject(name: str) -> Subject:
    """The subject of that name, imported on first use.

    Raises:
        KeyError: there is none.
    """
    from peftkit_bench.subjects.peftkit import PeftkitSubject

    subjects: Mapping[str, Subject] = {"peftkit": PeftkitSubject()}
    return subjects[name]
