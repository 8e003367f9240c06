"""Codes for a changed weight: what they keep of the change, against independent sums in float64 and plain rounding."""

from __future__ import annotations

import pytest
import torch
from peftkit_kernels import Quantized, dequantize_blockwise, quantize_blockwise, quantize_rows

from peftkit import lattice
from peftkit.lattice import Grid, Rows, Search, decoded, encoded
from peftkit.requantization import gram_of, requantized


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(width, rows=2048, seed=1):
    """Inputs as a transformer has them: a few strong directions, the others weaker and weaker, and a mean."""
    turn = torch.linalg.qr(drawn(width, width, seed=2))[0]
    spread = torch.arange(1, width + 1) ** -0.7
    return drawn(rows, width, seed=seed) * spread @ turn + 0.1 * drawn(width, seed=3)


def case(kind="nf4", block: int | None = 64, shape=(96, 192), rank=4, size=0.03, nested=False):
    """Codes of W, W, dW of the given rank and size, and what dW reads."""
    start = encoded(drawn(*shape) * 0.05, kind, block, nested)
    weight = decoded(start)
    down = drawn(rank, shape[1], seed=4)
    change = drawn(shape[0], rank, seed=5) @ down
    if change.norm() > 0:
        change = change * (size * weight.norm() / change.norm())
    return start, weight, change, down


def measured(stored, weight, change, x=None):
    """Effect and error, in float64, from the inputs themselves."""
    moved, change = stored.double() - weight.double(), change.double()
    if x is not None:
        moved, change = moved @ x.double().T, change @ x.double().T
    power = change.square().sum()
    return float((moved * change).sum() / power), float((moved - change).norm() / power.sqrt())


FORMATS = {
    "nf4": ("nf4", 64, False),
    "nf4-nested": ("nf4", 64, True),
    "fp4": ("fp4", 64, False),
    "int8-blocks": ("int8", 64, False),
    "int8-rows": ("int8", None, False),
}


def of(name):
    kind, block, nested = FORMATS[name]
    return case(kind, block, nested=nested)


@pytest.mark.parametrize("size", [0.02, 0.05])
def test_calibrated_codes_keep_nine_tenths_on_unseen_inputs_where_rounding_keeps_little(size):
    start, weight, change, down = case(size=size)
    found = requantized(weight + change, start, gram=gram_of(inputs(192)), directions=down)
    unseen = inputs(192, seed=6)
    effect, error = measured(found.weight(), weight, change, unseen)
    rounded = measured(dequantize_blockwise(quantize_blockwise(weight + change)), weight, change, unseen)
    assert rounded[0] < 0.5
    assert effect > 0.85
    assert error < 0.9 * rounded[1]


def test_codes_keep_half_of_the_effect_without_calibration():
    start, weight, change, _ = case(size=0.02)
    found = requantized(weight + change, start)
    effect, _ = measured(found.weight(), weight, change)
    rounded, _ = measured(dequantize_blockwise(quantize_blockwise(weight + change)), weight, change)
    assert rounded < 0.1
    assert effect > 0.5


def test_least_error_is_less_than_that_of_rounding_by_far():
    start, weight, change, down = case()
    x = inputs(192)
    found = requantized(weight + change, start, gram=gram_of(x), directions=down, least_effect=0.0)
    assert found.emphasis == 0
    _, error = measured(found.weight(), weight, change, x)
    _, rounded = measured(dequantize_blockwise(quantize_blockwise(weight + change)), weight, change, x)
    assert error < 0.7 * rounded


def test_a_higher_effect_is_reached_where_it_is_asked_for():
    start, weight, change, down = case(size=0.02)
    x = inputs(192)
    found = [requantized(weight + change, start, gram=gram_of(x), directions=down, least_effect=e) for e in (0.3, 0.95)]
    effects = [measured(f.weight(), weight, change, x)[0] for f in found]
    assert effects[0] < 0.95 <= effects[1]
    assert found[0].emphasis < found[1].emphasis


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_effect_and_error_are_those_of_what_is_stored(name, calibrated, rank):
    start, weight, change, down = of(name)
    x = inputs(192) if calibrated else None
    gram = None if x is None else gram_of(x)
    found = requantized(weight + change, start, gram=gram, directions=down, residual_rank=rank)
    effect, error = measured(found.weight(), weight, change, x)
    # Sums of float32 over a gram matrix whose entries are rounded to float32.
    assert found.effect == pytest.approx(effect, abs=1e-3)
    assert found.error == pytest.approx(error, abs=1e-3)
    assert error < measured(decoded(encoded(weight + change, *FORMATS[name])), weight, change, x)[1] or not calibrated


@pytest.mark.parametrize("name", FORMATS)
def test_codes_are_stored_in_the_format_of_the_start(name):
    start, weight, change, down = of(name)
    found = requantized(weight + change, start, gram=gram_of(inputs(192)), directions=down).quantized
    assert type(found) is type(start)
    if isinstance(found, Rows):
        torch.testing.assert_close(decoded(found), found.codes.float() * found.scales[:, None], rtol=0, atol=0)
        assert (found.codes.dtype, found.codes.shape, found.scales.shape) == (torch.int8, (96, 192), (96,))
        return
    assert isinstance(start, Quantized)
    assert (found.kind, found.block, found.shape) == (start.kind, start.block, start.shape)
    assert (found.codes.dtype, found.codes.shape) == (start.codes.dtype, start.codes.shape)
    assert (found.nested is None) == (start.nested is None)
    if found.nested is not None:
        assert torch.equal(found.absmax, start.absmax)
    assert not torch.equal(found.codes, start.codes)


@pytest.mark.parametrize("name", FORMATS)
def test_a_grid_reads_and_writes_codes_as_the_operations_do(name):
    kind, block, nested = FORMATS[name]
    start = encoded(drawn(7, 50), kind, block, nested)  # rows that do not end with a block
    grid = Grid(start)
    steps = grid.steps(torch.arange(50)).t()
    assert torch.equal(grid.value(grid.places, steps), decoded(start))
    assert torch.equal(grid.quantized().codes, start.codes)
    nearest = grid.nearest(decoded(start), 1 / steps)
    assert torch.equal(grid.value(nearest, steps), decoded(start))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_nothing_is_lost_with_a_residual_of_the_rank_of_the_change(name, calibrated):
    start, weight, change, _ = of(name)
    gram = gram_of(inputs(192)) if calibrated else None
    found = requantized(weight + change, start, gram=gram, residual_rank=4)
    assert found.residual is not None
    assert (found.residual[0].shape, found.residual[1].shape) == ((4, 192), (96, 4))
    # W + dW is rounded to float32, which is 2^-24 of W, or 2e-6 of dW.
    assert measured(found.weight(), weight, change)[1] < 1e-4
    if not name.startswith("int8"):
        assert torch.equal(found.quantized.codes, start.codes)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_codes_and_residual_are_no_worse_than_the_old_codes_and_the_best_residual(calibrated, rank):
    start, weight, change, _ = case(size=0.05)
    x = inputs(192, rows=4096) if calibrated else None
    found = requantized(
        weight + change, start, gram=None if x is None else gram_of(x), residual_rank=rank, least_effect=0.0
    )
    metric = torch.eye(192, dtype=torch.float64)
    if x is not None:
        gram = gram_of(x.double())
        metric = gram / gram.diagonal().mean() + 0.1 * metric
    root = torch.linalg.cholesky(metric)
    tail = torch.linalg.svdvals(change.double() @ root)[rank:].norm()
    error = ((found.weight().double() - weight.double() - change.double()) @ root).norm()
    assert error <= tail * 1.0001


@pytest.mark.parametrize(("kind", "block"), [("nf4", 64), ("fp4", 128), ("int8", None), ("int8", 64)])
@pytest.mark.parametrize("rank", [0, 4])
def test_a_weight_that_is_not_quantized_yet_is_nearer_than_by_rounding(kind, block, rank):
    weight = drawn(96, 192) * 0.05
    change = drawn(96, 2, seed=5) @ drawn(2, 192, seed=4)
    change = change * (0.03 * weight.norm() / change.norm())
    x = inputs(192)
    found = requantized(weight + change, base=weight, kind=kind, block=block, gram=gram_of(x), residual_rank=rank)
    effect, error = measured(found.weight(), weight, change, x)
    _, rounded = measured(decoded(encoded(weight + change, kind, block, False)), weight, change, x)
    assert effect == pytest.approx(1, abs=0.1)
    assert error < 0.75 * rounded


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("calibrated", [False, True])
def test_never_further_in_the_metric_than_rounding_or_the_old_codes(name, seed, calibrated):
    kind, block, nested = FORMATS[name]
    start = encoded(drawn(24, 64, seed=seed), kind, block, nested)
    weight = decoded(start)
    target = weight + 0.2 * drawn(24, 64, seed=seed + 10) * weight.std()
    x = inputs(64, seed=seed)
    gram = gram_of(x) if calibrated else None
    found = requantized(target, start, gram=gram, least_effect=0.0)
    metric = torch.eye(64, dtype=torch.float64)
    if calibrated:
        own = gram_of(x.double())
        metric = own / own.diagonal().mean() + 0.1 * metric

    def far(stored):
        rest = stored.double() - target.double()
        return float(((rest @ metric) * rest).sum())

    assert far(found.weight()) <= 1.0001 * min(far(weight), far(decoded(encoded(target, kind, block, nested))))


def test_the_error_is_nearly_orthogonal_to_what_the_adapter_reads():
    start, weight, change, down = case(size=0.05)
    found = requantized(weight + change, start, directions=down, least_effect=0.99)
    basis = torch.linalg.qr(down.T)[0]
    along = ((found.weight() - weight - change) @ basis).norm() / (change @ basis).norm()
    plain = ((dequantize_blockwise(quantize_blockwise(weight + change)) - weight - change) @ basis).norm()
    assert along < 0.15
    assert along < 0.3 * plain / (change @ basis).norm()


def test_carrying_errors_finds_the_best_codes_of_two_columns():
    """An exhaustive search over both columns is the oracle; the second column's choice is the best for each first."""
    metric = torch.tensor([[2.0, 1.2], [1.2, 1.0]])
    start = encoded(drawn(32, 2), "nf4", 64, False)
    target = decoded(start) + 0.1 * drawn(32, 2, seed=9)
    grid = Grid(start)
    search = Search(metric)
    goal = target.t()[search._order]
    places, costs = search._carried(grid, goal)
    size = grid.sizes[0]
    for row in range(32):
        first = grid.values[places[0, row].int()] * size
        wanted = goal[1, row] - 1.2 / 1.0 * (first - goal[0, row])
        best = (grid.values * size - wanted).abs().min()
        second = grid.values[places[1, row].int()] * size
        assert (second - wanted).abs() == pytest.approx(float(best), abs=1e-6)
    errors = search._errors(grid, goal, places)
    permuted = metric[search._order][:, search._order]
    torch.testing.assert_close(costs, (errors * (permuted @ errors)).sum(0), rtol=1e-4, atol=1e-5)


def test_no_single_code_could_be_changed_for_the_better(monkeypatch):
    monkeypatch.setattr(lattice, "_SWEEPS", 50)
    start, weight, change, _ = case(shape=(6, 64), nested=True)
    x = inputs(64)
    metric = gram_of(x) / gram_of(x).diagonal().mean() + 0.1 * torch.eye(64)
    grid = Grid(start)
    search = Search(metric)
    search.fit(grid, weight + change, torch.full((6,), torch.inf))
    rest = decoded(grid.quantized()) - weight - change
    slope = rest @ metric
    steps = grid.steps(torch.arange(64)).t()
    now = grid.value(grid.places, steps)
    for place in range(16):
        move = grid.value(torch.full_like(grid.places, place), steps) - now
        gain = 2 * move * slope + metric.diagonal() * move.square()
        assert gain.min() > -1e-5 * metric.diagonal().mean() * weight.square().mean()


@pytest.mark.parametrize("name", ["nf4", "int8-rows"])
def test_refitted_scales_leave_no_slope(name):
    start, weight, change, _ = of(name)
    metric = (gram_of(inputs(192)) + torch.eye(192)).double()
    grid = Grid(start)
    blocks = 192 // grid.block

    def slopes():
        stored = decoded(grid.quantized()).double()
        pull = ((weight + change).double() - stored) @ metric * stored
        return pull.view(96, blocks, grid.block).sum(2)

    before = slopes()
    Search(metric.float())._refit(grid, weight + change)
    assert grid.moved
    assert slopes().norm() < 0.05 * before.norm()


@pytest.mark.parametrize("width", [1, 2, 33, 65, 100])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_odd_shapes(name, width, rows):
    kind, block, nested = FORMATS[name]
    start = encoded(drawn(rows, width), kind, block, nested)
    target = decoded(start) + 0.05 * drawn(rows, width, seed=1)
    for gram in (None, gram_of(inputs(width))):
        found = requantized(target, start, gram=gram, residual_rank=1, least_effect=0.0)
        assert found.weight().shape == (rows, width)
        assert torch.isfinite(found.weight()).all()
        # The diagonal is damped, so that the error on the inputs alone may be a little larger.
        assert found.error <= 1.05


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 0)])
@pytest.mark.parametrize("name", ["nf4", "int8-rows"])
def test_empty_weights(name, shape):
    start = encoded(torch.zeros(shape), *FORMATS[name])
    found = requantized(torch.zeros(shape), start, residual_rank=2)
    assert found.weight().shape == shape
    assert (found.effect, found.error) == (1, 0)


def test_without_a_change_the_codes_stay():
    start, weight, _, down = case()
    found = requantized(weight, start, gram=gram_of(inputs(192)), directions=down)
    assert found.quantized is start
    assert (found.effect, found.error) == (1, 0)


def test_a_row_and_a_block_of_zeros_stay_zeros():
    weight = drawn(4, 128)
    weight[1] = 0
    weight[2, :64] = 0
    change = 0.03 * drawn(4, 2, seed=1) @ drawn(2, 128, seed=2)
    change[1] = 0
    for name in ("nf4", "int8-rows"):
        start = encoded(weight, *FORMATS[name])
        found = requantized(decoded(start) + change, start, gram=gram_of(inputs(128)))
        assert not found.weight()[1].any()
        assert torch.isfinite(found.weight()).all()


def test_the_same_codes_every_time_whatever_the_generator():
    start, weight, change, _ = case()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(requantized(weight + change, start, gram=gram_of(inputs(192)), residual_rank=2))
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found[0].weight(), found[1].weight())
    assert torch.equal(found[0].quantized.codes, found[1].quantized.codes)


def test_the_scale_of_the_gram_matrix_does_not_matter():
    start, weight, change, down = case()
    gram = gram_of(inputs(192))
    # Powers of two, so that nothing is rounded differently.
    found = [requantized(weight + change, start, gram=gram * s, directions=down) for s in (1, 2.0**-10)]
    assert torch.equal(found[0].weight(), found[1].weight())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_gram_matrix_adds_up_over_batches(dtype):
    x = drawn(3, 5, 7).to(dtype)
    gram = gram_of(x[2:], gram_of(x[:2]))
    flat = x.reshape(-1, 7).double()
    assert gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(gram.double(), flat.T @ flat, rtol=1e-5, atol=1e-5)


def test_a_target_of_another_dtype_and_layout_gives_the_same():
    start, weight, change, down = case()
    target = weight + change
    found = [requantized(t, start, directions=down) for t in (target, target.double(), target.t().contiguous().t())]
    assert torch.equal(found[0].weight(), found[1].weight())
    assert torch.equal(found[0].weight(), found[2].weight())


def refusal(**changes):
    start, weight, change, down = case(shape=(8, 64))
    arguments = {"target": weight + change, "start": start, "directions": down, "gram": gram_of(inputs(64)), **changes}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # every message is compared by the caller
        requantized(**arguments)
    return str(caught.value)


@pytest.mark.parametrize("name", ["target", "gram", "directions"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_refused(name, value):
    shape = {"target": (8, 64), "gram": (64, 64), "directions": (4, 64)}[name]
    broken = torch.ones(shape)
    broken[3, 5] = value
    assert f"{name} has values that are not finite" in refusal(**{name: broken})


def test_a_start_that_is_not_finite_is_refused():
    codes, scales = quantize_rows(drawn(8, 64))
    scales[0] = torch.nan
    assert "start has values that are not finite" in refusal(start=Rows(codes=codes, scales=scales))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": torch.ones(64)}, r"expected target (out, in), found (64,)"),
        ({"target": torch.ones(8, 63)}, "target is (8, 63) and start (8, 64); expected start (8, 63)"),
        ({"gram": torch.eye(8)}, "target is (8, 64) and gram (8, 8); expected gram (64, 64)"),
        ({"directions": torch.ones(2, 8)}, "directions (2, 8); expected directions (2, 64)"),
        ({"directions": torch.ones(64)}, "directions (64,); expected directions"),
        ({"gram": torch.zeros(64, 64)}, "the layer saw no inputs in calibration"),
        ({"residual_rank": -1}, "residual_rank is -1; expected 0 or more"),
        ({"base": torch.ones(8, 64)}, "found both or neither"),
        ({"start": None}, "found both or neither"),
        ({"start": None, "base": torch.ones(8, 64), "kind": "nf3"}, "kind is 'nf3'"),
        ({"start": None, "base": torch.ones(8, 64), "block": 48}, "block is 48"),
        ({"start": None, "base": torch.ones(8, 64), "block": None}, "a scale for each row goes with kind='int8'"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    assert message in refusal(**changes)
