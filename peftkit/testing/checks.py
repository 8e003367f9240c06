"""checks(method): the laws that a method has to keep, generated from what it declares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from peftkit.errors import StateError
from peftkit.spec import Method
from peftkit.testing import forward, lifecycle, planning, quantized
from peftkit.testing.backbones import Backbone
from peftkit.testing.subject import Subject, registered


def _always(method: Method, config: Any) -> bool:
    return True


@dataclass(frozen=True)
class Law:
    """One law: the function that checks it, the methods that it holds for, the backbones that it can be seen on."""

    check: Callable[[Subject], None]
    when: Callable[[Method, Any], bool] = _always
    requires: frozenset[str] = field(default_factory=frozenset)


LAWS: tuple[Law, ...] = (
    Law(planning.check_declaration_is_complete),
    Law(planning.check_count_matches_plan),
    Law(planning.check_plan_touches_nothing),
    Law(planning.check_meta_device_agrees),
    Law(planning.check_budget_is_kept_and_used, lambda method, config: method.knob is not None),
    Law(lifecycle.check_only_declared_parameters_train),
    Law(lifecycle.check_training_step),
    Law(lifecycle.check_initialisation_is_seeded),
    Law(lifecycle.check_unwrap_restores_every_bit),
    Law(lifecycle.check_state_dict_keeps_base),
    Law(lifecycle.check_save_and_load),
    Law(lifecycle.check_copies_are_independent),
    Law(lifecycle.check_two_adapters_are_independent),
    Law(forward.check_starts_as_identity),
    Law(forward.check_adapter_has_effect),
    Law(forward.check_new_values_are_seen),
    Law(forward.check_disabled_equals_base),
    Law(forward.check_merge_matches_forward, lambda method, config: method.mergeable),
    Law(forward.check_merge_restores_every_bit, lambda method, config: method.mergeable),
    Law(forward.check_merge_is_refused, lambda method, config: not method.mergeable),
    Law(
        forward.check_rows_match_their_adapters,
        lambda method, config: method.per_row,
        requires=frozenset({"rows"}),
    ),
    Law(forward.check_modes),
    Law(forward.check_dropout, lambda method, config: bool(forward.dropout_fields(config))),
    Law(forward.check_low_precision_base),
    Law(quantized.check_quantized_base, lambda method, config: method.quantized_base),
    Law(quantized.check_quantized_base_is_refused, lambda method, config: not method.quantized_base),
    Law(forward.check_autocast),
    Law(forward.check_inference_mode_leaves_no_trace),
    Law(forward.check_compile),
    Law(forward.check_gradient_checkpointing, requires=frozenset({"checkpointing"})),
    Law(forward.check_padding_is_invisible, requires=frozenset({"text"})),
    Law(forward.check_generation_matches_forward, requires=frozenset({"generate"})),
    Law(forward.check_generation_ignores_padding, requires=frozenset({"generate", "causal"})),
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One law for one method and config; called with a backbone, it raises AssertionError where the law is broken."""

    name: str
    """Such as "check_merge_matches_forward"."""
    method: Method
    config: Any
    law: Law

    @property
    def states(self) -> str:
        """The law in one sentence."""
        return (self.law.check.__doc__ or "").strip().splitlines()[0]

    def applies(self, backbone: Backbone) -> bool:
        """Whether the law can be seen on the backbone: one about `generate` needs a model that generates."""
        return self.law.requires <= backbone.features

    def __call__(self, backbone: Backbone) -> None:
        """Checks the law.

        Raises:
            AssertionError: the law is broken; the message says by how much and where.
            Refused: the method refuses the backbone by TargetError or BackboneError, and names itself or the model.
        """
        if not self.applies(backbone):
            needs = ", ".join(sorted(self.law.requires - backbone.features))
            raise ValueError(f"{self.name} needs a backbone with {needs}; {backbone.name} has not")
        with registered(self.method):
            self.law.check(Subject(method=self.method, config=self.config, backbone=backbone))

    def __str__(self) -> str:
        return f"{self.method.name}-{self.name}"


def checks(method: Method, config: Any = None, *, starts_as_identity: bool | None = None) -> tuple[Check, ...]:
    """The checks that the method's declarations call for.

    Args:
        method: registered or not; while a check runs it is.
        config: the config to check with; None: the method's default.
        starts_as_identity: whether this config starts so, where it differs from what the method declares.

    Raises:
        StateError: Python was started with -O.
    """
    if not __debug__:
        raise StateError("python -O removes the assertions that the checks consist of; run without it")
    chosen = method.config() if config is None else config
    identity = method.starts_as_identity if starts_as_identity is None else starts_as_identity
    return tuple(
        Check(name=law.check.__name__, method=method, config=chosen, law=law)
        for law in LAWS
        if (identity if law.check is forward.check_starts_as_identity else law.when(method, chosen))
    )
