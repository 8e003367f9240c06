"""LoReFT: edits hidden states in a low-rank subspace, at chosen token positions, and no weight."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit import backbones, targets
from peftkit.errors import ConfigError, TargetError
from peftkit.spec import Adapter, Attach, Config, Knob, Method, Paper, Site, config, is_weight_module
from peftkit.sublayers import block_width, hidden_states, with_hidden_states

PROMPT = "peftkit_prompt"
"""Keyword by which the model tells its blocks which tokens are the prompt."""
IGNORED = -100
"""Label of a token that is no target."""


@config
class LoReFT(Config):
    """Rank of the edited subspace, and the positions at which it is edited.

    Positions count real tokens, padding left out, of the prompt. The prompt is the whole input, except that a causal
    language model that is given labels takes the tokens before the first labelled one (all, when nothing precedes it).
    Tokens that are generated one by one with a cache are behind the prompt: only "all" edits them. Without a cache
    the whole text so far is the prompt of each step, and its last tokens move along. On an encoder-decoder model the
    encoder's blocks are adapted, unless target_modules names others. All positions of a block share one edit, which is
    the paper's tied variant.
    """

    low_rank_dimension: int = 4
    """Rank r of the edit, from 1 to the model's width."""
    positions: str = "f7+l7"
    """"f<p>+l<s>": the first p and the last s tokens of the prompt, "f<p>" or "l<s>" alone; "all": every token."""
    init_weights: Literal["identity", "random"] = "identity"
    """"identity": W = R and b = 0, so that the model starts as it was; "random": W as a new Linear."""
    dropout: float = 0.0
    """Probability of dropping an element of the edit's subspace in training, in [0, 1)."""

    def validate(self) -> None:
        """Raises ConfigError when a field is out of range or contradicts another."""
        self.require(
            self.low_rank_dimension >= 1, f"low_rank_dimension must be at least 1, found {self.low_rank_dimension}"
        )
        self.require(
            _parsed(self.positions) is not None,
            f"positions must be 'all' or read like 'f7+l7', 'f1' or 'l1', found {self.positions!r}",
        )
        self.require(0 <= self.dropout < 1, f"dropout must lie in [0, 1), found {self.dropout}")


def _parsed(positions: str) -> tuple[int, int] | None:
    """Numbers of first and last tokens; (0, 0) for all; None when unreadable."""
    if positions == "all":
        return 0, 0
    match = re.fullmatch(r"f(\d+)\+l(\d+)|f(\d+)|l(\d+)", positions)
    if match is None:
        return None
    first, last = (int(a or b or 0) for a, b in (match.group(1, 3), match.group(2, 4)))
    return (first, last) if first or last else None


class PromptMarker(Adapter):
    """Tells the blocks of a causal language model in training which tokens are the prompt.

    Goes around the model's own forward and passes the mask down as a keyword argument, which recomputed blocks get
    again; nothing is remembered between modules.
    """

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        labels = kwargs.get("labels")
        if labels is not None:
            mask = kwargs.get("attention_mask")
            kwargs[PROMPT] = prompt_tokens(labels, mask if mask is not None and mask.dim() == 2 else None)
        return call(*args, **kwargs)


def prompt_tokens(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Which tokens precede the first labelled one; all real ones of a row in which none does.

    Args:
        labels: (batch, length), -100 where there is no target.
        mask: (batch, length), nonzero at real tokens; None: all are real.

    Returns:
        (batch, length), bool.
    """
    real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    before = (labels != IGNORED).cumsum(1) == 0
    prompt = before & real
    return torch.where(prompt.any(1, keepdim=True), prompt, real)


def real_tokens(mask: Tensor | None, length: int) -> Tensor | None:
    """Which tokens are real, read from the attention mask that a block receives; None: all.

    Args:
        mask: (batch, length) nonzero at real tokens, or (batch, 1, length, keys), boolean or integer where true means
            visible, or floating where 0 means visible. A token that is no padding sees itself, so its entry on the
            diagonal says which it is.
        length: number of tokens.

    Returns:
        (batch, length), bool.
    """
    if mask is None:
        return None
    if mask.dim() == 4:
        mask = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return mask == 0 if mask.is_floating_point() else mask != 0
    return mask[:, -length:] != 0


def selected(real: Tensor | None, length: int, first: int, last: int, device: torch.device) -> Tensor:
    """Which tokens are among the first or the last ones: (batch, length), or (length,) where all are real; bool."""
    if real is None:
        index = torch.arange(length, device=device)
        return (index < first) | (index >= length - last)
    rank = real.cumsum(-1)
    return real & ((rank <= first) | (rank > rank[..., -1:] - last))


class LoReFTAdapter(Adapter):
    """h + Rᵀ (W h + b - R h) at the selected positions of what the module gives, R with orthonormal rows.

    R comes from the free matrix `R` by a QR decomposition of its transpose, the signs chosen so that a matrix whose
    rows are orthonormal already is its own result.
    """

    def __init__(self, site: Site, cfg: LoReFT, shared: nn.Module | None) -> None:
        super().__init__()
        rank = cfg.low_rank_dimension
        numbers = _parsed(cfg.positions)
        assert numbers is not None
        self.first, self.last = numbers
        self.everywhere = cfg.positions == "all" or not site.facts.get("sequence", False)
        self.arguments: Mapping[str, int] = dict(site.facts.get("arguments", {}))
        self.layer = site.layer or 0
        self.dropout = cfg.dropout
        self.R = nn.Parameter(torch.empty(rank, site.out_features))
        self.W = nn.Parameter(torch.empty(rank, site.out_features))
        self.b = nn.Parameter(torch.empty(rank))

    def rotation(self) -> Tensor:
        """R with orthonormal rows, (r, width), at least float32."""
        return orthonormal_rows(self.R)

    def forward(self, module: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the module gives, its hidden states edited."""
        prompt = kwargs.pop(PROMPT, None)
        # Read before the call, which fills the cache.
        seen = 0 if self.everywhere else self._cached(args, kwargs)
        mask = None if self.everywhere else self._argument("attention_mask", args, kwargs)
        output = call(*args, **kwargs)
        if not self.everywhere and isinstance(seen, int) and seen > 0:
            return output
        hidden = hidden_states(output)
        chosen = None
        if not self.everywhere:
            length = hidden.shape[1]
            real = real_tokens(mask, length) if prompt is None else prompt
            chosen = selected(real, length, self.first, self.last, hidden.device)
            if not isinstance(seen, int):
                # A cache of fixed size counts in a tensor, so that one compiled graph serves prompt and decoding.
                chosen = chosen & (seen == 0)
        return with_hidden_states(output, hidden + self.edit(hidden, chosen).to(hidden.dtype))

    def edit(self, hidden: Tensor, chosen: Tensor | None) -> Tensor:
        """Rᵀ ((W - R) h + b), zero where not chosen.

        Args:
            hidden: (batch, length, width).
            chosen: (batch, length) or (length,), bool; None: everywhere.
        """
        # In W's dtype, so that W = R cancels exactly at the start.
        rotation = self.rotation().to(self.W.dtype)
        kind = hidden.dtype
        inner = F.linear(hidden, (self.W - rotation).to(kind), self.b.to(kind))
        if self.dropout:
            inner = F.dropout(inner, self.dropout, self.training)
        if chosen is not None:
            inner = inner * chosen.to(inner.dtype).unsqueeze(-1)
        return F.linear(inner, rotation.t().to(kind))

    def _argument(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        index = self.arguments.get(name)
        return args[index] if index is not None and index < len(args) else kwargs.get(name)

    def _cached(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """How many tokens the cache of this block holds."""
        cache = self._argument("past_key_values", args, kwargs)
        return 0 if cache is None else cache.get_seq_length(self.layer)


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """The rows orthonormalised one after the other: (r, width), at least float32."""
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    q, r = torch.linalg.qr(wide.t())
    out: Tensor = (q * r.diagonal().sign()).t()
    return out


def sites(model: nn.Module, cfg: LoReFT) -> list[Site]:
    """The outputs of the blocks; projections where target_modules names them or the architecture is not in the table.

    Raises:
        TargetError: a pattern matches nothing, selects a module of unknown width, or nothing is left.
        ConfigError: low_rank_dimension is over a width.
    """
    everything = dict(targets.modules(model))
    known = backbones.family(model) is not None
    blocks = dict(backbones.blocks(model)) if known else {}
    if cfg.target_modules is not None:
        start = [path for path in everything if path]
    else:
        start = _default_blocks(model, list(blocks)) if known else list(backbones.linear_paths(model))
    extras = targets.extra_paths(model, cfg)
    chosen = [p for p in targets.narrow(model, cfg, start) if not targets.inside(p, extras)]
    wrong = [p for p in chosen if p not in blocks and not is_weight_module(everything[p])]
    if wrong and not isinstance(cfg.target_modules, str):
        raise TargetError(
            f"loreft attaches to blocks and projections, but target_modules selects {wrong[0]} "
            f"({type(everything[wrong[0]]).__name__}); name a block, such as {next(iter(blocks), 'layers.0')}"
        )
    chosen = [p for p in chosen if p not in wrong]
    if not chosen:
        raise TargetError(
            "loreft: target_modules, exclude_modules, layers_to_transform and modules_to_save leave no block to adapt; "
            "loosen one of them"
        )
    found = [_site(model, path, everything[path], path in blocks) for path in chosen]
    narrow = next((site for site in found if cfg.low_rank_dimension > site.out_features), None)
    if narrow is not None and (cfg.target_modules is not None or known):
        raise ConfigError(
            f"low_rank_dimension={cfg.low_rank_dimension} is over the width {narrow.out_features} at {narrow.path}"
        )
    return [site for site in found if cfg.low_rank_dimension <= site.out_features]


def _default_blocks(model: nn.Module, blocks: list[str]) -> list[str]:
    stacks = backbones.stacks(model)
    if len(stacks) == 1:
        return blocks
    return [path for path in blocks if targets.inside(path, [stacks[0][0]])]


def _site(model: nn.Module, path: str, module: nn.Module, is_block: bool) -> Site:
    site = targets.site_of(path, module, role="output")
    if not is_block:
        return dataclasses.replace(site, in_features=site.out_features)
    width = block_width(model, path)
    names = [n for n in inspect.signature(type(module).forward).parameters if n != "self"]
    wanted = ("attention_mask", "past_key_values")
    facts = {
        "sequence": True,
        "arguments": {name: names.index(name) for name in wanted if name in names},
        "causal": backbones.is_causal_lm(model),
    }
    return dataclasses.replace(site, in_features=width, out_features=width, facts=facts)


def parameter_count(site: Site, cfg: LoReFT) -> int:
    """r d for R, r d for W, r for b."""
    return cfg.low_rank_dimension * (2 * site.out_features + 1)


def shared(sites: Sequence[Site], cfg: LoReFT) -> Adapter | None:
    """What marks the prompt in training, where a prompt can end before the input does."""
    return PromptMarker() if cfg.positions != "all" and any(s.facts.get("causal") for s in sites) else None


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: LoReFT) -> None:
    """R with random orthonormal rows; W and b as `init_weights` says."""
    assert isinstance(adapter, LoReFTAdapter)
    nn.init.normal_(adapter.R)
    adapter.R.copy_(orthonormal_rows(adapter.R))
    if cfg.init_weights == "identity":
        adapter.W.copy_(adapter.rotation())
        nn.init.zeros_(adapter.b)
    else:
        bound = site.out_features**-0.5
        nn.init.uniform_(adapter.W, -bound, bound)
        nn.init.uniform_(adapter.b, -bound, bound)


METHOD = Method(
    name="loreft",
    title="LoReFT",
    summary="A low-rank edit of each block's output at the first and last tokens of the prompt.",
    paper=Paper(
        title="ReFT: Representation Finetuning for Language Models", authors="Wu et al.", year=2024, arxiv="2404.03592"
    ),
    config=LoReFT,
    attach=Attach.MODULE,
    default_targets=("block",),
    sites=sites,
    parameter_count=parameter_count,
    adapter=LoReFTAdapter,
    initialise=initialise,
    shared=shared,
    mergeable=False,
    quantized_base=True,
    knob=Knob(field="low_rank_dimension"),
)
