"""Attention over some of the keys with the logarithm of its denominator, by torch's own fused kernels.

The backward of a part takes the output and the denominators over *all* keys: the weights are then those of the whole
softmax, and the gradients of the parts add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peftkit_kernels._precision import exactly
from peftkit_kernels.prefix_attention import reference

_ATEN = torch.ops.aten
FUSED = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNED = 16
"""Elements that the rows of a bias have to be a multiple of apart on a GPU."""
_SUMS_ALIGNED = 32
"""Queries that denominators are padded to a multiple of on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a part is computed with beside its tensors."""

    bias: Tensor | None
    """Additive, finite, of the query's dtype, each dimension that of the scores or 1; or None."""
    causal: bool
    scale: float


def _fused_on_gpu(query: Tensor) -> bool:
    if query.device.type != "cuda" or query.dtype not in FUSED:
        return False
    enough = query.dtype != torch.bfloat16 or torch.cuda.get_device_capability(query.device) >= (8, 0)
    return enough and query.shape[-1] % (4 if query.dtype == torch.float32 else 8) == 0


def _bias_on_gpu(query: Tensor, keys: int, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    padded = F.pad(bias, (0, -bias.shape[-1] % _ALIGNED))[..., : bias.shape[-1]]
    return padded.expand(*query.shape[:-1], keys)


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values with a head for each of the queries'."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


def _added(grad: Tensor, heads: int) -> Tensor:
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)


def forward(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Output and denominators as `reference.part` gives them; there have to be queries and keys."""
    bias, causal, scale = options.bias, options.causal, options.scale
    if query.device.type == "cpu":
        out, sums = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
        return out, sums
    if not _fused_on_gpu(query):
        return reference.part(query, key, value, bias, causal, scale)
    heads = query.shape[1]
    out, sums, _, _ = _ATEN._scaled_dot_product_efficient_attention(
        query,
        _repeated(key, heads),
        _repeated(value, heads),
        _bias_on_gpu(query, key.shape[2], bias),
        True,
        0.0,
        causal,
        scale=scale,
    )
    return out, sums[..., : query.shape[2]]


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value through one part.

    Args:
        out: output over all keys, of the shape of query.
        sums: logarithms of the denominators over all keys.
    """
    bias, causal, scale = options.bias, options.causal, options.scale
    if query.device.type == "cpu":
        found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, sums, 0.0, causal, attn_mask=bias, scale=scale
        )
        return found[0], found[1], found[2]
    if not _fused_on_gpu(query):
        return _plain_backward(grad, query, key, value, out, sums, options)
    heads, heads_kv = query.shape[1], key.shape[1]
    # Torch's kernel pads with infinity, so that the weights of queries that are not there are zero.
    padded = F.pad(sums, (0, -sums.shape[-1] % _SUMS_ALIGNED), value=torch.inf).contiguous()
    none = torch.zeros((), dtype=torch.int64, device=query.device)
    of_query, of_key, of_value, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
        grad,
        query,
        _repeated(key, heads),
        _repeated(value, heads),
        _bias_on_gpu(query, key.shape[2], bias),
        out,
        padded,
        none,
        none,
        0.0,
        [True, True, True, False],
        causal,
        scale=scale,
    )
    return of_query, _added(of_key, heads_kv), _added(of_value, heads_kv)


@exactly
def _plain_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    wide, heads = sums.dtype, query.shape[1]
    q, k, v = query.to(wide), _repeated(key, heads).to(wide), _repeated(value, heads).to(wide)
    scores = q @ k.transpose(-1, -2) * options.scale
    if options.bias is not None:
        scores = scores + options.bias.to(wide)
    if options.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    weights = (scores - sums[..., None]).exp()
    of_out = grad.to(wide)
    of_scores = weights * (of_out @ v.transpose(-1, -2) - (of_out * out.to(wide)).sum(-1, keepdim=True))
    of_query = of_scores @ k * options.scale
    of_key = of_scores.transpose(-1, -2) @ q * options.scale
    of_value = weights.transpose(-1, -2) @ of_out
    return (
        of_query.to(query.dtype),
        _added(of_key, key.shape[1]).to(key.dtype),
        _added(of_value, key.shape[1]).to(value.dtype),
    )
