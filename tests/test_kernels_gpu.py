"""Operations on a GPU beyond their cases: CUDA graphs that are replayed on new inputs, several streams, no waiting."""

from __future__ import annotations

import pytest
import torch
from peftkit_kernels import OPS, nf4_lora_linear, quantize_blockwise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZED_BY_DATA = {"merge_lora_reversibly_"}
"""Entry points whose results have sizes that depend on values, which a graph cannot have."""
CASES_EACH = 6


def chosen():
    """Some cases of every entry point with CUDA code, of different shapes first."""
    for op in OPS.values():
        for function in op.functions:
            if "cuda" not in op.sources or "cuda" not in function.devices or function.name in SIZED_BY_DATA:
                continue
            cases = [c for c in op.cases() if c.function is function and "float64" not in c.label]
            for case in cases[:: max(1, len(cases) // CASES_EACH)]:
                yield pytest.param(case, id=f"{function.name}-{case.label}")


def recorded(function, arguments):
    """A graph of one call, and its result, which each replay fills."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = function(*arguments)
    return graph, result


@pytest.mark.parametrize("case", list(chosen()))
def test_graph_replays_on_new_inputs(case):
    device = torch.device("cuda")
    arguments = case.inputs(torch.Generator().manual_seed(0), device)
    if not case.function.compiled_for("cuda"):
        pytest.skip(f"compiled code of {case.function.name} for cuda is not built")
    if arguments[0].dtype == torch.float64 or not arguments[0].numel():
        pytest.skip("nothing is launched")
    graph, result = recorded(case.function, arguments)
    for seed in range(1, 4):
        fresh = case.inputs(torch.Generator().manual_seed(seed), device)
        for to, new in zip(arguments, fresh, strict=True):
            if isinstance(to, torch.Tensor):
                if to.shape != new.shape:
                    pytest.skip("sizes of the inputs depend on values")
                to.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        case.check(fresh, arguments, result)


def layer(out, width, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, down, up = (
        torch.randn(*shape, generator=generator).cuda().bfloat16()
        for shape in ((out, width), (rank, width), (out, rank))
    )
    return quantize_blockwise(weight), down, up


def test_rows_of_an_nf4_layer_wait_for_their_own_update_in_every_replay_and_stream():
    layers = [layer(4096 - 48 * i, 4096, 16, i) for i in range(4)]
    streams = [torch.cuda.Stream() for _ in layers]
    rows = [torch.randn(1 + 3 * i, 4096, device="cuda").bfloat16() for i in range(4)]

    def run(place):
        q, down, up = layers[place]
        return nf4_lora_linear(rows[place], q.codes, q.absmax, tuple(q.shape), down, up, 0.5)

    graphs = [recorded(lambda place=place: run(place), ()) for place in range(4)]
    for turn in range(50):
        for x in rows:
            x.normal_().mul_(1 + turn % 3)
        wanted = [run(place) for place in range(4)]
        torch.cuda.synchronize()
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for found, (_, result) in zip(wanted, graphs, strict=True):
            assert torch.equal(found, result), "a replay took what an earlier one had left"


def test_launches_do_not_wait_for_the_gpu():
    q, down, up = layer(512, 512, 8, 0)
    x = torch.randn(2, 512, device="cuda").bfloat16()
    nf4_lora_linear(x, q.codes, q.absmax, (512, 512), down, up)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows in (1, 8, 40):
            nf4_lora_linear(x[:1].expand(rows, -1), q.codes, q.absmax, (512, 512), down, up)
    finally:
        torch.cuda.set_sync_debug_mode("default")
