"""A small pretrained decoder where no hub is: a Llama of a few million parameters, taught Python source in minutes.

`decoder()` gives its folder, for `AutoModelForCausalLM.from_pretrained`; `python -m peftkit_bench.pretrain` makes it
from a shell. The text is the pretraining share of `peftkit_bench.data.python_source`, so that nothing of what that
source gives to train and test on was seen before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftkit.errors import PeftkitError, nearest
from peftkit_bench import ngrams
from peftkit_bench.data.dataset import default_cache
from peftkit_bench.data.python_source import PRETRAINING, SourceFile, share, source_files, version
from peftkit_bench.record import digest

VERSION = 1
"""Raised whenever the same sizes and sources would give another decoder; part of the cache's key."""
PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|end|>"
CARD = "pretraining.json"
VALIDATION_WINDOWS = 400
TOKENIZER_FILES = 600
"""Vocabularies are chosen on this many files."""
CHUNK = 64
"""Files that are encoded at a time."""


class PretrainError(PeftkitError, ValueError):
    """A decoder that cannot be made as asked."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a decoder, apart from the text."""

    size: str
    vocabulary: int
    """Tokens, the bytes and the special ones included."""
    hidden: int
    layers: int
    heads: int
    feed_forward: int
    context: int = 256
    """Tokens of a training window, the first of them BOS."""
    windows: int
    """Of one optimizer step."""
    at_once: int
    """Of one forward pass; `windows` is a multiple."""
    steps: int
    matrix_rate: float
    """Peak learning rate of Muon, for the matrices of the layers."""
    other_rate: float
    """Peak learning rate of AdamW, for embeddings and norms."""
    warmup: float = 0.05
    """Share of the steps over which the rates rise; they fall to 0 over the `decay` share at the end."""
    decay: float = 0.6
    package_characters: int | None
    """At most this much text of one package; None: all of it."""
    origins: tuple[str, ...] = PRETRAINING
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Tokens predicted in training, repeats counted."""
        return self.steps * self.windows * (self.context - 1)


RECIPES: Mapping[str, Recipe] = {
    recipe.size: recipe
    for recipe in (
        Recipe(size="tiny", vocabulary=4096, hidden=256, layers=4, heads=4, feed_forward=704, windows=16, at_once=8,
               steps=750, matrix_rate=0.01, other_rate=0.01, package_characters=6_000_000),
        Recipe(size="small", vocabulary=8192, hidden=384, layers=6, heads=6, feed_forward=1024, windows=32, at_once=8,
               steps=1500, matrix_rate=0.01, other_rate=0.006, package_characters=12_000_000),
        Recipe(size="base", vocabulary=8192, hidden=640, layers=12, heads=10, feed_forward=1728, windows=128,
               at_once=128, steps=2500, matrix_rate=0.006, other_rate=0.004, package_characters=None),
    )
}  # fmt: skip
"""tiny: 4 M parameters, minutes on two CPU cores. small: 13 M, an hour there. base: 65 M, for a GPU; its learning rates
and its time are carried over from the smaller ones and were never measured."""


def decoder(size: str = "tiny", *, cache: Path | None = None, steps: int | None = None, progress: bool = True) -> Path:
    """The folder of a pretrained decoder with its tokenizer: made once, and found at once from then on.

    The key is a hash of the recipe and of the names, sizes and versions of the sources; an interrupted run leaves
    nothing behind.

    Args:
        size: a name in RECIPES.
        cache: folder for finished decoders; None: `default_cache()`.
        steps: of training; None: the recipe's.
        progress: show loss and time left on stderr.

    Raises:
        PretrainError: there is no such size, or too little text.
    """
    recipe = recipe_of(size, steps)
    files = _files(recipe)
    versions = {origin: version(origin) for origin in recipe.origins}
    key = digest([VERSION, asdict(recipe), versions, [(f.source, f.path.stat().st_size) for f in files]])
    folder = (cache or default_cache()) / f"decoder-{size}-{key}"
    if not (folder / CARD).exists():
        pretrain(recipe, folder, progress=progress)
    return folder


def recipe_of(size: str, steps: int | None = None) -> Recipe:
    """The recipe of a size, with another number of steps where one is given.

    Raises:
        PretrainError: there is no such size, or the number is not positive.
    """
    if size not in RECIPES:
        raise PretrainError(f"size: {nearest(size, RECIPES)}")
    if steps is not None and steps < 1:
        raise PretrainError(f"steps: expected at least 1, found {steps}")
    return RECIPES[size] if steps is None else replace(RECIPES[size], steps=steps)


def pretrain(recipe: Recipe, folder: Path, *, progress: bool = True) -> dict[str, Any]:
    """The card of a new decoder, which is written to a folder with its tokenizer: all of it, or nothing.

    Args:
        recipe: sizes and steps.
        folder: that is not there yet.
        progress: show loss and time left on stderr.

    Raises:
        PretrainError: the folder is there already, or there is too little text.
    """
    if folder.exists():
        raise PretrainError(f"{folder}: expected a folder that is not there yet; remove it or name another")
    console = Console(stderr=True, quiet=not progress)
    files = _files(recipe)
    with console.status("choosing a vocabulary ..."):
        tokenizer = train_tokenizer(_texts(files, recipe, "pretraining"), recipe.vocabulary)
    with console.status("encoding ..."):
        training, training_bytes = encode(tokenizer, _texts(files, recipe, "pretraining"), recipe.tokens)
        wanted = VALIDATION_WINDOWS * (recipe.context - 1)
        validation, validation_bytes = encode(tokenizer, _texts(files, recipe, "general"), wanted)
    if min(len(training), len(validation)) < recipe.context:
        raise PretrainError(
            f"expected text for at least one window of {recipe.context} tokens to train and one to validate on, found "
            f"{len(training)} and {len(validation)} tokens; name more packages in the recipe's origins"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(_config(recipe, tokenizer)).to(device)
    begun = time.perf_counter()
    losses = _train(model, _windows(training, recipe, tokenizer), recipe, console)
    seconds = time.perf_counter() - begun
    nats = validation_nats(model, _windows(validation, recipe, tokenizer), recipe.at_once)
    with console.status("counting n-grams ..."):
        counted = {str(n): round(v, 4) for n, v in ngrams.nats(training, validation, 4).items()}
    card = {
        "version": VERSION,
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "tokens": recipe.tokens,
        "tokens_per_second": round(recipe.tokens / seconds),
        "passes": round(recipe.tokens / len(training), 3),
        "training_bytes": training_bytes,
        "bytes_per_token": round(validation_bytes / len(validation), 3),
        "validation_nats_per_token": round(nats, 4),
        "validation_bits_per_byte": round(nats / math.log(2) * len(validation) / validation_bytes, 4),
        "validation_tokens": len(validation),
        "ngram_validation_nats_per_token": counted,
        "losses": [round(float(np.mean(part)), 4) for part in np.array_split(losses, min(50, len(losses)))],
        "origins": {origin: version(origin) for origin in recipe.origins},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "licences": "each package's own; the text is not stored, the weights were trained on it",
    }
    _store(model, tokenizer, card, folder)
    console.print(
        f"{recipe.size}: {card['parameters']:,} parameters, {nats:.3f} nats a token on held-out files "
        f"(4-grams: {counted['4']}), {seconds:.0f} s, {folder}",
        highlight=False,
        soft_wrap=True,
    )
    return card


# Text ---------------------------------------------------------------------------------------------------------------


def _files(recipe: Recipe) -> list[SourceFile]:
    """All files of the recipe's packages that may be trained or validated on, the packages mixed by hashes."""
    found = [file for origin in recipe.origins for file in source_files(origin)]
    return sorted((f for f in found if share(f.source) != "benchmark"), key=lambda file: digest(file.source))


def _texts(files: Sequence[SourceFile], recipe: Recipe, part: str) -> Iterator[str]:
    """The texts of one share's files, of no package more than its limit, no text twice."""
    read = dict.fromkeys(recipe.origins, 0)
    seen = set()
    for file in files:
        origin = file.source.partition("/")[0]
        if share(file.source) != part or read[origin] >= (recipe.package_characters or math.inf):
            continue
        text = file.text
        if text and hash(text) not in seen:
            seen.add(hash(text))
            read[origin] += len(text)
            yield text


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS before each text; digits are tokens of their own."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(itertools.islice(texts, TOKENIZER_FILES), trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, made.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], tokens: int) -> tuple[NDArray[np.int64], int]:
    """The texts as one row of tokens, EOS after each, at most as many as asked for; and the bytes they stand for."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # a source that spells out a special token does not mean it
    found: list[NDArray[np.int64]] = []
    count = read = 0
    while count < tokens and (chunk := list(itertools.islice(texts, CHUNK))):
        for text, encoding in zip(chunk, backend.encode_batch(chunk, add_special_tokens=False), strict=True):
            found.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.int64))
            count += len(found[-1])
            read += len(text.encode())
    backend.encode_special_tokens = False
    joined = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    return joined[:tokens], round(read * min(1.0, tokens / max(1, count)))


# Model --------------------------------------------------------------------------------------------------------------


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.feed_forward,
        # Room for virtual tokens and for text that is generated; positions need no weights.
        max_position_embeddings=2 * recipe.context,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _windows(tokens: NDArray[np.int64], recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """(windows, context) int64: consecutive pieces, BOS before each."""
    usable = len(tokens) // (recipe.context - 1) * (recipe.context - 1)
    pieces = torch.from_numpy(tokens[:usable]).view(-1, recipe.context - 1)
    return torch.cat([torch.full((len(pieces), 1), tokenizer.bos_token_id), pieces], dim=1)


def _train(model: nn.Module, windows: Tensor, recipe: Recipe, console: Console) -> list[float]:
    """Trains in place, the products in bfloat16; returns the loss of each step."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rising, falling = max(1, round(recipe.warmup * recipe.steps)), max(1, round(recipe.decay * recipe.steps))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            each, lambda step: min(1.0, (step + 1) / rising, (recipe.steps - step) / falling)
        )
        for each in optimizers
    ]
    order = _order(len(windows), recipe)
    device = next(model.parameters()).device
    losses: list[float] = []
    columns = (TextColumn("pretraining"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
               TextColumn("loss {task.fields[loss]}"), TimeRemainingColumn(), TextColumn("left"))  # fmt: skip
    model.train()
    begun = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("", total=recipe.steps, loss="-")
        for step in range(recipe.steps):
            total = torch.zeros((), device=device)
            for part in next(order).split(recipe.at_once):
                loss = _loss(model, windows[part].to(device)) * (len(part) / recipe.windows)
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(others, 1.0)
            for each, schedule in zip(optimizers, schedules, strict=True):
                each.step()
                schedule.step()
                each.zero_grad(set_to_none=True)
            losses.append(float(total))
            bar.update(shown, advance=1, loss=f"{np.mean(losses[-20:]):.3f}")
            if not console.is_terminal and (step + 1) % 50 == 0:
                left = (time.perf_counter() - begun) / (step + 1) * (recipe.steps - step - 1)
                console.print(f"step {step + 1}/{recipe.steps}  loss {np.mean(losses[-20:]):.3f}  {left:.0f} s left")
    if not math.isfinite(losses[-1]):
        raise PretrainError(f"the loss is {losses[-1]} after {recipe.steps} steps; lower the recipe's learning rates")
    return losses


def _order(count: int, recipe: Recipe) -> Iterator[Tensor]:
    """The windows of each step: whole passes over all, each in a new order."""
    generator = torch.Generator().manual_seed(recipe.seed)
    waiting = torch.zeros(0, dtype=torch.int64)
    while True:
        while len(waiting) < recipe.windows:
            waiting = torch.cat([waiting, torch.randperm(count, generator=generator)])
        yield waiting[: recipe.windows]
        waiting = waiting[recipe.windows :]


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean nats of the tokens after BOS."""
    with torch.autocast(windows.device.type, torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validation_nats(model: nn.Module, windows: Tensor, at_once: int) -> float:
    """Mean nats of the tokens after BOS, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    return sum(float(_loss(model, part.to(device))) * len(part) for part in windows.split(at_once)) / len(windows)


def _store(model: Any, tokenizer: PreTrainedTokenizerFast, card: Mapping[str, Any], folder: Path) -> None:
    """Writes everything beside its place, and then moves it there in one step."""
    from peftkit_bench.quiet import quiet

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        with quiet():
            model.cpu().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another process that made the same decoder was faster.
            if not (folder / CARD).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; prints the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m peftkit_bench.pretrain", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--size", default="tiny", help=f"{', '.join(RECIPES)}; tiny where none is given")
    parser.add_argument("--out", type=Path, help="a new folder; the cache where none is given")
    parser.add_argument("--steps", type=int, help="of training; the size's own where none is given")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.out is None:
            folder = decoder(chosen.size, steps=chosen.steps, progress=not chosen.quiet)
        else:
            folder = chosen.out
            pretrain(recipe_of(chosen.size, chosen.steps), folder, progress=not chosen.quiet)
    except PeftkitError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
