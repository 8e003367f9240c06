"""Rows with adapters of their own: against peft's `adapter_names` and against gathering the factors of every row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftkit_bench.ops import Comparison, Setting

SIZE, RANK = 4096, 16


class _Free(nn.Linear):
    """A layer whose output is there already, so that only what is added to it takes time."""

    given: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The output that was given."""
        return self.given


class _Problem:
    """A frozen bfloat16 layer, adapters of one rank, and a batch whose rows take them in turn."""

    def __init__(self, device: torch.device, rows: int, adapters: int, dtype: torch.dtype) -> None:
        from peftkit_kernels.multi_lora import stacked

        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return 0.02 * torch.randn(*shape, generator=generator)

        self.layer = nn.Linear(SIZE, SIZE, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)
        self.layer.weight.data.copy_(normal(SIZE, SIZE))
        self.factors = [
            (normal(RANK, SIZE).to(device, dtype), normal(SIZE, RANK).to(device, dtype)) for _ in range(adapters)
        ]
        self.stack = stacked([(down, up, 1.0) for down, up in self.factors])
        self.x = normal(rows, SIZE).to(device, torch.bfloat16)
        self.adapter = torch.arange(rows, device=device) % adapters

    def theirs(self, dtype: torch.dtype, out: Tensor | None = None) -> Callable[[], Any]:
        """peft's mixed batch over the same layer, its adapters in a dtype; given `out`, the update alone."""
        import peft

        layer_of_theirs: nn.Linear = self.layer
        if out is not None:
            layer_of_theirs = _Free(SIZE, SIZE, bias=False, device=out.device, dtype=out.dtype)
            layer_of_theirs.given = out
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
        model = peft.get_peft_model(nn.Sequential(layer_of_theirs), config, adapter_name="0")
        for place in range(1, len(self.factors)):
            model.add_adapter(str(place), config)
        layer: Any = model.eval().base_model.model[0]
        for place, (down, up) in enumerate(self.factors):
            for factor, part in ((layer.lora_A, down), (layer.lora_B, up)):
                factor[str(place)].to(dtype).weight.data.copy_(part)
        names = [str(place) for place in self.adapter.tolist()]
        return functools.partial(layer, self.x, adapter_names=names)


def _with_layer(device: torch.device, rows: int, adapters: int) -> Setting:
    from peftkit_kernels.multi_lora import multi_lora_linear

    problem = _Problem(device, rows, adapters, torch.bfloat16)
    return Setting(
        calls={
            "peftkit": lambda: multi_lora_linear(problem.x, problem.layer.weight, None, problem.stack, problem.adapter),
            "peft": torch.no_grad()(problem.theirs(torch.bfloat16)),
            "peft, adapters in its default float32": torch.no_grad()(problem.theirs(torch.float32)),
            "the layer alone": torch.no_grad()(functools.partial(problem.layer, problem.x)),
        }
    )


def _alone(device: torch.device, rows: int, adapters: int) -> Setting:
    from peftkit_kernels.multi_lora import multi_lora_

    problem = _Problem(device, rows, adapters, torch.bfloat16)
    down = torch.stack([down for down, _ in problem.factors])
    up = torch.stack([up for _, up in problem.factors])
    x, own = problem.x, problem.adapter
    out = torch.zeros(rows, SIZE, device=device, dtype=torch.bfloat16)

    @torch.no_grad()
    def gathered() -> Tensor:
        hidden = torch.einsum("nri,ni->nr", down[own], x)
        return out.add_(torch.einsum("nor,nr->no", up[own], hidden))

    @torch.no_grad()
    def looped() -> None:
        for index in own.unique().tolist():
            picked = (own == index).nonzero()[:, 0]
            out[picked] += (x[picked] @ down[index].t()) @ up[index].t()

    return Setting(
        calls={
            "peftkit": lambda: multi_lora_(out, x, problem.stack, own),
            "gather + einsum": gathered,
            "peft": torch.no_grad()(problem.theirs(torch.bfloat16, out)),
            "a loop over adapters": looped,
        }
    )


def _training(device: torch.device, rows: int, adapters: int) -> Setting:
    import dataclasses

    from peftkit_kernels.multi_lora import multi_lora

    problem = _Problem(device, rows, adapters, torch.bfloat16)
    x = problem.x.requires_grad_()
    base, grad = torch.zeros(2, rows, SIZE, device=device, dtype=torch.bfloat16)
    stack = dataclasses.replace(
        problem.stack, down=problem.stack.down.requires_grad_(), up=problem.stack.up.requires_grad_()
    )
    factors = [(d.clone().requires_grad_(), u.clone().requires_grad_()) for d, u in problem.factors]
    places = [(problem.adapter == index).nonzero()[:, 0] for index in range(adapters)]

    def ours() -> Any:
        out = multi_lora(base, x, stack, problem.adapter)
        return torch.autograd.grad(out, (x, stack.down, stack.up), grad)

    def looped() -> Any:
        out = base.clone()
        for (down, up), place in zip(factors, places, strict=True):
            out = out.index_add(0, place, (x[place] @ down.t()) @ up.t())
        return torch.autograd.grad(out, (x, *(factor for pair in factors for factor in pair)), grad)

    return Setting(calls={"peftkit": ours, "a loop over adapters": looped})


def comparisons() -> Iterator[Comparison]:
    """One row an adapter, as many rows on few adapters, and a training step; bfloat16 throughout."""
    of_adapter, of_layer = 2 * RANK * SIZE * 2, 2 * SIZE * SIZE
    for rows, adapters in ((32, 32), (32, 4), (1, 1)):
        what = f"bfloat16 {SIZE}x{SIZE}, r {RANK}, {rows} rows / {adapters} adapters"
        moved = of_adapter * adapters + 4 * rows * SIZE
        work = 4 * rows * RANK * SIZE
        yield Comparison(
            op="multi_lora",
            label=f"with the layer, {what}",
            setting=functools.partial(_with_layer, rows=rows, adapters=adapters),
            against="peft",
            aim=2.5 if (rows, adapters) == (32, 32) else None,
            bytes=moved + of_layer,
            flops=work + 2 * rows * SIZE * SIZE,
        )
        yield Comparison(
            op="multi_lora",
            label=f"the update alone, {what}",
            setting=functools.partial(_alone, rows=rows, adapters=adapters),
            against="gather + einsum",
            aim=2 if (rows, adapters) == (32, 32) else None,
            bytes=moved + 2 * rows * SIZE,
            flops=work,
            rounds=31,
        )
    yield Comparison(
        op="multi_lora",
        label=f"the update forward and backward, bfloat16 {SIZE}x{SIZE}, r {RANK}, 512 rows / 8 adapters",
        setting=functools.partial(_training, rows=512, adapters=8),
        flops=3 * 4 * 512 * RANK * SIZE,
    )
