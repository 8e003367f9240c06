"""Attention over a shared prefix: against putting a copy of the prefix in front of every row's keys and values."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_bench.ops import Comparison, Setting

HEADS, HEADS_KV, WIDTH = 32, 8, 128
"""Those of an 8B Llama."""
SHAPES = (
    *((batch, prefix, tokens, 1) for batch in (1, 8, 32) for prefix in (20, 128, 512) for tokens in (128, 1024)),
    *((batch, prefix, tokens, tokens) for batch, tokens in ((1, 512), (4, 128)) for prefix in (20, 128)),
)
"""Batch, prefix, tokens and queries: one query a row, and as many as tokens."""


def _setting(device: torch.device, batch: int, prefix: int, tokens: int, queries: int, heads_kv: int) -> Setting:
    from peftkit_kernels.prefix_attention import prefix_attention

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    query = normal(batch, HEADS, queries, WIDTH)
    key, value = (normal(batch, heads_kv, tokens, WIDTH) for _ in range(2))
    prefix_key, prefix_value = (normal(heads_kv, prefix, WIDTH) for _ in range(2))
    causal = queries > 1
    mask = torch.ones(queries, prefix + tokens, dtype=torch.bool, device=device).tril(prefix) if causal else None

    def joined() -> tuple[Tensor, Tensor]:
        pairs = ((prefix_key, key), (prefix_value, value))
        first, second = (torch.cat((shared[None].expand(batch, -1, -1, -1), own), dim=2) for shared, own in pairs)
        return first, second

    @torch.no_grad()
    def concatenated() -> Tensor:
        return F.scaled_dot_product_attention(query, *joined(), attn_mask=mask, enable_gqa=True)

    @torch.no_grad()
    def folded() -> Tensor:
        grouped = query.view(batch, heads_kv, -1, WIDTH)
        return F.scaled_dot_product_attention(grouped, *joined())

    calls = {
        "peftkit": torch.no_grad()(
            lambda: prefix_attention(query, prefix_key, prefix_value, key, value, causal=causal)
        ),
        "concatenate + sdpa": concatenated,
    }
    if queries == 1 and heads_kv < HEADS:
        calls["concatenate + sdpa, a key head's queries together"] = folded
    return Setting(calls=calls)


def comparisons() -> Iterator[Comparison]:
    """Decoding and prefill, with 8 key heads for 32 heads, and decoding with as many as heads; bfloat16."""
    for batch, prefix, tokens, queries in SHAPES:
        for heads_kv in (HEADS_KV, HEADS):
            if heads_kv == HEADS and (queries > 1 or batch == 32):
                continue
            seen = prefix * queries + (tokens if queries == 1 else queries * (tokens + 1) // 2)
            yield Comparison(
                op="prefix_attention",
                label=f"{'decode' if queries == 1 else 'prefill'}, batch {batch}, prefix {prefix}, tokens {tokens}, "
                f"{HEADS} heads of {WIDTH}, {heads_kv} key heads, bfloat16",
                setting=functools.partial(
                    _setting, batch=batch, prefix=prefix, tokens=tokens, queries=queries, heads_kv=heads_kv
                ),
                against="concatenate + sdpa",
                bytes=4 * WIDTH * (heads_kv * (batch * tokens + prefix) + HEADS * batch * queries),
                flops=4 * batch * HEADS * WIDTH * seen,
                rounds=9,
            )
