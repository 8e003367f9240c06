"""What the tests of the language tasks share: tiny models with a tokenizer in a folder, and splits ready to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peftkit_bench.pretrain import train_tokenizer
from peftkit_bench.tasks.contract import Prepared, Split, Task
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

TEXT = "def add(first, second):\n    return first + second\n\nthe quick brown fox jumps over the lazy dog 0123456789\n"


def ids(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}


def stored(folder: Path, kind: str) -> str:
    """The folder of a tiny random decoder ("llama") or encoder-decoder ("t5") with a tokenizer."""
    tokenizer = train_tokenizer(iter([TEXT] * 3), 300)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model: Any
        if kind == "llama":
            model = LlamaForCausalLM(
                LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                            num_attention_heads=2, tie_word_embeddings=True, initializer_range=0.3, **ids(tokenizer))
            )  # fmt: skip
        else:
            tokenizer.backend_tokenizer.post_processor = None
            model = T5ForConditionalGeneration(
                T5Config(vocab_size=300, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
                         decoder_start_token_id=tokenizer.pad_token_id, tie_word_embeddings=True, **ids(tokenizer))
            )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prepared(task: Task, folder: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Prepared:
    """The rows read and encoded, as the engine has them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = {name: tuple(task.read(row) for row in found) for name, found in rows.items()}
    facts = task.facts(read)
    return Prepared(
        folder=folder,
        backbone={},
        data={},
        facts=facts,
        splits={
            name: Split(
                rows=found,
                encoded=tuple(task.encode(tokenizer, row, facts) for row in found),
                groups=tuple(range(len(found))),
            )
            for name, found in read.items()
        },
        padding=tokenizer.pad_token_id,
    )


def trained(task: Task, model: nn.Module, ready: Prepared, *, steps: int, rate: float) -> list[float]:
    """The losses of training on the whole split "train" as one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    batch = task.collate(ready.splits["train"].encoded, ready.padding)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses
