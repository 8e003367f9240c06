"""nf4_linear and nf4_lora_linear: gradients, graphs, autocast, and the public functions around the operation."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peftkit_kernels._case import assert_within, rounding
from peftkit_kernels._op import NAMESPACE
from peftkit_kernels.nf4_linear import OP, cases, nf4_linear, nf4_lora_linear, reference
from peftkit_kernels.quantize_blockwise import dequantize_blockwise, quantize_blockwise

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def layer(out, width, rank=4, dtype=torch.float32, seed=0, block=64):
    """Codes and scales of a weight, down, up and bias."""
    g = torch.Generator().manual_seed(seed)
    quantized = quantize_blockwise(0.1 * torch.randn(out, width, generator=g), block=block)
    down, up, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((rank, width), (out, rank), (out,)))
    return quantized, down.to(dtype), up.to(dtype), bias.to(dtype)


def normal(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    out=st.integers(1, 90),
    width=st.one_of(st.integers(1, 200), st.sampled_from([64, 128, 192, 256, 320, 512])),
    rank=st.integers(0, 9),
    block=st.sampled_from((32, 64, 128)),
    dtype=st.sampled_from((*FLOATS, torch.float64)),
    lora=st.booleans(),
    step=st.sampled_from((1, 2)),
    flip=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides_are_within_the_bound(rows, out, width, rank, block, dtype, lora, step, flip, seed):
    quantized, down, up, bias = layer(out, width, rank, dtype, seed, block)
    x = normal(width, rows * step, dtype=dtype).t() if flip else normal(rows * step, width, dtype=dtype)
    x = x[::step]
    codes, sizes = quantized.codes.view(-1, 1), quantized.absmax
    if lora:
        down = down.t().contiguous().t()
        found = nf4_lora_linear(x, codes, sizes, (out, width), down, up, cases.SCALE, block, bias)
        arguments = (x, codes, sizes, out, block, bias, down, up, cases.SCALE)
    else:
        found = nf4_linear(x, codes, sizes, (out, width), block, bias)
        arguments = (x, codes, sizes, out, block, bias, None, None, cases.SCALE)
    cases.check_linear(arguments, arguments, found)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_those_of_finite_differences(rows, lora):
    quantized, down, up, bias = layer(6, 10, 3, torch.float64)
    x = normal(rows, 10, dtype=torch.float64)
    codes, sizes = quantized.codes, quantized.absmax

    def run(x, bias, down, up):
        if lora:
            return nf4_lora_linear(x, codes, sizes, (6, 10), down, up, 0.7, 64, bias)
        return nf4_linear(x, codes, sizes, (6, 10), 64, bias)

    parts = [t.requires_grad_() for t in (x, bias, down, up)]
    torch.autograd.gradcheck(run, parts if lora else parts[:2] + [p.detach() for p in parts[2:]])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_gradients_of_compiled_code_are_those_of_dense_layers(dtype, rows):
    quantized, down, up, bias = layer(70, 128, 8, dtype)
    leaves = [t.requires_grad_() for t in (normal(rows, 128, dtype=dtype), down, up, bias)]
    x, down, up, bias = leaves
    seed = normal(rows, 70, dtype=dtype)
    out = nf4_lora_linear(x, quantized.codes, quantized.absmax, (70, 128), down, up, 0.5, 64, bias)
    found = torch.autograd.grad(out, leaves, seed)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    weight = dequantize_blockwise(quantized, torch.float64)
    dense = wide[0] @ weight.t() + 0.5 * (wide[0] @ wide[1].t()) @ wide[2].t() + wide[3]
    for name, own, wanted in zip(
        ("x", "down", "up", "bias"), found, torch.autograd.grad(dense, wide, seed.double()), strict=True
    ):
        assert own.dtype == dtype
        # Three roundings to the dtype on the way, of terms that are a few times the size of their sum.
        error = (own.double() - wanted).norm() / wanted.norm()
        assert error < 4 * cases.EPSILON[dtype] + 1e-6, (name, float(error))


def test_only_the_input_is_kept_for_the_gradients():
    quantized, down, up, _ = layer(64, 128, 8)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        x = normal(30, 128).requires_grad_()
        nf4_lora_linear(x, quantized.codes, quantized.absmax, (64, 128), down.requires_grad_(), up.requires_grad_())
    fresh = [
        t for t in held if t.data_ptr() not in {v.data_ptr() for v in (down, up, quantized.codes, quantized.absmax)}
    ]
    assert [t.data_ptr() for t in fresh] == [x.data_ptr()]


# torch's own compiler makes an instance of an autograd function to look at it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("rows", [2, 24])
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_graph_is_whole_and_gives_the_same(rows, grad):
    quantized, down, up, bias = layer(40, 64, 4, torch.bfloat16)

    def run(x, down, up):
        return nf4_lora_linear(x, quantized.codes, quantized.absmax, (40, 64), down, up, 2.0, 64, bias).sum(-1)

    x = normal(rows, 64, dtype=torch.bfloat16)
    leaves = [t.clone().requires_grad_(grad) for t in (x, down, up)]
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    wanted = run(*leaves)
    assert torch.equal(found, wanted)
    if grad:
        for own, other in zip(
            torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
        ):
            assert torch.equal(own, other)


def test_autocast_computes_in_its_dtype():
    quantized, down, up, _ = layer(40, 64)
    x = normal(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = nf4_lora_linear(x, quantized.codes, quantized.absmax, (40, 64), down, up)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, nf4_lora_linear(x.bfloat16(), quantized.codes, quantized.absmax, (40, 64), down, up))


def test_leading_dimensions_and_meta_tensors():
    quantized, down, up, bias = layer(40, 64)
    x = normal(2, 3, 64)
    found = nf4_linear(x, quantized.codes, quantized.absmax, (40, 64), bias=bias)
    assert found.shape == (2, 3, 40)
    assert torch.equal(
        found[1, 2:3], nf4_linear(x.view(6, 64), quantized.codes, quantized.absmax, (40, 64), bias=bias)[5:]
    )
    meta = [t.to("meta") for t in (x, quantized.codes, quantized.absmax)]
    out = nf4_lora_linear(*meta, (40, 64), down.to("meta"), up.to("meta"))
    assert (out.shape, out.device.type) == ((2, 3, 40), "meta")
    assert nf4_linear(normal(64), quantized.codes, quantized.absmax, (40, 64)).shape == (40,)


def test_numbers_are_as_near_as_those_of_bitsandbytes():
    logging.disable(logging.WARNING)  # bitsandbytes warns that it cannot reach a hub
    theirs = pytest.importorskip("bitsandbytes", reason="no bitsandbytes")
    logging.disable(logging.NOTSET)
    weight = 0.02 * normal(256, 512)
    quantized = quantize_blockwise(weight)
    codes, state = theirs.functional.quantize_4bit(weight, quant_type="nf4")
    dense = theirs.functional.dequantize_4bit(codes, state).double()
    for rows in (1, 6, 40):
        x = normal(rows, 512, dtype=torch.bfloat16)
        wanted = x.double() @ dense.t()
        own = nf4_linear(x, quantized.codes, quantized.absmax, (256, 512)).double()
        other = theirs.matmul_4bit(x, codes, state).double()
        assert (own - wanted).norm() <= 1.1 * (other - wanted).norm()


def test_threads_do_not_disturb_each_other():
    quantized, down, up, _ = layer(300, 256, 8, torch.bfloat16)
    inputs = [normal(rows, 256, dtype=torch.bfloat16, seed=rows) for rows in (1, 8, 16, 17, 64)] * 3

    def run(x):
        return nf4_lora_linear(x, quantized.codes, quantized.absmax, (300, 256), down, up)

    wanted = [run(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(run, inputs), wanted, strict=True))


@pytest.mark.parametrize("function", OP.functions, ids=lambda f: f.name)
def test_schema_and_fake_are_those_of_the_code(function):
    for case in cases.cases():
        if (
            case.function is function
            and case.label.startswith(("7x40", "40x130"))
            and "bfloat16-bfloat16" in case.label
        ):
            found = torch.library.opcheck(
                getattr(getattr(torch.ops, NAMESPACE), function.name).default,
                case.inputs(torch.Generator().manual_seed(0), torch.device("cpu")),
                test_utils=("test_schema", "test_faketensor"),
            )
            assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3, 65)}, ValueError, r"x is \(3, 65\); expected \(\.\.\., 64\)"),
        ({"x": torch.ones(3, 64).int()}, TypeError, "x is torch.int32"),
        ({"x": torch.ones(3, 64).double()}, TypeError, "float64 does not mix"),
        ({"codes": torch.zeros(1279, dtype=torch.uint8)}, ValueError, "expected 1280 codes and 40 scales.*found 1279"),
        ({"codes": torch.zeros(1280, dtype=torch.int8)}, TypeError, "codes are torch.int8"),
        ({"absmax": torch.zeros(40, dtype=torch.uint8)}, TypeError, r"Quantized.sizes\(\)"),
        ({"absmax": torch.zeros(40, device="meta")}, ValueError, "absmax on meta; move them together"),
        ({"shape": (40,)}, ValueError, r"expected \(out, in\)"),
        ({"block": 63}, ValueError, "block is 63"),
        ({"bias": torch.ones(41)}, ValueError, r"bias is \(41,\); expected \(40,\)"),
        ({"down": torch.ones(4, 63)}, ValueError, r"expected down \(r, 64\) and up \(40, r\)"),
        ({"up": torch.ones(40, 5)}, ValueError, r"found \(4, 64\) and \(40, 5\)"),
    ],
)
def test_refusals_say_what_was_expected(change, error, message):
    quantized, down, up, bias = layer(40, 64)
    arguments = {
        "x": torch.ones(3, 64), "codes": quantized.codes, "absmax": quantized.absmax, "shape": (40, 64), "down": down,
        "up": up, "bias": bias,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        nf4_lora_linear(**{**arguments, **change})


def test_reference_is_the_dense_layer():
    quantized, down, up, bias = layer(9, 21, 2, torch.float64)
    x = normal(4, 21, dtype=torch.float64)
    weight = dequantize_blockwise(quantized, torch.float64).view(9, 21)
    found = reference.nf4_linear(x, quantized.codes, quantized.absmax, 9, 64, bias, down, up, 3.0)
    torch.testing.assert_close(found, x @ (weight + 3.0 * up @ down).t() + bias, rtol=1e-12, atol=1e-12)


# Groups of rows, tiles of the weight and parts of its columns that are and are not whole.
@pytest.mark.parametrize("rows", [3, 4, 7, 13, 19, 64, 128, 129])
@pytest.mark.parametrize(("out", "width"), [(37, 2176), (3, 128)])
@pytest.mark.parametrize("block", [64, 128])
def test_tiles_of_the_weight_are_those_of_double(rows, out, width, block):
    quantized, down, up, bias = layer(out, width, 5, torch.bfloat16, rows, block)
    x, codes, sizes = normal(rows, width, dtype=torch.bfloat16), quantized.codes, quantized.absmax
    found = nf4_lora_linear(x, codes, sizes, (out, width), down, up, cases.SCALE, block, bias)
    wide = (bias.double(), down.double(), up.double())
    expected = reference.nf4_linear(x.double(), codes, sizes, out, block, *wide, cases.SCALE)
    weight = reference.weight_of(codes, sizes, out, width, block, torch.float64)
    bound = cases.bound_of(x, weight, down, up, bias)
    assert_within(found, expected, bound + rounding(x.dtype, expected.abs() + bound), "nf4_lora_linear")
