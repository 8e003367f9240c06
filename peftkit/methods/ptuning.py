"""P-tuning: vectors in front of the embedded input that a small network computes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from peftkit import virtual_tokens
from peftkit.spec import Adapter, Attach, Config, Knob, Method, Paper, Site, State, config
from peftkit.virtual_tokens import Memory, Prompt, VirtualTokens


@config
class PTuning(Config):
    """Number of virtual tokens, and the network that gives them."""

    num_virtual_tokens: int = 20
    """Virtual tokens in front of the input, at least 1."""
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """The network: an MLP, or a bidirectional LSTM and a two-layer MLP as in the paper."""
    encoder_hidden_size: int | None = None
    """Hidden units; None: the width of the embedding."""
    encoder_num_layers: int = 2
    """Hidden layers of the MLP, or layers of the LSTM; at least 1. Hugging Face peft's MLP always has 2."""
    encoder_dropout: float = 0.0
    """Dropout behind each hidden layer in training, in [0, 1). Hugging Face peft's MLP has none."""
    num_transformer_submodules: int | None = None
    """2 in peft's folders for encoder-decoders, which hold as many rows again, unused; they are kept as they are."""
    inference_mode: bool = False
    """The vectors come from a folder, which holds them computed; the other fields say how they were trained."""

    def validate(self) -> None:
        """Raises ConfigError when a field is out of range."""
        virtual_tokens.check_submodules(self)
        virtual_tokens.no_targets(self)
        self.require(
            self.encoder_hidden_size is None or self.encoder_hidden_size >= 1,
            f"encoder_hidden_size must be at least 1, found {self.encoder_hidden_size}",
        )
        self.require(
            self.encoder_num_layers >= 1, f"encoder_num_layers must be at least 1, found {self.encoder_num_layers}"
        )
        self.require(0 <= self.encoder_dropout < 1, f"encoder_dropout must lie in [0, 1), found {self.encoder_dropout}")


class Encoder(VirtualTokens):
    """The vectors as the output of an MLP, or of an LSTM and an MLP, over one trained embedding each.

    The paper (section 3.2) has the LSTM read the embeddings in order and an MLP with ReLU behind it; the plain MLP is
    that of the authors' later code.
    """

    def __init__(self, cfg: PTuning, site: Site) -> None:
        super().__init__(cfg.num_virtual_tokens, site)
        width = int(site.facts["width"])
        hidden, layers = cfg.encoder_hidden_size or width, cfg.encoder_num_layers
        self.embedding = nn.Parameter(torch.empty(cfg.num_virtual_tokens, width))
        self.lstm_head: nn.Module | None = None
        if cfg.encoder_reparameterization_type == "LSTM":
            with torch.device("meta"):
                lstm = nn.LSTM(
                    width,
                    hidden,
                    num_layers=layers,
                    dropout=cfg.encoder_dropout if layers > 1 else 0.0,
                    bidirectional=True,
                    batch_first=True,
                )
            self.lstm_head = lstm.to_empty(device=torch.get_default_device())
            sizes = [2 * hidden, 2 * hidden, width]
        else:
            sizes = [width, *[hidden] * layers, width]
        parts: list[nn.Module] = []
        with torch.device("meta"):  # so that nothing is drawn before initialise
            for first, second in itertools.pairwise(sizes):
                parts += [nn.Linear(first, second), nn.ReLU(), nn.Dropout(cfg.encoder_dropout)]
        self.mlp_head = nn.Sequential(*parts[:-2]).to_empty(device=torch.get_default_device())

    def vectors(self) -> Tensor:
        """The virtual tokens, (length, width)."""
        inputs = self.embedding
        if self.lstm_head is not None:
            inputs = self.lstm_head(inputs[None])[0][0]
        out: Tensor = self.mlp_head(inputs)
        return out


def parameter_count(site: Site, cfg: PTuning) -> int:
    """The embedding n · w and the network; n · w for vectors from a folder; nothing at a decoder behind an encoder.

    MLP with L hidden layers of h: h (w + 1) + (L - 1) h (h + 1) + w (h + 1). LSTM with L layers, both directions:
    8 h (w + h + 2) + (L - 1) 8 h (3 h + 2), and 2 h (2 h + 1) + w (2 h + 1) behind it.
    """
    if site.role != "prompt":
        return 0
    width = int(site.facts["width"])
    hidden, layers = cfg.encoder_hidden_size or width, cfg.encoder_num_layers
    count = cfg.num_virtual_tokens * width
    if cfg.inference_mode:
        return count
    if cfg.encoder_reparameterization_type == "LSTM":
        count += 8 * hidden * (width + hidden + 2) + (layers - 1) * 8 * hidden * (3 * hidden + 2)
        return count + 2 * hidden * (2 * hidden + 1) + width * (2 * hidden + 1)
    return count + hidden * (width + 1) + (layers - 1) * hidden * (hidden + 1) + width * (hidden + 1)


def build(site: Site, cfg: PTuning, shared: nn.Module | None) -> Adapter:
    """The network, vectors for a folder's, or what lets a decoder see them."""
    if site.role == "memory":
        return Memory(site)
    if cfg.inference_mode:
        return Prompt(cfg.num_virtual_tokens, site, virtual_tokens.unused_rows(cfg))
    return Encoder(cfg, site)


@torch.no_grad()
def initialise(adapter: Adapter, module: nn.Module, site: Site, cfg: PTuning) -> None:
    """Unit noise as embedding, torch's own start for the network, its output scaled to the backbone's table."""
    if isinstance(adapter, Prompt):
        nn.init.zeros_(adapter.prompt)
    if not isinstance(adapter, Encoder):
        return
    nn.init.normal_(adapter.embedding)
    for part in adapter.modules():
        if isinstance(part, nn.Linear | nn.LSTM):
            part.reset_parameters()
    table = virtual_tokens.embedding_of(module)
    if not table.is_meta:
        last = adapter.mlp_head[-1]
        assert isinstance(last, nn.Linear)
        scale = float(table.float().std()) / float(_in_evaluation(adapter).float().std().clamp_min(1e-12))
        last.weight.mul_(scale)
        last.bias.mul_(scale)


@torch.no_grad()
def stored(cfg: PTuning, adapters: Mapping[str, Adapter]) -> tuple[PTuning, State]:
    """What a folder holds: the vectors that the network gives, computed. Peft's has no place for the network."""
    changed = {p: {"prompt": _in_evaluation(a)} for p, a in adapters.items() if isinstance(a, Encoder)}
    if not changed:
        return cfg, {}
    return dataclasses.replace(cfg, inference_mode=True, num_transformer_submodules=None), changed


def _in_evaluation(adapter: Encoder) -> Tensor:
    training = adapter.training
    try:
        return adapter.eval().vectors()
    finally:
        adapter.train(training)


METHOD = Method(
    name="ptuning",
    title="P-tuning",
    summary="Vectors in front of the embedded input, computed by an MLP or an LSTM.",
    paper=Paper(title="GPT Understands, Too", authors="Liu et al.", year=2021, arxiv="2103.10385"),
    config=PTuning,
    attach=Attach.INPUT,
    sites=virtual_tokens.sites,
    parameter_count=parameter_count,
    adapter=build,
    initialise=initialise,
    stored=stored,
    mergeable=False,
    starts_as_identity=False,
    quantized_base=True,
    knob=Knob(field="num_virtual_tokens", high=512),
    peft=virtual_tokens.peft_format("P_TUNING"),
)
