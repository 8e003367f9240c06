"""Attention over a learned prefix that the whole batch shares and over each row's own keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peftkit_kernels._op import Function, Op, declare
from peftkit_kernels.prefix_attention import parts, reference

FEW = 16
"""Up to how many queries of one key head, group and queries together, the compiled CPU code takes."""
FOLDED_QUERIES = 32
"""Up to how many of them a bias is repeated, so that they make one product."""
JOINED_QUERIES, JOINED_TOKENS = 64, 768
"""From how many of them on a CPU copies keys rather than reads them in two parts, as long as there are fewer tokens or
no causal half to be skipped: the copies cost little beside the products then."""


def _fake_merge(first: Tensor, first_sums: Tensor, second: Tensor, second_sums: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, group, queries, width = first.shape
    return first.new_empty((batch, queries, heads, group, width)), first_sums.new_empty(first_sums.shape)


def _fake_few(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=wide)


OP = declare(
    Op(
        name="prefix_attention",
        summary="Attention over a shared prefix and each row's own keys, merged by their denominators.",
        functions=(
            Function(
                schema="prefix_attention_merge(Tensor first, Tensor first_sums, Tensor second, Tensor second_sums) "
                "-> (Tensor, Tensor)",
                reference=reference.merge,
                fake=_fake_merge,
            ),
            Function(
                schema="prefix_attention_few(Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor key, "
                "Tensor value, Tensor? bias, float scale) -> (Tensor, Tensor)",
                reference=reference.few,
                fake=_fake_few,
                devices=("cpu",),
            ),
        ),
        sources={"cpu": "prefix_attention.cpp", "cuda": "prefix_attention.cu"},
    )
)
_merge, _few = OP.functions
_FEW_IS_COMPILED = OP.compiled_for("cpu")
"""Without compiled code torch's fused kernels do better than the definition."""


def _checked(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> None:
    """Raises ValueError or TypeError unless everything fits together."""
    if query.dim() != 4 or key.dim() != 4 or prefix_key.dim() != 3:
        raise ValueError(
            "prefix_attention: expected query (batch, heads, queries, head_dim), key (batch, heads_kv, tokens, "
            f"head_dim) and prefix_key (heads_kv, prefix, head_dim), found {tuple(query.shape)}, {tuple(key.shape)} "
            f"and {tuple(prefix_key.shape)}"
        )
    if value.shape != key.shape or prefix_value.shape != prefix_key.shape:
        raise ValueError(
            f"prefix_attention: expected values of the shape of the keys, found value {tuple(value.shape)} beside key "
            f"{tuple(key.shape)}, prefix_value {tuple(prefix_value.shape)} beside prefix_key {tuple(prefix_key.shape)}"
        )
    batch, heads, queries, width = query.shape
    heads_kv = key.shape[1]
    if (key.shape[0], key.shape[3], prefix_key.shape[0], prefix_key.shape[2]) != (batch, width, heads_kv, width):
        raise ValueError(
            f"prefix_attention: expected one batch, heads_kv and head_dim, found query {tuple(query.shape)}, key "
            f"{tuple(key.shape)} and prefix_key {tuple(prefix_key.shape)}"
        )
    if heads_kv == 0 or heads % heads_kv or width == 0:
        raise ValueError(
            f"prefix_attention: expected heads to be a multiple of heads_kv and head_dim of 1 or more, found {heads} "
            f"heads, {heads_kv} heads_kv and head_dim {width}"
        )
    if causal and key.shape[2] != queries:
        raise ValueError(
            f"prefix_attention: causal is for as many tokens as queries, found {key.shape[2]} tokens and {queries} "
            "queries; give a mask that says which tokens a query sees"
        )
    if key.shape[2] + prefix_key.shape[1] == 0:
        raise ValueError("prefix_attention: there is no key, neither in the prefix nor beside it")
    tensors = {"key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value}
    for name, tensor in {"query": query, **tensors}.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise TypeError(
                f"prefix_attention: {name} is {tensor.dtype}; expected float64, float32, bfloat16 or float16"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"prefix_attention: query is on {query.device} and {name} on {tensor.device}; move them together"
            )
    if (key.dtype, value.dtype) != (query.dtype, query.dtype):
        raise TypeError(
            f"prefix_attention: query is {query.dtype}, key {key.dtype} and value {value.dtype}; give them in one dtype"
        )
    if mask is None:
        return
    wanted = (batch, heads, queries, key.shape[2])
    if mask.dim() != 4 or any(found not in (1, whole) for found, whole in zip(mask.shape, wanted, strict=True)):
        raise ValueError(
            f"prefix_attention: expected a mask (batch or 1, heads or 1, queries or 1, tokens or 1) for {wanted}, "
            f"which leaves the prefix out, found {tuple(mask.shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"prefix_attention: mask is {mask.dtype}; expected bool, True where seen, or an additive one")
    if mask.device != query.device:
        raise ValueError(f"prefix_attention: query is on {query.device} and mask on {mask.device}; move them together")
    if causal:
        raise ValueError("prefix_attention: expected causal or a mask, found both; put the one into the other")
    if mask.requires_grad:
        raise ValueError("prefix_attention: the mask wants a gradient and gets none; detach it")


def _bias(mask: Tensor | None, query: Tensor, tokens: int) -> Tensor | None:
    """The mask as a finite additive one: torch's kernel gives no denominator where all keys are at minus infinity."""
    if mask is None:
        return None
    lowest = torch.finfo(query.dtype).min
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, lowest)
    else:
        bias = mask.to(query.dtype).clamp(min=lowest)
    return bias if bias.shape[-1] == tokens else bias.expand(*bias.shape[:-1], tokens)


class _Layout:
    """How queries go to the two parts: with the group of a key head, and for the prefix the batch too, as queries.

    Each key and value is then read once for all queries that see it, and the products are as large as can be.
    """

    def __init__(self, query: Tensor, heads_kv: int, bias: Tensor | None, causal: bool) -> None:
        self.batch, self.heads, self.queries, self.width = query.shape
        self.heads_kv = heads_kv
        self.group = self.heads // heads_kv
        few = bias is None or self.queries == 1 or self.group * self.queries <= FOLDED_QUERIES
        self.folds = not causal and few

    def to_prefix(self, tensor: Tensor) -> Tensor:
        """(batch, heads, queries, ...) -> (1, heads_kv, group * batch * queries, ...)."""
        split: Tensor = tensor.unflatten(1, (self.heads_kv, self.group))
        return split.transpose(0, 1).transpose(1, 2).flatten(1, 3)[None]

    def from_prefix(self, tensor: Tensor) -> Tensor:
        """(1, heads_kv, group * batch * queries, ...) -> (batch, heads_kv, group, queries, ...)."""
        split: Tensor = tensor[0].unflatten(1, (self.group, self.batch, self.queries))
        return split.transpose(1, 2).transpose(0, 1)

    def to_own(self, tensor: Tensor) -> Tensor:
        """(batch, heads, queries, ...) -> (batch, heads_kv, group * queries, ...), or as it is."""
        split: Tensor = tensor.unflatten(1, (self.heads_kv, self.group))
        return split.flatten(2, 3) if self.folds else tensor

    def from_own(self, tensor: Tensor) -> Tensor:
        """The other way, (batch, heads_kv, group, queries, ...)."""
        place, sizes = (2, (self.group, self.queries)) if self.folds else (1, (self.heads_kv, self.group))
        split: Tensor = tensor.unflatten(place, sizes)
        return split

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """What is added to the scores of `to_own`."""
        if bias is None or not self.folds:
            return bias
        if bias.shape[1] == 1 and bias.shape[2] == 1:
            return bias
        heads = bias.shape[1] if bias.shape[1] == 1 else self.heads_kv
        split: Tensor = bias.unflatten(1, (heads, -1))
        whole = split.expand(-1, -1, self.group, self.queries, -1)
        return whole.flatten(2, 3)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Tensor:
        out, sums = _forward(query, prefix_key, prefix_value, key, value, bias, causal, scale)
        ctx.save_for_backward(query, prefix_key, prefix_value, key, value, bias, out, sums)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, prefix_key, prefix_value, key, value, bias, out, sums = ctx.saved_tensors
        layout = _Layout(query, key.shape[1], bias, ctx.causal)
        beside = parts.Options(bias=None, causal=False, scale=ctx.scale)
        own = parts.Options(bias=layout.bias(bias), causal=ctx.causal, scale=ctx.scale)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        of_query: Tensor | None = None
        of_prefix: tuple[Tensor, Tensor] = (torch.zeros_like(prefix_key), torch.zeros_like(prefix_value))
        of_own: tuple[Tensor, Tensor] = (torch.zeros_like(key), torch.zeros_like(value))
        if prefix_key.shape[1]:
            to = layout.to_prefix
            found = parts.backward(
                to(grad), to(query), prefix_key[None], prefix_value[None], to(out), to(sums).contiguous(), beside
            )
            of_query = layout.from_prefix(found[0]).flatten(1, 2)
            of_prefix = (found[1][0], found[2][0])
        if key.shape[2]:
            to = layout.to_own
            found = parts.backward(to(grad), to(query), key, value, to(out), to(sums).contiguous(), own)
            own_query = layout.from_own(found[0]).flatten(1, 2)
            of_query = own_query if of_query is None else of_query + own_query
            of_own = (found[1], found[2])
        return (of_query, *of_prefix, *of_own, None, None, None)


def _forward(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithms of the denominators, (batch, heads, queries)."""
    layout = _Layout(query, key.shape[1], bias, causal)
    rows, tokens, prefix = layout.group * layout.queries, key.shape[2], prefix_key.shape[1]
    on_cpu = query.device.type == "cpu"
    if on_cpu and layout.folds and rows <= FEW and _FEW_IS_COMPILED and query.dtype != torch.float64:
        out, sums = _few(layout.to_own(query), prefix_key, prefix_value, key, value, layout.bias(bias), scale)
        return _in_order(layout.from_own(out)), layout.from_own(sums).flatten(1, 2)
    if on_cpu and prefix and tokens and rows >= JOINED_QUERIES and not (causal and tokens >= JOINED_TOKENS):
        return _joined(query, prefix_key, prefix_value, key, value, bias, causal, scale)
    beside = parts.Options(bias=None, causal=False, scale=scale)
    own = parts.Options(bias=layout.bias(bias), causal=causal, scale=scale)
    first = second = None
    if prefix:
        first = parts.forward(layout.to_prefix(query), prefix_key[None], prefix_value[None], beside)
    if tokens:
        second = parts.forward(layout.to_own(query), key, value, own)
    if first is not None and second is not None:
        out, sums = _merge(*map(layout.from_prefix, first), *map(layout.from_own, second))
        return out.flatten(2, 3).transpose(1, 2), sums.flatten(1, 2)
    if second is not None:
        out, sums = (layout.from_own(t) for t in second)
    else:
        assert first is not None
        out, sums = (layout.from_prefix(t) for t in first)
    return _in_order(out), sums.flatten(1, 2)


def _in_order(out: Tensor) -> Tensor:
    """(batch, heads_kv, group, queries, head_dim) -> (batch, heads, queries, head_dim), contiguous transposed(1, 2)."""
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous().transpose(1, 2)


def _joined(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same from copies of the keys and values, all in one part."""
    batch, queries, prefix, tokens = query.shape[0], query.shape[2], prefix_key.shape[1], key.shape[2]
    pairs = ((prefix_key, key), (prefix_value, value))
    keys, values = (torch.cat((shared[None].expand(batch, -1, -1, -1), own), dim=2) for shared, own in pairs)
    if causal:
        lowest = torch.finfo(query.dtype).min
        bias = query.new_full((1, 1, queries, prefix + tokens), lowest).triu(prefix + 1)
    elif bias is not None:
        bias = torch.nn.functional.pad(bias, (prefix, 0))
    out, sums = parts.forward(query, keys, values, parts.Options(bias=bias, causal=False, scale=scale))
    return out, sums


def prefix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention over the prefix, which every query sees, and each row's own keys; differentiable in all but the mask.

        out = softmax(scale · query [prefix_key; key]ᵀ + [0; mask]) [prefix_value; value]

    The softmax is taken over the two parts apart and merged by their denominators, the prefix as one part for the whole
    batch, without copies; on a CPU few queries of a key head take one pass over both. The exception are many queries on
    a CPU, beside which copying keys costs nothing and a second part does.

    Args:
        query: (batch, heads, queries, head_dim).
        prefix_key: (heads_kv, prefix, head_dim), one for the whole batch, cast to the dtype of query; so is
            prefix_value.
        key: (batch, heads_kv, tokens, head_dim), of the dtype of query; so is value. heads is a multiple of heads_kv:
            key head i serves the heads from i · heads / heads_kv on.
        mask: for the tokens alone, (batch or 1, heads or 1, queries or 1, tokens or 1); boolean, True where seen, or
            additive. A row whose tokens are all masked attends to the prefix.
        causal: whether query i sees the tokens up to the i-th only, besides the prefix; for as many tokens as queries.
        scale: of the scores; None: 1 / sqrt(head_dim).

    Returns:
        (batch, heads, queries, head_dim), in the dtype of query; transposed(1, 2) it is contiguous.

    Raises:
        ValueError: shapes or devices do not fit together, there is no key at all, causal with a mask or with another
            number of tokens than queries, or a mask that wants a gradient.
        TypeError: a dtype that does not fit.

    Paper: Li and Liang 2021, arXiv:2101.00190, section 4.3, for the prefix; Juravsky et al. 2024 (Hydragen),
    arXiv:2402.05099, section 3, for sharing it.
    """
    _checked(query, prefix_key, prefix_value, key, value, mask, causal)
    if query.numel() == 0:
        return query.new_zeros((query.shape[0], query.shape[2], query.shape[1], query.shape[3])).transpose(1, 2)
    exact = query.shape[-1] ** -0.5 if scale is None else scale
    if not math.isfinite(exact):
        raise ValueError(f"prefix_attention: expected a finite scale, found {exact}")
    shared = (t.to(query.dtype) for t in (prefix_key, prefix_value))
    tensors = (_even(t) for t in (query, *shared, key, value))
    bias = _bias(mask, query, key.shape[2])
    causal = causal and query.shape[2] > 1
    out: Tensor = _PrefixAttention.apply(*tensors, bias, causal, exact)  # type: ignore[no-untyped-call]  # not typed
    return out


def _even(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
