"""Tasks by the name that a suite gives; each in a module of its own, imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftkit.errors import nearest
from peftkit_bench.spec import SuiteError

if TYPE_CHECKING:
    from peftkit_bench.tasks.contract import Task

TASKS: Mapping[str, str] = {
    "seq-cls": "sequence_classification:SequenceClassification",
    "token-cls": "token_classification:TokenClassification",
    "qa": "question_answering:QuestionAnswering",
    "causal-lm": "causal_lm:CausalLM",
    "seq2seq": "sequence_to_sequence:SequenceToSequence",
}
"""Module of this package and class by name. Another task is one module, and one entry here."""


def task_class(name: str) -> type[Task]:
    """The class of a task, a frozen dataclass whose fields are its options.

    Raises:
        SuiteError: there is no such task.
    """
    if name not in TASKS:
        raise SuiteError(f"task: {nearest(name, TASKS)}")
    module, _, cls = TASKS[name].partition(":")
    found: type[Task] = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    return found
