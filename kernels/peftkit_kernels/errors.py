"""Errors of the operations.

KernelError(RuntimeError)
├── NotBuilt      compiled code was required, and is not there or cannot run
└── BuildError    a compiler is missing, failed, or took too long
"""

from __future__ import annotations


class KernelError(RuntimeError):
    """Anything that goes wrong with compiled operations on purpose."""


class NotBuilt(KernelError):
    """Compiled code was required (PEFTKIT_NATIVE=require) and is not there, or cannot run here."""


class BuildError(KernelError):
    """A compiler is missing, failed, or took too long; what was built before is still in use."""
