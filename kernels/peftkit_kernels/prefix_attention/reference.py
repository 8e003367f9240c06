"""The definition of attention over a shared prefix and a row's own keys, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkit_kernels._precision import exactly, wide_dtype


@exactly
def part(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys, and the logarithm of its denominator.

    Args:
        query: (batch, heads, queries, head_dim); heads is a multiple of heads_kv.
        key: (batch, heads_kv, keys, head_dim); so is value.
        bias: additive, broadcasting to (batch, heads, queries, keys), or None.
        causal: whether query i sees the keys up to the i-th only.

    Returns:
        (batch, heads, queries, head_dim) in the dtype of query, zero where a query sees no key; and
        log Σ exp(scale · query · key + bias), (batch, heads, queries), float32 or float64, minus infinity there.
    """
    wide, (batch, heads, queries, width) = wide_dtype(query.dtype), query.shape
    groups = (batch, key.shape[1], heads // key.shape[1], queries)
    # The sizes of the last dimensions are given: they cannot be inferred where there is nothing.
    scores = query.to(wide).reshape(*groups, width) @ key.to(wide)[:, :, None].transpose(-1, -2) * scale
    scores = scores.reshape(batch, heads, queries, key.shape[2])
    if bias is not None:
        scores = scores + bias.to(wide)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    sums = scores.logsumexp(-1)
    weights = (scores - torch.where(sums == -torch.inf, 0.0, sums)[..., None]).exp()
    out = weights.reshape(*groups, key.shape[2]) @ value.to(wide)[:, :, None]
    return out.reshape(query.shape).to(query.dtype), sums


def merge(first: Tensor, first_sums: Tensor, second: Tensor, second_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys from that over two parts of them.

        l = log(exp l₁ + exp l₂),   out = exp(l₁ - l) out₁ + exp(l₂ - l) out₂

    Args:
        first: (batch, heads_kv, group, queries, head_dim), any strides; so is second.
        first_sums: (batch, heads_kv, group, queries), float32 or float64, the logarithms of the denominators.

    Returns:
        (batch, queries, heads_kv, group, head_dim) in the dtype of first, contiguous; and l like first_sums.
    """
    high = torch.maximum(first_sums, second_sums)
    base = torch.where(high == -torch.inf, 0.0, high)
    by_first, by_second = (first_sums - base).exp(), (second_sums - base).exp()
    whole = by_first + by_second
    inverse = torch.where(whole > 0, 1 / whole, 0.0)
    wide = first_sums.dtype
    out = (by_first * inverse)[..., None] * first.to(wide) + (by_second * inverse)[..., None] * second.to(wide)
    return out.to(first.dtype).permute(0, 3, 1, 2, 4).contiguous(), (base + whole.log()).contiguous()


def few(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the prefix and the row's own keys for a few queries of each key head, at once.

    Args:
        query: (batch, heads_kv, rows, head_dim).
        prefix_key: (heads_kv, prefix, head_dim); so is prefix_value.
        key: (batch, heads_kv, tokens, head_dim); so is value.
        bias: added to the scores of the tokens, each dimension theirs or 1; or None.

    Returns:
        (batch, heads_kv, rows, head_dim) in the dtype of query; and the logarithms of the denominators.
    """
    batch, tokens = query.shape[0], key.shape[2]
    keys, values = (
        torch.cat((shared[None].expand(batch, -1, -1, -1), own), dim=2)
        for shared, own in ((prefix_key, key), (prefix_value, value))
    )
    if bias is not None:
        whole = bias.expand(*bias.shape[:-1], tokens)
        bias = torch.cat((whole.new_zeros((*whole.shape[:-1], prefix_key.shape[1])), whole), dim=-1)
    out, sums = part(query, keys, values, bias, False, scale)
    return out.contiguous(), sums


def prefix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Attention over the prefix's keys, which every query sees, and the row's own; see `part` for the arguments.

    Args:
        prefix_key: (heads_kv, prefix, head_dim), one for the whole batch; so is prefix_value.
    """
    batch, heads, queries, _ = query.shape
    shape = (batch, prefix_key.shape[0], heads // prefix_key.shape[0], queries)
    exact = query.to(wide_dtype(query.dtype))
    parts = []
    for keys, values, own_bias, own_causal in (
        (prefix_key[None].expand(batch, -1, -1, -1), prefix_value[None].expand(batch, -1, -1, -1), None, False),
        (key, value, bias, causal),
    ):
        out, sums = part(exact, keys, values, own_bias, own_causal, scale)
        parts += [out.reshape(*shape, -1), sums.reshape(shape)]
    out, _ = merge(*parts)
    return out.flatten(2, 3).transpose(1, 2).to(query.dtype)
