"""Tiny random models built in memory: the architectures that the laws are checked on, each a forward of milliseconds.

Weights are drawn under a seed of their own, so that a backbone is the same in every process, and building one leaves
torch's global generator where it was. Gains and biases are random too: at their usual ones and zeros, errors hide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 48
WIDTH = 32
LENGTH = 7
CLASSES = 3


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A named tiny model: how to build it, and what to feed it."""

    name: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[torch.Generator], dict[str, Tensor]]
    block: str
    """Path of one block, to compile on its own; "" is the model."""
    features: frozenset[str]
    """What the laws may ask for: "text", "causal", "generate", "checkpointing"; "rows": each row of a batch
    is a row of what projections are given."""
    seed: int = 11

    def __call__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
        """A new model in evaluation mode, the same weights every time.

        Args:
            dtype: floating-point dtype of its parameters, rounded from float32.
            device: "cpu", "meta" or any other device of torch.
        """
        if device == "meta":
            with torch.device("meta"):
                return self.make().to(dtype).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(0.2 * torch.randn(parameter.shape))
        return model.to(device=device, dtype=dtype).eval()

    def inputs(self, model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
        """One batch with labels, on the model's device, in its dtype."""
        generator = torch.Generator().manual_seed(1000 + seed)
        reference = next(p for p in model.parameters() if p.is_floating_point())
        made = self.make_inputs(generator)
        return {
            key: value.to(reference.device, reference.dtype if value.is_floating_point() else value.dtype)
            for key, value in made.items()
        }

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Loss and logits of one forward pass.

        Args:
            inputs: as `inputs` gives them; None: those of seed 0.
        """
        fed = self.inputs(model) if inputs is None else inputs
        if "x" in fed:
            logits: Tensor = model(fed["x"])
            return F.cross_entropy(logits.float(), fed["labels"]), logits
        out = model(**fed)
        return out.loss, out.logits


class Perceptron(nn.Module):
    """A plain module of Linear layers, with no config and nothing of transformers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (batch, 16). Returns: (batch, classes)."""
        hidden = torch.tanh(self.first(x))
        logits: Tensor = self.out(torch.tanh(self.second(self.norm(hidden))))
        return logits


def _tokens(generator: torch.Generator, batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(4, VOCABULARY, (batch, length), generator=generator)


def _causal(generator: torch.Generator) -> dict[str, Tensor]:
    ids = _tokens(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _sequence(generator: torch.Generator) -> dict[str, Tensor]:
    ids = _tokens(generator)
    labels = torch.randint(0, CLASSES, (2,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _each_token(generator: torch.Generator) -> dict[str, Tensor]:
    ids = _tokens(generator)
    labels = torch.randint(0, CLASSES, tuple(ids.shape), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _two_texts(generator: torch.Generator) -> dict[str, Tensor]:
    ids = _tokens(generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": _tokens(generator, length=5)}


def _image(generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, CLASSES, (2,), generator=generator)}


def _vectors(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "x": torch.randn(6, 16, generator=generator),
        "labels": torch.randint(0, CLASSES, (6,), generator=generator),
    }


def _build(model: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**fields))
        return made

    return make


_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
    "num_labels": CLASSES,
}
_TEXT = frozenset({"text", "checkpointing", "rows"})
_GENERATES = _TEXT | {"causal", "generate"}


def _all() -> dict[str, Backbone]:
    def decoder(name: str, model: str, config: str, block: str, **fields: Any) -> Backbone:
        return Backbone(
            name=name, make=_build(model, config, **fields), make_inputs=_causal, block=block, features=_GENERATES
        )

    found = [
        decoder("llama", "LlamaForCausalLM", "LlamaConfig", "model.layers.0", **_DECODER),
        decoder(
            "gpt2",
            "GPT2LMHeadModel",
            "GPT2Config",
            "transformer.h.0",
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.15,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        ),
        Backbone(
            name="bert",
            make=_build("BertForSequenceClassification", "BertConfig", **_ENCODER),
            make_inputs=_sequence,
            block="bert.encoder.layer.0",
            features=_TEXT,
        ),
        Backbone(
            name="roberta",
            make=_build("RobertaForTokenClassification", "RobertaConfig", **_ENCODER),
            make_inputs=_each_token,
            block="roberta.encoder.layer.0",
            features=_TEXT,
        ),
        Backbone(
            name="deberta",
            make=_build(
                "DebertaV2ForSequenceClassification",
                "DebertaV2Config",
                **_ENCODER,
                relative_attention=True,
                position_buckets=8,
                pos_att_type=["p2c", "c2p"],
                share_att_key=True,
                norm_rel_ebd="layer_norm",
                position_biased_input=False,
                pooler_hidden_size=WIDTH,
            ),
            make_inputs=_sequence,
            block="deberta.encoder.layer.0",
            # Its projections are given relative positions too, which all rows share.
            features=_TEXT - {"rows"},
        ),
        Backbone(
            name="vit",
            make=_build(
                "ViTForImageClassification",
                "ViTConfig",
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=8,
                patch_size=4,
                initializer_range=0.15,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                num_labels=CLASSES,
            ),
            make_inputs=_image,
            block="vit.layers.0",
            features=frozenset({"checkpointing", "rows"}),
        ),
        Backbone(
            name="t5",
            make=_build(
                "T5ForConditionalGeneration",
                "T5Config",
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                d_kv=8,
                d_ff=2 * WIDTH,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                initializer_factor=1.0,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=None,
            ),
            make_inputs=_two_texts,
            block="encoder.block.0",
            features=_TEXT | {"generate"},
        ),
        Backbone(
            name="bart",
            make=_build(
                "BartForConditionalGeneration",
                "BartConfig",
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=2 * WIDTH,
                decoder_ffn_dim=2 * WIDTH,
                max_position_embeddings=64,
                init_std=0.15,
                dropout=0.0,
                attention_dropout=0.0,
                activation_dropout=0.0,
                decoder_start_token_id=2,
                bos_token_id=1,
                pad_token_id=0,
                eos_token_id=None,
                forced_eos_token_id=None,
            ),
            make_inputs=_two_texts,
            block="model.encoder.layers.0",
            features=_TEXT | {"generate"},
        ),
        decoder(
            "opt",
            "OPTForCausalLM",
            "OPTConfig",
            "model.decoder.layers.0",
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            init_std=0.15,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        decoder("qwen2", "Qwen2ForCausalLM", "Qwen2Config", "model.layers.0", **_DECODER),
        decoder("mistral", "MistralForCausalLM", "MistralConfig", "model.layers.0", **_DECODER),
        Backbone(name="mlp", make=Perceptron, make_inputs=_vectors, block="", features=frozenset({"rows"})),
    ]
    return {backbone.name: backbone for backbone in found}


BACKBONES: Mapping[str, Backbone] = _all()
"""Every tiny backbone by name."""
