"""Speed of adapted models against the backbone and against Hugging Face peft: one process, calls interleaved, medians.

Every figure is a ratio of medians in one run. Contenders are called in turn, in an order that is shuffled each round,
so that a drift of the machine's speed meets all of them alike.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peftkit
from peftkit_bench.timing import interleaved


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One contender's time in one comparison."""

    comparison: str
    """What was timed, such as "decode"."""
    method: str
    contender: str
    """base, peftkit, peftkit merged, or peft."""
    median_seconds: float
    ratio: float
    """Median over the median of the reference."""
    reference: str
    """The contender that has ratio 1."""
    rounds: int
    saved_bytes: int | None = None
    """Bytes kept for the backward pass, parameters left out; training only."""
    limit: float | None = None
    """The ratio that peftkit aims to stay under."""


def small_llama(dtype: torch.dtype = torch.float32, layers: int = 8, hidden: int = 512) -> nn.Module:
    """A random Llama: `layers` blocks, hidden size 512, 8 heads, feed-forward size 1408, 1024 tokens."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1408,
        max_position_embeddings=1024,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).to(dtype).eval()
    return model


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method in peftkit's and, where it has it, in peft's spelling."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None
    decode_limit: float
    prefill_limit: float = 1.15


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def cases() -> list[Case]:
    """The methods that are timed; all of them on every linear layer of the blocks, at the same size on both sides."""
    import peft

    targets = {"target_modules": ALL_LINEAR}
    feed_forward = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    rows: list[tuple[str, dict[str, Any], Any, float, float]] = [
        ("lora", {"r": 16, **targets}, peft.LoraConfig, 1.30, 1.15),
        ("dora", {"r": 16, "use_dora": True, **targets}, peft.LoraConfig, 1.40, 1.20),
        ("loha", {"r": 8, **targets}, peft.LoHaConfig, 1.60, 1.15),
        ("lokr", {"r": 8, **targets}, peft.LoKrConfig, 1.60, 1.15),
        ("oft", {"oft_block_size": 32, **targets}, peft.OFTConfig, 1.60, 1.15),
        ("ia3", feed_forward, peft.IA3Config, 1.10, 1.15),
        ("prefix", {"num_virtual_tokens": 20}, peft.PrefixTuningConfig, 1.30, 1.15),
    ]
    found = []
    for name, fields, theirs, decode, prefill in rows:
        entry = "lora" if name == "dora" else name
        if entry not in peftkit.METHODS:
            continue
        ours: Any = peftkit.METHODS[entry].config
        extra: dict[str, Any] = {"task_type": "CAUSAL_LM"} if name == "prefix" else {}
        found.append(
            Case(
                name=name,
                ours=functools.partial(ours, **fields),
                theirs=functools.partial(theirs, **fields, **extra),
                decode_limit=decode,
                prefill_limit=prefill,
            )
        )
    return found


def _perturb(model: nn.Module) -> None:
    """Moves adapters off their start, so that nothing is skipped because it is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def _peft_model(config: Any, dtype: torch.dtype) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = peft.get_peft_model(small_llama(dtype), config).eval()
    return model


def _contenders(case: Case, dtype: torch.dtype) -> dict[str, nn.Module]:
    models: dict[str, nn.Module] = {"base": small_llama(dtype)}
    models["peftkit"] = peftkit.wrap(small_llama(dtype), case.ours())
    if peftkit.plan(models["base"], case.ours()).method.mergeable:
        models["peftkit merged"] = peftkit.wrap(small_llama(dtype), case.ours())
    if case.theirs is not None:
        models["peft"] = _peft_model(case.theirs(), dtype)
    for name, model in models.items():
        if name != "base":
            _perturb(model)
    if "peftkit merged" in models:
        peftkit.merge(models["peftkit merged"])
    return models


def _rows(
    comparison: str,
    method: str,
    times: dict[str, list[float]],
    limit: float | None,
    reference: str = "base",
    saved: Mapping[str, int] | None = None,
) -> Iterator[Timing]:
    base = statistics.median(times[reference])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        yield Timing(
            comparison=comparison,
            method=method,
            contender=name,
            median_seconds=median,
            ratio=median / base,
            reference=reference,
            rounds=len(seconds),
            saved_bytes=saved.get(name) if saved else None,
            limit=limit if name == "peftkit" else 1.0 if name == "peftkit merged" else None,
        )


def decode(case: Case, rounds: int = 40, context: int = 32) -> Iterator[Timing]:
    """One token behind a context of 32, with a key-value cache, no gradients, float32."""
    models = _contenders(case, torch.float32)
    tokens = torch.randint(0, 1024, (1, context))
    caches: dict[str, Any] = {}
    with torch.no_grad():
        for name, model in models.items():
            caches[name] = model(input_ids=tokens, use_cache=True).past_key_values
        if case.name == "prefix" and "peft" in models:
            # generate() of peft runs the base model once the cache holds the prefix; so does this.
            models["peft"] = models["peft"].get_base_model()  # type: ignore[operator]  # a PeftModel

        def step(name: str) -> None:
            models[name](input_ids=tokens[:, :1], past_key_values=caches[name], use_cache=True)
            caches[name].crop(-1)

        times = interleaved({name: functools.partial(step, name) for name in models}, rounds)
    yield from _rows("decode", case.name, times, case.decode_limit)


def prefill(case: Case, rounds: int = 12) -> Iterator[Timing]:
    """4 x 128 tokens, no gradients, float32."""
    models = _contenders(case, torch.float32)
    tokens = torch.randint(0, 1024, (4, 128))
    with torch.no_grad():
        calls = {n: functools.partial(m, input_ids=tokens, use_cache=False) for n, m in models.items()}
        times = interleaved(calls, rounds, warm_up=2)
    yield from _rows("prefill", case.name, times, case.prefill_limit)


def saved_bytes(model: nn.Module, step: Callable[[], Any]) -> int:
    """Bytes of tensors that autograd keeps for the backward pass; a storage counts once, parameters do not count."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive: list[Any] = []  # a storage that is freed could come back under the same address

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(step())
    return sum(kept.values())


def training(name: str, dtype: torch.dtype, batch: int, limit: float, rounds: int = 8) -> Iterator[Timing]:
    """Forward and backward of `batch` x 128 tokens, rank 16 on all linear layers, in training mode.

    The base is the frozen model with gradients flowing through it from the embeddings on: what no adapter can undercut.
    """
    import peft

    fields: dict[str, Any] = {"r": 16, "target_modules": ALL_LINEAR, "use_dora": name == "dora"}
    models = {
        "base": small_llama(dtype).requires_grad_(False),
        "peftkit": peftkit.wrap(small_llama(dtype), peftkit.LoRA(**fields)),
        "peft": _peft_model(peft.LoraConfig(**fields), dtype),
    }
    embeddings = models["base"].get_input_embeddings()  # type: ignore[operator]  # a transformers model
    embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    tokens = torch.randint(0, 1024, (batch, 128))
    for contender, model in models.items():
        if contender != "base":
            _perturb(model)
        model.train()

    def loss(model: nn.Module) -> Tensor:
        found: Tensor = model(input_ids=tokens, labels=tokens).loss
        return found

    def step(model: nn.Module) -> None:
        loss(model).backward()
        model.zero_grad(set_to_none=True)

    saved = {n: saved_bytes(m, functools.partial(loss, m)) for n, m in models.items()}
    times = interleaved({n: functools.partial(step, m) for n, m in models.items()}, rounds, warm_up=1)
    label = f"training step, {batch}x128 tokens, {str(dtype).removeprefix('torch.')}"
    yield from _rows(label, name, times, limit, "peft", saved)


def wrapping(rounds: int = 5) -> Iterator[Timing]:
    """Wrapping a 32-layer Llama of hidden size 256 with rank 8 on its 224 linear layers."""
    import peft

    def fresh() -> nn.Module:
        return small_llama(layers=32, hidden=256)

    ready: dict[str, list[nn.Module]] = {n: [fresh() for _ in range(rounds + 1)] for n in ("peftkit", "peft")}

    def ours() -> None:
        peftkit.wrap(ready["peftkit"].pop(), peftkit.LoRA(target_modules=ALL_LINEAR))

    def theirs() -> None:
        peft.get_peft_model(ready["peft"].pop(), peft.LoraConfig(target_modules=ALL_LINEAR))

    times = interleaved({"peftkit": ours, "peft": theirs}, rounds, warm_up=1)
    yield from _rows("wrapping, 224 targets", "lora", times, 0.30, "peft")


def merging(rounds: int = 9, width: int = 4096) -> Iterator[Timing]:
    """Merging rank 16 into two bfloat16 layers of `width` and taking it out again; peftkit's merge with its report."""
    import peft

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(2)))

    models: dict[str, Any] = {
        "peftkit": peftkit.wrap(fresh(), peftkit.LoRA(r=16, target_modules=["0", "1"])),
        "peft": peft.get_peft_model(fresh(), peft.LoraConfig(r=16, target_modules=["0", "1"])),
    }
    for model in models.values():
        _perturb(model)

    def ours() -> None:
        peftkit.merge(models["peftkit"])
        peftkit.unmerge(models["peftkit"])

    def theirs() -> None:
        models["peft"].merge_adapter()
        models["peft"].unmerge_adapter()

    times = interleaved({"peftkit": ours, "peft": theirs}, rounds, warm_up=2)
    yield from _rows(f"merge and unmerge, 2 layers of {width}x{width}, bfloat16", "lora", times, None, "peft")


def routing(rounds: int = 20, batch: int = 8, loaded: int = 16, context: int = 32) -> Iterator[Timing]:
    """One token for each of 8 rows, each with an adapter of its own of 16 that are attached: rank 16, float32.

    The base is the backbone without adapters.
    """
    import peft

    models: dict[str, Any] = {"base": small_llama(), "peftkit": small_llama(), "peft": None}
    for place in range(loaded):
        peftkit.wrap(models["peftkit"], peftkit.LoRA(r=16, target_modules=ALL_LINEAR), name=str(place))
    config = peft.LoraConfig(r=16, target_modules=ALL_LINEAR)
    models["peft"] = peft.get_peft_model(small_llama(), config, adapter_name="0").eval()
    for place in range(1, loaded):
        models["peft"].add_adapter(str(place), config)
    names = [str(2 * row) for row in range(batch)]
    tokens = torch.randint(0, 1024, (batch, context))
    caches: dict[str, Any] = {}

    def run(name: str, chosen: Tensor, cache: Any) -> Any:
        extra = {"adapter_names": names} if name == "peft" else {}
        return models[name](input_ids=chosen, past_key_values=cache, use_cache=True, **extra).past_key_values

    def step(name: str) -> None:
        run(name, tokens[:, :1], caches[name])
        caches[name].crop(-1)

    with torch.no_grad(), peftkit.route(models["peftkit"], names):
        for name in models:
            caches[name] = run(name, tokens, None)
        times = interleaved({name: functools.partial(step, name) for name in models}, rounds)
    yield from _rows(f"{batch} rows, each with one of {loaded} adapters", "lora", times, None)


def importing(rounds: int = 7) -> Iterator[Timing]:
    """`import torch` against `import torch, peftkit`, each in a process of its own."""
    import subprocess
    import sys

    def run(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    times = interleaved({"base": run("import torch"), "peftkit": run("import torch, peftkit")}, rounds, warm_up=1)
    yield from _rows("import, beside torch", "-", times, None)


def measure(progress: Callable[[str], None] = lambda text: None, only: Sequence[str] = ()) -> list[Timing]:
    """All comparisons, some minutes on two cores.

    Args:
        progress: told what is timed next.
        only: names of the comparisons: decode, prefill, training, routing, wrapping, merging, import; none: all.

    Raises:
        ValueError: a name that is none of these.
    """
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    kinds: dict[str, list[Callable[[], Iterator[Timing]]]] = {
        "decode": [functools.partial(decode, case) for case in cases()],
        "prefill": [functools.partial(prefill, case) for case in cases()],
        "training": [
            functools.partial(training, name, dtype, batch, limit)
            for name, limit in (("lora", 0.85), ("dora", 0.50))
            for dtype in (torch.bfloat16, torch.float32)
            for batch in (1, 4)
        ],
        "routing": [routing],
        "wrapping": [wrapping],
        "merging": [merging],
        "import": [importing],
    }
    unknown = [name for name in only if name not in kinds]
    if unknown:
        raise ValueError(f"no comparison is named {unknown[0]!r}; choices: {', '.join(kinds)}")
    found: list[Timing] = []
    for name, parts in kinds.items():
        if only and name not in only:
            continue
        for number, part in enumerate(parts, 1):
            progress(f"{name} {number}/{len(parts)}")
            found += part()
    return found


def table(timings: list[Timing]) -> str:
    """The timings as a Markdown table, one row a comparison and method."""
    lines = [
        "| what | method | peftkit | merged | peft | aim | met | bytes kept for backward |",
        "|---|---|---:|---:|---:|---:|---|---|",
    ]
    groups: dict[tuple[str, str], dict[str, Timing]] = {}
    for timing in timings:
        groups.setdefault((timing.comparison, timing.method), {})[timing.contender] = timing
    for (comparison, method), row in groups.items():
        ours = row["peftkit"]
        cells = [f"{row[n].ratio:.2f}x" if n in row else "-" for n in ("peftkit", "peftkit merged", "peft")]
        if ours.reference == "peft" and "base" in row:
            comparison += f" (base {row['base'].ratio:.2f}x)"
        aim = "-" if ours.limit is None else f"≤ {ours.limit:.2f}x {ours.reference}"
        met = "-" if ours.limit is None else "yes" if ours.ratio <= ours.limit else "no"
        kept = "-"
        if ours.saved_bytes is not None:
            base, theirs = row["base"].saved_bytes or 0, row["peft"].saved_bytes or 0
            beyond = (ours.saved_bytes - base) / (theirs - base)
            kept = f"{ours.saved_bytes / theirs:.2f}x in all, {beyond:.2f}x beyond the base"
        lines.append(f"| {comparison} | {method} | {' | '.join(cells)} | {aim} | {met} | {kept} |")
    return "\n".join(lines)
