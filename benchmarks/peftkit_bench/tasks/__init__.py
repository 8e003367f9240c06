"""Tasks by the name that a suite gives; each in a module of its own, imported on first use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftkit_bench.registry import imported

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
    found: type[Task] = imported(TASKS, name, __name__, "task")
    return found
