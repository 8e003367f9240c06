"""Every implementation of every operation on every case; building, status and the choice between implementations."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import peftkit_kernels as kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peftkit_kernels import OPS, BuildError, KernelError, _build
from peftkit_kernels._case import assert_within, rounding
from peftkit_kernels.merge_lora import reference

CASES = [
    pytest.param(op, case, implementation, id=f"{case.function.name}-{case.label}-{implementation}")
    for op in OPS.values()
    for case in op.cases()
    for implementation in ("reference", *op.sources)
    if implementation != "cuda" or torch.cuda.is_available()
]


def called(op, function, implementation):
    """The function of one implementation; skips the test where it cannot run."""
    if implementation == "reference":
        return function.reference
    if not op.compiled_for(implementation):
        status = kernels.status_of(op, implementation)
        pytest.skip(f"compiled code of {op.name} for {implementation}: {status.note}")
    return function


def seeded(label):
    return torch.Generator().manual_seed(sum(label.encode()) + int(os.environ.get("PEFTKIT_TEST_SEED", "0")))


def copied(values):
    return tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in values)


def poison(bytes_count=1 << 16):
    """Leaves memory full of NaN for the next allocation, so that an output that is not written shows."""
    blocks = [torch.full((size,), float("nan")) for size in (8, 64, 512, bytes_count // 4) for _ in range(4)]
    del blocks


@pytest.mark.parametrize(("op", "case", "implementation"), CASES)
def test_case(op, case, implementation):
    run = called(op, case.function, implementation)
    device = torch.device("cpu" if implementation == "reference" else implementation)
    before = case.inputs(seeded(case.label), device)
    after = copied(before)
    poison()
    case.check(before, after, run(*after))


@pytest.mark.parametrize(
    ("op", "function"), [pytest.param(op, f, id=f.name) for op in OPS.values() for f in op.functions]
)
def test_schema_and_fake_are_those_of_the_code(op, function):
    """torch's own check, once for each dtype of the first argument: mutation, aliases, and fake tensors."""
    seen = set()
    for case in op.cases():
        arguments = case.inputs(seeded(case.label), torch.device("cpu"))
        key = arguments[0].dtype
        if case.function is function and key not in {*seen, torch.float64} and arguments[0].numel():
            seen.add(key)
            found = torch.library.opcheck(
                getattr(torch.ops.peftkit, function.name).default,
                arguments,
                test_utils=("test_schema", "test_faketensor"),
            )
            assert set(found.values()) == {"SUCCESS"}, (case.label, found)
    assert seen


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_compiled_code_answers_the_same_from_several_threads(op):
    cases = [c for c in op.cases() if "bfloat16" in c.label][-6:]
    called(op, cases[0].function, "cpu")
    gate = threading.Barrier(4)

    def work(seed):
        gate.wait()
        for case in cases:
            before = case.inputs(torch.Generator().manual_seed(seed), torch.device("cpu"))
            after = copied(before)
            case.check(before, after, case.function(*after))
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


# Merging and unmerging ------------------------------------------------------------------------------------------------


def factors(out, width, rank, dtype=torch.float32, size=0.03, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight, down, up = (torch.randn(*s, generator=generator) for s in ((out, width), (rank, width), (out, rank)))
    return weight.to(dtype), down, size * up


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    out=st.integers(1, 40),
    width=st.integers(1, 600),
    rank=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([0.0, 1e-4, 0.03, 1.0, 30.0]),
    transposed=st.booleans(),
    every=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_unmerge_restores_every_bit(out, width, rank, dtype, size, transposed, every, seed):
    weight, down, up = factors(out * every, width, rank, dtype, size, seed)
    if transposed:
        weight = weight.t().contiguous().t()
    weight, up = weight[::every], up[::every]
    before = weight.clone()
    undo = kernels.merge_lora_reversibly_(weight, down, up, 0.7)
    wanted = before.double() + 0.7 * (up.double() @ down.double())
    terms = 0.7 * (up.double().abs() @ down.double().abs())
    bound = rounding(torch.float32, wanted) + (rank + 3) * rounding(torch.float32, terms)
    assert_within(weight, wanted, bound + rounding(dtype, wanted.abs() + bound), "merged")
    kernels.unmerge_lora_(weight, down, up, undo)
    assert torch.equal(reference.bits_of(weight.contiguous()), reference.bits_of(before.contiguous()))


def test_fused_multiply_add_of_the_definition_rounds_once():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(40_000, generator=generator) for _ in range(3))
    # Sums that cancel, and sums whose exact value lies just beside the middle of two numbers.
    c[:10_000] = -(a[:10_000] * b[:10_000])
    c[10_000:20_000] = (a * b)[10_000:20_000] * 2.0**24 * (1 + 2.0**-20)
    c[20_000:22_000] *= 1e-30
    found = reference.fused(a, b, c)
    triples = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    wanted = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in triples]
    double = torch.tensor(wanted, dtype=torch.float64)
    once = double.float()
    # Rounding to float64 and then to float32 is wrong where the first lands in the middle; those are looked at.
    middle = (double.view(torch.int64) & ((1 << 29) - 1)) == 1 << 28
    assert torch.equal(found[~middle], once[~middle])
    for index in middle.nonzero()[:, 0].tolist():
        exact = Fraction(a[index].item()) * Fraction(b[index].item()) + Fraction(c[index].item())
        near = Fraction(found[index].item())
        step = abs(Fraction(torch.nextafter(found[index], torch.tensor(float("inf"))).item()) - near)
        assert abs(near - exact) * 2 <= step
    # Exactly 2^-60 below the middle, which float64 cannot tell from the middle, where it would be rounded up.
    one, other = torch.tensor(2.0**-24 * (1 + 2.0**-18)), torch.tensor(1 - 2.0**-18)
    near = torch.tensor(1 + 2.0**-23)
    assert (one.double() * other.double() + near.double()).float() != near
    assert reference.fused(one, other, near) == near
    assert reference.fused(-one, other, -near) == -near
    special = torch.tensor([float("inf"), float("nan"), 3e38, 0.0])
    doubled = reference.fused(special, torch.ones(4), special)
    assert doubled.isnan().tolist() == [False, True, False, False]
    assert doubled.isinf().tolist() == [True, False, True, False]


def test_undo_is_small_for_an_update_of_five_percent():
    weight, down, up = factors(512, 1024, 16, torch.bfloat16)
    up *= 0.05 * weight.norm() / (up @ down).norm()
    undo = kernels.merge_lora_reversibly_(weight, down, up)
    assert undo.nbytes / weight.numel() <= 0.15, "bytes an element"


def test_merge_both_ways_gives_the_same_weight():
    weight, down, up = factors(33, 70, 4, torch.bfloat16)
    other = weight.clone()
    kernels.merge_lora_(weight, down, up, 2.0)
    kernels.merge_lora_reversibly_(other, down, up, 2.0)
    assert torch.equal(weight, other)


@pytest.mark.parametrize("changed", ["weight", "down", "up"])
def test_unmerge_refuses_what_has_changed_and_does_nothing(changed):
    tensors = dict(zip(("weight", "down", "up"), factors(8, 16, 2), strict=True))
    undo = kernels.merge_lora_reversibly_(*tensors.values())
    tensors[changed].view(-1)[5] += 1
    before = tensors["weight"].clone()
    with pytest.raises(KernelError, match=f"{changed} has changed since the merge; nothing was done"):
        kernels.unmerge_lora_(*tensors.values(), undo)
    assert torch.equal(tensors["weight"], before)


def test_unmerge_says_that_its_undo_is_damaged():
    weight, down, up = factors(64, 256, 4, torch.bfloat16, size=0.5)
    undo = kernels.merge_lora_reversibly_(weight, down, up)
    undo.codes[3] += 1
    with pytest.raises(KernelError, match="damaged"):
        kernels.unmerge_lora_(weight, down, up, undo)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3), torch.ones(1, 3), torch.ones(3, 1)), ValueError, "expected matrices"),
        ((torch.ones(3, 4), torch.ones(2, 3), torch.ones(3, 2)), ValueError, r"\(out, in\) = \(3, 4\)"),
        ((torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 1)), ValueError, r"up \(out, r\)"),
        ((torch.ones(3, 4).int(), torch.ones(2, 4), torch.ones(3, 2)), TypeError, "weight is torch.int32"),
        ((torch.ones(3, 4), torch.ones(2, 4).double(), torch.ones(3, 2)), TypeError, "float64 does not mix"),
        ((torch.ones(3, 4), torch.ones(2, 4, device="meta"), torch.ones(3, 2)), ValueError, "down on meta"),
    ],
)
def test_merge_refuses_what_does_not_fit(arguments, error, message):
    for function in (kernels.merge_lora_, kernels.merge_lora_reversibly_):
        with pytest.raises(error, match=message):
            function(*arguments)


# Building -------------------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler (g++, clang++, c++)"
)


@pytest.fixture
def unit(tmp_path, monkeypatch):
    """A small operation to compile, in folders of its own."""
    monkeypatch.setenv("PEFTKIT_KERNELS_DIR", str(tmp_path / "built"))
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    return _build.Unit(name="small", schemas=("small(Tensor x) -> Tensor",), sources={"cpu": source})


@needs_compiler
def test_build_compiles_once(unit):
    starts = []
    first = _build.build(unit, "cpu", started=lambda: starts.append(1))
    again = _build.build(unit, "cpu", started=lambda: starts.append(2))
    assert first.path == again.path == _build.library_of(unit, "cpu")
    assert first.seconds > 0
    assert again.seconds == 0
    assert starts == [1]
    assert not _build.is_stale(unit, "cpu")


@needs_compiler
def test_build_that_fails_leaves_the_old_library_in_use(unit):
    old = _build.build(unit, "cpu").path
    unit.sources["cpu"].write_text("this is no C++\n")
    with pytest.raises(
        BuildError, match=r"small for cpu: the compiler failed[\s\S]*this is no C\+\+|does not name a type"
    ):
        _build.build(unit, "cpu")
    assert _build.library_of(unit, "cpu") == old
    assert _build.is_stale(unit, "cpu")
    assert not list(old.parent.glob("*.unfinished"))


@needs_compiler
def test_build_of_new_sources_replaces_the_old_library(unit):
    old = _build.build(unit, "cpu").path
    unit.sources["cpu"].write_text('extern "C" int answer() { return 43; }\n')
    new = _build.build(unit, "cpu").path
    assert new != old
    assert not old.exists()
    assert _build.library_of(unit, "cpu") == new


@needs_compiler
def test_library_of_other_schemas_is_not_used(unit):
    _build.build(unit, "cpu")
    other = _build.Unit(name="small", schemas=("small(Tensor x, int n) -> Tensor",), sources=unit.sources)
    assert _build.library_of(other, "cpu") is None


@needs_compiler
def test_build_after_a_killed_one_does_not_wait(unit):
    code = (
        "import sys, fcntl, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    _build.folder().mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(_build.folder() / "small.cpu.lock")], stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BuildError, match="another build has held"):
        _build.build(unit, "cpu", wait_seconds=0.3)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    (_build.folder() / "small.cpu.000000000000.000000000000.so.unfinished").write_text("left by a killed build")
    assert _build.build(unit, "cpu", wait_seconds=5).path.exists()
    assert not list(_build.folder().glob("*.unfinished"))


def test_build_without_a_compiler_says_what_to_install(unit, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no compiler for cpu \\(no-such-compiler\\); install one"):
        _build.build(unit, "cpu")


def test_build_into_a_folder_that_cannot_be_written_says_so(unit, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTKIT_KERNELS_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(BuildError, match="set PEFTKIT_KERNELS_DIR"):
        _build.build(unit, "cpu")


NVCC = [(op, "cuda") for op in OPS.values() if "cuda" in op.sources]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler (nvcc)")
@pytest.mark.parametrize(("op", "device"), NVCC, ids=lambda v: getattr(v, "name", v))
def test_cuda_source_compiles(op, device, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_KERNELS_DIR", str(tmp_path))
    assert _build.build(op.unit, device, architectures=["90"]).path.stat().st_size > 0


# The command line and the environment ---------------------------------------------------------------------------------


def python(*arguments, **environment):
    paths = os.pathsep.join([str(Path(kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("widest", [256, 0])
@pytest.mark.parametrize("op", ["nf4_linear", "lora_linear", "int8_linear", "quantize_blockwise"])
def test_case_as_processors_with_narrower_vectors_run_it(op, widest, tmp_path):
    """The same cases on paths that this processor may not choose: AVX2, in many small parts, and no vectors at all."""
    compiler = tmp_path / "g++"
    plain = "-DPEFTKIT_SMALL_PARTS" if widest else "-DPEFTKIT_NO_CLONES"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("g++")} -DPEFTKIT_WIDEST={widest} {plain} "$@"\n')
    compiler.chmod(0o755)
    built = {"CXX": str(compiler), "PEFTKIT_KERNELS_DIR": str(tmp_path / "built")}
    done = python("-m", "peftkit_kernels", "build", op, **built)
    assert done.returncode == 0, done.stderr
    names = " or ".join(f"{function.name}-" for function in OPS[op].functions)
    chosen = ("-k", f"test_case and cpu and ({names})", "--no-header", "-p", "no:cacheprovider")
    done = python("-m", "pytest", __file__, *chosen, **built)
    assert done.returncode == 0, done.stdout[-4000:]
    counts = done.stdout.splitlines()[-1]
    assert " passed" in counts, counts
    assert "skipped" not in counts, counts


def test_status_names_every_operation_and_device():
    done = python("-m", "peftkit_kernels", "status")
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert done.returncode == 0, done.stderr
    assert [(r[0], r[1]) for r in rows] == [(name, device) for name in OPS for device in ("cpu", "cuda")]


def test_nothing_is_built_in_an_empty_folder_and_everything_works(tmp_path):
    code = (
        "import torch, peftkit_kernels as k; w = torch.zeros(2, 2);"
        "k.merge_lora_(w, torch.ones(1, 2), torch.ones(2, 1));"
        "print(w.tolist(), any(s.built for s in k.status()))"
    )
    done = python("-c", code, PEFTKIT_KERNELS_DIR=str(tmp_path / "empty"))
    assert done.stdout.split("\n")[0] == "[[1.0, 1.0], [1.0, 1.0]] False", done.stderr
    assert not (tmp_path / "empty").exists(), "importing must not write"


def test_required_and_not_built_raises_with_the_command(tmp_path):
    done = python("-c", "import peftkit_kernels", PEFTKIT_NATIVE="require", PEFTKIT_KERNELS_DIR=str(tmp_path))
    assert "NotBuilt" in done.stderr
    assert "python -m peftkit_kernels build" in done.stderr


def test_off_uses_no_compiled_code():
    code = "import peftkit_kernels as k; print([s.op for s in k.status() if s.runnable])"
    assert python("-c", code, PEFTKIT_NATIVE="off").stdout.strip() == "[]"


def test_unknown_choice_is_refused():
    assert "expected off, auto or require" in python("-c", "import peftkit_kernels", PEFTKIT_NATIVE="on").stderr


def test_build_of_an_unknown_operation_names_those_there_are():
    done = python("-m", "peftkit_kernels", "build", "nonsense")
    assert done.returncode == 1
    assert "merge_lora" in done.stderr
