"""What the suite has to know of Hugging Face peft's methods: the field of the size, and what each one needs.

peft declares none of it. Every entry is checked against the installed peft by the tests, method by method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LARGEST = 65536
TOKENS = range(1, 513)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of the projections that a method is to adapt."""

    common: int
    """Greatest common divisor of all input and output features."""
    common_in: int
    """The same of the input features alone."""
    smallest: int
    """Smallest number of input or output features."""
    entries: int
    """Entries of the smallest weight."""
    layers: int
    """Blocks of the model."""

    def divisors(self, low: int = 1, *, of: int | None = None) -> list[int]:
        """Divisors of the common size, ascending, from `low`."""
        whole = self.common if of is None else of
        return [d for d in range(low, whole + 1) if whole % d == 0]

    def fitting(self, wanted: int) -> int:
        """The largest divisor of the common size that is at most `wanted`."""
        return max(d for d in self.divisors() if d <= wanted)


@dataclass(frozen=True, kw_only=True)
class PeftMethod:
    """One method of peft."""

    knob: str | None = None
    """The field that sets the size."""
    values: Callable[[Shapes], Sequence[Any]] = lambda shapes: range(1, LARGEST + 1)
    """Possible values of the knob, from the fewest parameters to the most."""
    with_knob: Callable[[Any], Mapping[str, Any]] = lambda value: {}
    """Fields that go with a value of the knob."""
    fitted: Callable[[Shapes], Mapping[str, Any]] = lambda shapes: {}
    """Defaults for a model on which peft's own cannot work, or which peft has not."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Fields that a suite has to set, with what they are."""
    on_meta: bool = True
    """False: it is built from the values of the weights or of a mask, so it cannot be counted on the meta device."""
    replaces: bool = False
    """Its trained tensors take the place of the backbone's."""
    rewrites: bool = False
    """Attaching it changes the backbone's own weights."""
    task_ids: bool = False
    """Its forward wants the number of a task for each row: always 0 here."""
    untrained: tuple[str, ...] = ()
    """Names of its parameters that are not trained, which peft forgets on the meta device."""
    merges_codes: bool = True
    """False: peft's merge into bitsandbytes' layers gives another function, or a model that cannot be called."""
    not_with: Mapping[str, str] = field(default_factory=dict)
    """Quantizations beside which it does not train, or computes something else, with the reason."""
    refused: str = ""
    """Why it cannot be a contender at all; empty: it can."""


def _from_end(shapes: Shapes) -> Sequence[int]:
    return range(shapes.smallest - 1, 0, -1)


_READS = "it reads the weights, and takes bitsandbytes' codes for them"
_CODES = {"bnb-nf4": _READS, "bnb-int8": _READS}
_FOUR_BITS = {"bnb-nf4": "it reads the weight's shape, which bitsandbytes packs"}
_IN_PLACE = dict.fromkeys(_CODES, "it changes a frozen layer's output in place, which bitsandbytes forbids in training")
_CUT_OFF = dict.fromkeys(_CODES, "no gradient reaches its parameters beside bitsandbytes' layers")
_KIND = dict.fromkeys(_CODES, "it takes torch's own Linear only")
_PROMPT: Mapping[str, Any] = {
    "knob": "num_virtual_tokens",
    "values": lambda shapes: TOKENS,
    "fitted": lambda shapes: {"num_virtual_tokens": 20},
}

METHODS: Mapping[str, PeftMethod] = {
    "adalora": PeftMethod(
        knob="init_r",
        with_knob=lambda value: {"target_r": max(1, round(2 * value / 3))},
        untrained=("ranknum",),
    ),
    "adamss": PeftMethod(knob="subspace_rank", on_meta=False, not_with=_CODES),
    "adaption_prompt": PeftMethod(
        knob="adapter_len",
        values=lambda shapes: TOKENS,
        fitted=lambda shapes: {"adapter_len": 10, "adapter_layers": shapes.layers},
    ),
    "beft": PeftMethod(),
    "boft": PeftMethod(knob="boft_block_size", values=lambda s: s.divisors(2, of=s.common_in)),
    "c3a": PeftMethod(
        not_with=_IN_PLACE,
        knob="block_size",
        values=lambda shapes: shapes.divisors()[::-1],
        fitted=lambda shapes: {"block_size": shapes.fitting(256)},
    ),
    # The first of its tokens stays as it was drawn.
    "cartridge": PeftMethod(**{**_PROMPT, "values": lambda shapes: TOKENS[1:]}),
    "cpt": PeftMethod(needs={"cpt_token_ids": "the tokens of the context that it refines"}),
    "deft": PeftMethod(not_with=_FOUR_BITS, knob="r"),
    "delora": PeftMethod(not_with=_CODES, knob="r"),
    "fourierft": PeftMethod(
        knob="n_frequency",
        values=lambda shapes: range(1, shapes.entries + 1),
        fitted=lambda shapes: {"n_frequency": min(1000, shapes.entries)},
    ),
    "frod": PeftMethod(not_with=_CODES, on_meta=False),
    "glora": PeftMethod(not_with=_KIND, knob="r"),
    "gralora": PeftMethod(not_with=_IN_PLACE, knob="r", values=lambda shapes: range(2, LARGEST + 1, 2)),
    "hira": PeftMethod(knob="r"),
    "hra": PeftMethod(not_with=_CODES, knob="r"),
    "ia3": PeftMethod(),
    "lily": PeftMethod(knob="r"),
    "ln_tuning": PeftMethod(replaces=True),
    "loha": PeftMethod(not_with=_FOUR_BITS, knob="r"),
    "lokr": PeftMethod(not_with=_FOUR_BITS, knob="r"),
    "lora": PeftMethod(knob="r"),
    "miss": PeftMethod(
        knob="r",
        values=lambda shapes: range(1, shapes.smallest + 1),
        fitted=lambda shapes: {"r": min(64, shapes.smallest)},
    ),
    "multitask_prompt_tuning": PeftMethod(
        # As peftkit's prompt tuning: none for the decoder.
        **{**_PROMPT, "fitted": lambda shapes: {"num_virtual_tokens": 20, "num_transformer_submodules": 1}},
        task_ids=True,
    ),
    "oft": PeftMethod(knob="oft_block_size", with_knob=lambda value: {"r": 0}),
    "osf": PeftMethod(not_with=_CODES, knob="effective_rank", values=_from_end, rewrites=True),
    "p_tuning": PeftMethod(**_PROMPT),
    "peanut": PeftMethod(not_with=_CODES, knob="r"),
    "poly": PeftMethod(not_with=_IN_PLACE, knob="r", task_ids=True),
    "prefix_tuning": PeftMethod(**_PROMPT),
    "prompt_tuning": PeftMethod(**_PROMPT),
    "psoft": PeftMethod(
        not_with=_CODES,
        knob="r",
        values=lambda shapes: range(1, shapes.smallest + 1),
        fitted=lambda shapes: {"r": min(32, shapes.smallest)},
    ),
    "pvera": PeftMethod(knob="r", merges_codes=False),
    "randlora": PeftMethod(knob="r", values=_from_end, merges_codes=False),
    "road": PeftMethod(fitted=lambda shapes: {"group_size": shapes.fitting(64)}),
    "shadow": PeftMethod(
        refused="it trains a second network with a loss of its own, which peft adds only where it is given labels"
    ),
    "shira": PeftMethod(
        knob="r",
        values=lambda shapes: range(1, shapes.smallest // 2 + 1),
        fitted=lambda shapes: {"r": min(32, shapes.smallest // 4), "random_seed": 0},
        on_meta=False,
    ),
    "supertuning": PeftMethod(
        not_with=_CODES, knob="sparsity", values=lambda shapes: [round(1 - kept / 1000, 3) for kept in range(1, 250)]
    ),
    "tinylora": PeftMethod(not_with=_CODES, knob="u"),
    "trainable_tokens": PeftMethod(needs={"token_indices": "the ids whose embeddings are trained"}),
    "unilora": PeftMethod(not_with=_CUT_OFF, knob="theta_d_length"),
    "vblora": PeftMethod(
        knob="num_vectors",
        values=lambda shapes: range(2, LARGEST + 1),
        fitted=lambda shapes: {"vector_length": shapes.fitting(256)},
    ),
    "vera": PeftMethod(knob="r"),
    "waveft": PeftMethod(
        knob="n_frequency",
        values=lambda shapes: range(1, shapes.entries + 1),
        fitted=lambda shapes: {"n_frequency": min(2592, shapes.entries)},
    ),
    "xlora": PeftMethod(refused="it mixes LoRA adapters that were trained before, and trains none of its own"),
}
"""By the name of peft's type in lower case."""
