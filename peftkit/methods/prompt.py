"""Prompt tuning: trained vectors in front of the embedded input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from peftkit import virtual_tokens
from peftkit.errors import ConfigError
from peftkit.spec import Adapter, Attach, Config, Knob, Method, Paper, Site, config
from peftkit.virtual_tokens import Memory, Prompt


@config
class PromptTuning(Config):
    """Number of virtual tokens and where they start."""

    num_virtual_tokens: int = 20
    """Trained vectors in front of the input, at least 1."""
    prompt_tuning_init: Literal["SAMPLE_VOCAB", "RANDOM", "TEXT"] = "SAMPLE_VOCAB"
    """Start from vectors of random tokens, from noise of their scale, or from the tokens of a text."""
    prompt_tuning_init_text: str | None = None
    """The text to start from, such as the task in words; repeated or cut to the number of virtual tokens."""
    tokenizer_name_or_path: str | None = None
    """The tokenizer for that text."""
    tokenizer_kwargs: Mapping[str, Any] | None = None
    """Further arguments for loading that tokenizer; trust_remote_code is left out."""
    num_transformer_submodules: int | None = None
    """2 in peft's folders for encoder-decoders, which hold as many rows again, unused; they are kept as they are."""
    inference_mode: bool = False
    """The vectors come from a folder, so that no text or vocabulary is read."""

    def validate(self) -> None:
        """Raises ConfigError when a field is out of range or a text lacks its tokenizer."""
        virtual_tokens.check_submodules(self)
        virtual_tokens.no_targets(self)
        if self.inference_mode:
            return
        if self.prompt_tuning_init == "TEXT":
            self.require(bool(self.prompt_tuning_init_text), "prompt_tuning_init='TEXT' needs prompt_tuning_init_text")
            self.require(bool(self.tokenizer_name_or_path), "prompt_tuning_init='TEXT' needs tokenizer_name_or_path")
        else:
            for name in ("prompt_tuning_init_text", "tokenizer_kwargs"):
                self.require(not getattr(self, name), f"{name} needs prompt_tuning_init='TEXT'")


def parameter_count(site: Site, cfg: PromptTuning) -> int:
    """n · width at the input, nothing at a decoder behind an encoder."""
    return cfg.num_virtual_tokens * int(site.facts["width"]) if site.role == "prompt" else 0


def build(site: Site, cfg: PromptTuning, shared: nn.Module | None) -> Adapter:
    """The vectors in front of the input, or what lets a decoder see them."""
    if site.role == "memory":
        return Memory(site)
    return Prompt(cfg.num_virtual_tokens, site, virtual_tokens.unused_rows(cfg))


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: PromptTuning) -> None:
    """Vectors of sampled tokens, of a text's tokens, or noise.

    The paper samples among the 5,000 most common tokens, here among all, and draws noise from [-0.5, 0.5], which suits
    T5's table; here it has the standard deviation of the backbone's own.
    """
    if not isinstance(adapter, Prompt):
        return
    table, prompt = virtual_tokens.embedding_of(module), adapter.prompt
    if cfg.inference_mode or table.is_meta:
        nn.init.zeros_(prompt)
    elif cfg.prompt_tuning_init == "RANDOM":
        nn.init.normal_(prompt, std=float(table.float().std()))
    elif cfg.prompt_tuning_init == "SAMPLE_VOCAB":
        prompt.copy_(table[torch.randint(table.shape[0], (cfg.num_virtual_tokens,)).to(table.device)])
    else:
        ids = torch.tensor(virtual_tokens.tokens_of(cfg), device=table.device)
        if ids.numel() == 0 or int(ids.max()) >= table.shape[0]:
            raise ConfigError(
                f"the tokenizer {cfg.tokenizer_name_or_path!r} gives {ids.numel()} tokens"
                f"{f', the largest {int(ids.max())}' if ids.numel() else ''}, and the backbone has {table.shape[0]}; "
                "use the backbone's own tokenizer and a text that is not empty"
            )
        prompt.copy_(table[ids])


METHOD = Method(
    name="prompt",
    title="Prompt tuning",
    summary="Vectors in front of the embedded input.",
    paper=Paper(
        title="The Power of Scale for Parameter-Efficient Prompt Tuning",
        authors="Lester et al.",
        year=2021,
        arxiv="2104.08691",
    ),
    config=PromptTuning,
    attach=Attach.INPUT,
    sites=virtual_tokens.sites,
    parameter_count=parameter_count,
    adapter=build,
    initialise=initialise,
    mergeable=False,
    starts_as_identity=False,
    quantized_base=True,
    knob=Knob(field="num_virtual_tokens", high=512),
    peft=virtual_tokens.peft_format("PROMPT_TUNING"),
)
