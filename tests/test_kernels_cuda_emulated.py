"""CUDA code without a GPU: every operation's sources compiled for the CPU, on the operation's own cases.

Threads of a block are fibers that go on in shuffled order, and several blocks are under way at a time; address
sanitizer and alignment checks are on where the compiler has them, and memory that nothing wrote is NaN. So these tests
see wrong indices and arithmetic, missing or unreached barriers, shuffles of lanes that are not there, blocks that wait
for ever, accesses out of bounds, misaligned vectors, and launches that a GPU refuses.

They do not see: speed; the order in which a GPU's memory shows writes to other blocks, where a fence is missing; a
second kernel that begins before the first has ended, as lora_linear's may from sm_90 on (here it runs after it);
a * b + c that nvcc contracts; what cuBLAS and torch's attention on CUDA compute, for which the CPU's stand in. All
operations with CUDA code are emulated, but not the attention kernels of torch that prefix_attention calls from Python.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import pytest

SECONDS = 300
pytestmark = pytest.mark.skipif(cuda_emulation.compiler() is None, reason="no C++ compiler (g++, clang++, c++)")


def environment(folder):
    """Of a process that runs emulated code."""
    libraries = cuda_emulation.sanitizer_libraries()
    paths = [
        str(Path(__file__).parent),
        *(p for p in sys.path if p.endswith("kernels")),
        os.environ.get("PYTHONPATH", ""),
    ]
    options = {
        "detect_leaks": 0,
        "detect_stack_use_after_return": 0,
        "max_malloc_fill_size": 1 << 30,
        "malloc_fill_byte": 255,  # fresh memory is NaN
    }
    return {
        **os.environ,
        "PEFTKIT_KERNELS_DIR": str(folder),
        "PEFTKIT_NATIVE": "auto",
        "PYTHONPATH": os.pathsep.join(paths),
        "ASAN_OPTIONS": ":".join(f"{name}={value}" for name, value in options.items()),
        **({"LD_PRELOAD": ":".join(libraries)} if libraries else {}),
    }


@contextlib.contextmanager
def alone(folder):
    """One worker at a time."""
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with every operation's code, which one worker compiles for all."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "cuda_emulation"
    folder.mkdir(exist_ok=True)
    with alone(folder):
        if not (folder / "complete").exists():
            cuda_emulation.build(cuda_emulation.with_cuda(), folder, bool(cuda_emulation.sanitizer_libraries()))
            (folder / "complete").touch()
    return folder


@pytest.fixture(scope="module")
def ran(built):
    """Operation -> its cases that ran and their errors. One worker runs them for all."""
    results = built / "results.json"
    with alone(built):
        if not results.exists():
            results.write_text(json.dumps(run(built)))
    return json.loads(results.read_text())


def run(folder):
    """What became of each case, by operation; a crash is put down to the case that was running."""
    line = [sys.executable, "-m", "cuda_emulation", "run", str(folder)]
    done = subprocess.run(
        line, env=environment(folder), capture_output=True, text=True, timeout=SECONDS, check=False, errors="replace"
    )
    cases = {}
    for text in done.stdout.splitlines():
        case = json.loads(text)
        cases[case["op"], case["case"]] = (
            case.get("error") if "ok" in case else "ended the process:\n" + done.stderr[-6000:]
        )
    assert cases, done.stderr[-6000:]
    found = {}
    for (op, case), error in cases.items():
        found.setdefault(op, {})[case] = error
    if done.returncode and not any(error for by_case in found.values() for error in by_case.values()):
        raise AssertionError(done.stderr[-6000:])
    return found


def test_cuda_code_compiles_for_the_cpu(built):
    assert all((built / cuda_emulation.library_name(op)).is_file() for op in cuda_emulation.with_cuda())


@pytest.mark.parametrize("op", cuda_emulation.with_cuda())
def test_cuda_code_is_right_on_every_case(op, ran):
    assert op in ran, "an operation before it ended the process"
    wrong = {case: error for case, error in ran[op].items() if error}
    first = next(iter(wrong.items()), ("", ""))
    assert not wrong, f"{len(wrong)} of {len(ran[op])} cases are wrong: {', '.join(wrong)}\n{first[0]}\n{first[1]}"


# The emulation itself -------------------------------------------------------------------------------------------------

FAULTS = {
    "none": "^right",
    "waits": "^right",
    "no_barrier": "expected",
    "barrier_of_some": "different barriers|deadlock|different things",
    "barrier_twice_for_some": "deadlock: thread .* waits for ever",
    "ended_lane": "lane that has ended",
    "lanes_apart": "lanes of a warp do different things",
    "waits_for_the_last": "waits for ever for a value",
    "empty_grid": "a grid of no blocks",
    "too_high_a_grid": "a grid that is too large",
}
SANITIZED = {"outside_shared": "AddressSanitizer: heap-buffer-overflow", "not_aligned": "misaligned address"}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """A program of kernels with one fault each."""
    return cuda_emulation.program(
        "faults", tmp_path_factory.mktemp("faults"), bool(cuda_emulation.sanitizer_libraries())
    )


@pytest.mark.parametrize("name", [*FAULTS, *SANITIZED])
def test_emulation_finds(name, faults):
    if name in SANITIZED and not cuda_emulation.sanitizer_libraries():
        pytest.skip("the compiler has no address sanitizer")
    env = {k: v for k, v in environment(faults.parent).items() if k != "LD_PRELOAD"}
    done = subprocess.run([faults, name], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert re.search({**FAULTS, **SANITIZED}[name], done.stdout + done.stderr), done.stdout + done.stderr


def test_sources_that_cannot_be_emulated_are_refused():
    with pytest.raises(ValueError, match=r"odd\.cu: dynamic shared memory"):
        cuda_emulation.translated("extern __shared__ float values[];", "odd.cu")
    with pytest.raises(ValueError, match=r"odd\.cu:2: a __shared__ of a form"):
        cuda_emulation.translated("\n__shared__ std::pair<int, int> values[3];", "odd.cu")
    with pytest.raises(ValueError, match="expected one STABLE_TORCH_LIBRARY_IMPL"):
        cuda_emulation.on_cpu("int none;", "odd.cu")
