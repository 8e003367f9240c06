"""Everything peftkit raises on purpose.

PeftkitError
├── ConfigError (TypeError, ValueError)   a field that does not exist, a value out of range, fields that contradict
├── TargetError (ValueError)              a pattern that matches nothing, a module that a method cannot attach to
├── BackboneError (ValueError)            an architecture whose facts a method needs and does not find
├── StateError (RuntimeError)             a verb in the wrong order: merge twice, unwrap a model that is not wrapped
├── MergeError (RuntimeError)             a merge refused; the model is as it was
├── CheckpointError (ValueError)          an adapter folder that cannot be read, or does not fit the model
│   └── BaseMismatchError                 the base weights are not those that the adapter was trained on
├── ExportError (ValueError)              an export that its reader would reject, or read as something else
└── TrainingError (RuntimeError)          training hooks that were never driven, or driven without what they need

Every message says what was expected, what was found, where, and the next step.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftkitError(Exception):
    """The root of every exception that peftkit raises on purpose."""


class ConfigError(PeftkitError, TypeError, ValueError):
    """A configuration that cannot be meant."""


class TargetError(PeftkitError, ValueError):
    """A target that matches nothing, or that the method cannot attach to."""


class BackboneError(PeftkitError, ValueError):
    """An architecture about which a needed fact is missing."""


class StateError(PeftkitError, RuntimeError):
    """A verb called on a model in the wrong state."""


class MergeError(PeftkitError, RuntimeError):
    """A merge that was refused; the model is left as it was."""


class CheckpointError(PeftkitError, ValueError):
    """An adapter folder that cannot be read or does not fit."""


class BaseMismatchError(CheckpointError):
    """The base weights are not those that the adapter was trained on."""


class ExportError(PeftkitError, ValueError):
    """An export that was refused because its reader would reject it or read something else; nothing was written."""


class TrainingError(PeftkitError, RuntimeError):
    """A training loop that did not do what the method needs."""


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """A phrase that names the choices nearest to a misspelt name, or all of them when few.

    Returns:
        "did you mean 'a' or 'b'?", or "choices: a, b, c" when nothing is near.
    """
    known = sorted(set(choices))
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    return f"choices: {shown}" if known else "there is nothing to choose from"
