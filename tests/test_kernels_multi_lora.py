"""Low-rank updates whose adapter differs from row to row: gradients, compilers, layouts, errors."""

from __future__ import annotations

import dataclasses
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peftkit_kernels._case import EPSILON, assert_within, rounding
from torch import Tensor

# The package gives the function this name, which hides the module.
ml = sys.modules["peftkit_kernels.multi_lora"]


def problem(rows, width, out, ranks, dtype=torch.float32, factor=None, seed=0):
    """Base, x, a stack of adapters, and an adapter for each row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factor = factor or dtype
    adapters = [(normal(r, width).to(factor), normal(out, r).to(factor), 0.5 + i) for i, r in enumerate(ranks)]
    adapter = torch.randint(-1, len(ranks), (rows,), generator=generator)
    return normal(rows, out).to(dtype), normal(rows, width).to(dtype), ml.stacked(adapters), adapter


def wanted(base, x, stack, adapter):
    """Row by row in float64, and the sum of the absolute terms."""
    found, size = base.double().clone(), base.double().abs().clone()
    for row, own in enumerate(adapter.tolist()):
        if own >= 0:
            first, last = int(stack.starts[own]), int(stack.starts[own + 1])
            down, up = stack.down[first:last].double(), stack.up[first:last].double()
            found[row] += stack.scales[own].double() * ((x[row].double() @ down.t()) @ up)
            size[row] += stack.scales[own].double().abs() * ((x[row].double().abs() @ down.abs().t()) @ up.abs())
    return found, size


def assert_right(found, base, x, stack, adapter):
    """`in` roundings of the intermediate, one a rank, three more, all in float32, and one to the dtype of base."""
    exact, size = wanted(base, x, stack, adapter)
    room = (x.shape[1] + stack.max_rank + 4) * EPSILON[torch.float32] * 1.01 * size + 2.0**-140
    assert_within(found, exact, room + rounding(base.dtype, exact.abs() + room), "multi_lora")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 80),
    out=st.integers(1, 80),
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    factor=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["whole", "every second", "transposed"]),
    seed=st.integers(0, 2**31),
)
def test_every_shape_dtype_and_layout(rows, width, out, ranks, dtype, factor, layout, seed):
    base, x, stack, adapter = problem(rows, width, out, ranks, dtype, factor, seed)
    if layout == "every second":
        base, x = (torch.stack((t, t + 1), dim=1).flatten(0, 1)[::2] for t in (base, x))
        adapter = torch.stack((adapter, adapter), dim=1).flatten()[::2]
    elif layout == "transposed":
        base, x = (t.t().contiguous().t() for t in (base, x))
    before = base.clone()
    assert_right(ml.multi_lora(base, x, stack, adapter), before, x, stack, adapter)
    assert torch.equal(base, before), "base has changed"
    ml.multi_lora_(base, x, stack, adapter)
    assert_right(base, before, x, stack, adapter)


def test_gradients_are_those_of_finite_differences():
    base, x, stack, adapter = problem(6, 5, 4, (2, 3, 1), torch.float64)
    adapter = torch.tensor([0, 2, -1, 0, 2, 0])  # the second adapter has no row

    def call(base, x, down, up):
        return ml.multi_lora(base, x, dataclasses.replace(stack, down=down, up=up), adapter)

    leaves = tuple(t.clone().requires_grad_() for t in (base, x, stack.down, stack.up))
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_autograd_over_the_reference(dtype):
    base, x, stack, adapter = problem(23, 70, 50, (4, 9, 2), dtype)
    weight = torch.randn(23, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    found = [t.clone().requires_grad_() for t in (base, x, stack.down, stack.up)]
    out = ml.multi_lora(found[0], found[1], dataclasses.replace(stack, down=found[2], up=found[3]), adapter)
    out.backward(weight)
    exact = [t.detach().double().requires_grad_() for t in found]
    for row, own in enumerate(adapter.tolist()):
        whole = exact[0][row]
        if own >= 0:
            ranks = slice(int(stack.starts[own]), int(stack.starts[own + 1]))
            whole = whole + stack.scales[own].double() * (exact[1][row] @ exact[2][ranks].t()) @ exact[3][ranks]
        whole.backward(weight[row].double())
    for name, mine, other in zip(("base", "x", "down", "up"), found, exact, strict=True):
        assert mine.grad.dtype == dtype
        error = (mine.grad.double() - other.grad).norm() / other.grad.norm()
        assert error < 2 * EPSILON[dtype] + 1e-6, (name, float(error))


def test_gradients_only_of_what_wants_them():
    base, x, stack, adapter = problem(5, 8, 6, (2, 2))
    x.requires_grad_()
    ml.multi_lora(base, x, stack, adapter).sum().backward()
    assert x.grad is not None
    assert stack.down.grad is None


def test_adapter_of_each_sequence_stands_for_all_of_its_tokens():
    base, x, stack, _ = problem(12, 8, 6, (2, 3))
    adapter = torch.tensor([1, -1, 0])
    found = ml.multi_lora(base.view(3, 4, 6), x.view(3, 4, 8), stack, adapter.to(torch.int32))
    assert found.shape == (3, 4, 6)
    assert_right(found.view(12, 6), base, x, stack, adapter.repeat_interleave(4))


def test_base_of_none_is_zero():
    base, x, stack, adapter = problem(5, 8, 6, (2, 3))
    assert torch.equal(ml.multi_lora(None, x, stack, adapter), ml.multi_lora(base * 0, x, stack, adapter))


def test_adapters_that_the_batch_does_not_use_are_not_read():
    base, x, stack, _ = problem(6, 8, 6, (2, 3, 4))
    adapter = torch.tensor([0, 2, -1, 0, 2, 2])
    clean = ml.multi_lora(base, x, stack, adapter)
    stack.down[2:5] = float("nan")
    stack.up[2:5] = float("nan")
    assert torch.equal(ml.multi_lora(base, x, stack, adapter), clean)


def test_rows_do_not_depend_on_their_order():
    base, x, stack, adapter = problem(30, 40, 20, (4, 7, 2), torch.bfloat16)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    found = ml.multi_lora(base[order], x[order], stack, adapter[order])
    assert_right(found, base[order], x[order], stack, adapter[order])


# torch's tracer makes the object that torch's own warning is about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_whole_graph_is_compiled_with_its_gradients():
    base, x, stack, adapter = problem(9, 16, 12, (2, 5), torch.float32)
    leaves = [t.clone().requires_grad_() for t in (base, x, stack.down, stack.up)]

    def call(base, x, down, up):
        return ml.multi_lora(base, x, dataclasses.replace(stack, down=down, up=up), adapter).square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    wanted_grads = torch.autograd.grad(call(*leaves), leaves)
    found_grads = torch.autograd.grad(compiled(*leaves), leaves)
    for found, exact in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(found, exact)


def test_meta_tensors_give_shapes():
    base, x, stack, adapter = (
        v.to("meta") if isinstance(v, Tensor) else v for v in problem(9, 16, 12, (2, 5), torch.bfloat16)
    )
    stack = ml.Stack(
        **{
            f.name: v.to("meta") if isinstance(v := getattr(stack, f.name), Tensor) else v
            for f in dataclasses.fields(stack)
        }
    )
    found = ml.multi_lora(base, x, stack, adapter)
    assert (found.shape, found.dtype, found.device.type) == ((9, 12), torch.bfloat16, "meta")


def test_autocast_leaves_the_dtypes_that_were_given():
    _, x, stack, adapter = problem(9, 16, 12, (2, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear = torch.nn.functional.linear(x, torch.eye(12, 16))
        found = ml.multi_lora(linear, x, stack, adapter)
    assert found.dtype == torch.bfloat16
    assert_right(found, linear, x, stack, adapter)


def test_threads_at_once_give_what_one_gives():
    problems = [problem(64, 700, 900, (40, 8, 64), torch.bfloat16, seed=seed) for seed in range(4)]
    alone = [ml.multi_lora(*p) for p in problems]
    gate = threading.Barrier(4)

    def work(place):
        gate.wait()
        return all(torch.equal(ml.multi_lora(*problems[place]), alone[place]) for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def arguments(**changes):
    base, x, stack, adapter = problem(4, 8, 6, (2, 3))
    parts = {name: changes.pop(name) for name in list(changes) if name in ("down", "up", "starts", "scales")}
    values = {"base": base, "x": x, "stack": dataclasses.replace(stack, **parts), "adapter": adapter, **changes}
    return tuple(values[name] for name in ("base", "x", "stack", "adapter"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(4, 7)}, ValueError, r"expected x \(\.\.\., in\).*x \(4, 7\), down \(5, 8\)"),
        ({"base": torch.ones(4, 5)}, ValueError, r"expected base \(4, 6\) beside x \(4, 8\).*found \(4, 5\)"),
        ({"starts": torch.tensor([0, 5])}, ValueError, r"starts \(adapters \+ 1,\).*found \(2,\) and \(2,\)"),
        ({"adapter": torch.zeros(3, dtype=torch.int64)}, ValueError, r"an adapter for each row.*found \(3,\)"),
        ({"adapter": torch.tensor([0, 1, 2, 0])}, ValueError, "adapter names 2; there are 2, counted from 0"),
        ({"adapter": torch.tensor([0, 1, -2, 0])}, ValueError, "adapter names -2"),
        ({"adapter": torch.zeros(4)}, TypeError, "adapter is torch.float32; expected int64 or int32"),
        ({"x": torch.ones(4, 8).int()}, TypeError, "x is torch.int32"),
        ({"x": torch.ones(4, 8).double()}, TypeError, "float64 does not mix"),
        ({"up": torch.ones(5, 6).bfloat16()}, TypeError, "down is torch.float32 and up torch.bfloat16"),
        ({"scales": torch.ones(2).half()}, TypeError, "scales are torch.float16; expected float32"),
        ({"up": torch.ones(5, 6, device="meta")}, ValueError, "x is on cpu and up on meta; move them together"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    for function in (ml.multi_lora, ml.multi_lora_):
        with pytest.raises(error, match=message):
            function(*arguments(**changes))


def test_stacking_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="at least one adapter"):
        ml.stacked([])
    with pytest.raises(
        ValueError, match=r"up \(6, r\) of every adapter, found down \(2, 8\) and up \(5, 2\) of adapter 1"
    ):
        ml.stacked([(torch.ones(3, 8), torch.ones(6, 3), 1.0), (torch.ones(2, 8), torch.ones(5, 2), 1.0)])


def test_stacking_gives_gradients_back_to_the_factors():
    base, x, _, adapter = problem(4, 8, 6, (2, 3))
    factors = [(torch.ones(r, 8, requires_grad=True), torch.ones(6, r, requires_grad=True), 1.0) for r in (2, 3)]
    ml.multi_lora(base, x, ml.stacked(factors), torch.zeros_like(adapter)).sum().backward()
    assert factors[0][0].grad.abs().sum() > 0
    assert factors[1][1].grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("starts", "message"), [((0, 2, 9), "expected at most 3 of 5"), ((0, 4, 2), "has the ranks from 4 to 2")]
)
def test_damaged_starts_are_refused_by_compiled_code(starts, message):
    if not ml.OP.compiled_for("cpu"):
        pytest.skip("no compiled code of multi_lora for cpu")
    base, x, stack, _ = problem(4, 8, 6, (2, 3))
    damaged = dataclasses.replace(stack, starts=torch.tensor(starts))
    with pytest.raises(RuntimeError, match=message):
        ml.multi_lora(base, x, damaged, torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize("rows", [3, 32, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_and_updates_in_one_call(rows, bias):
    _, x, stack, adapter = problem(rows, 64, 37, (4, 2, 7), torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    weight, offset = (torch.randn(*s, generator=generator).bfloat16() for s in ((37, 64), (37,)))
    base = torch.nn.functional.linear(x.double(), weight.double(), offset.double() if bias else None)
    expected, size = wanted(base, x, stack, adapter)
    size = size + x.double().abs() @ weight.double().abs().t()
    found = ml.multi_lora_linear(x, weight, offset if bias else None, stack, adapter)
    slack = 90 * EPSILON[torch.float32] * size + 2 * rounding(torch.bfloat16, base.abs() + expected.abs() + 1e-3)
    assert_within(found, expected, slack, "layer and updates")
