"""CUDA sources compiled for the CPU, with CUDA's threads as fibers: their logic runs where there is no GPU.

    python -m cuda_emulation build FOLDER [OP ...]    with tests/ and kernels/ on the path
    python -m cuda_emulation run FOLDER [OP ...]      every case of every entry point that has CUDA code

Libraries are named as those of CPU code, so that with PEFTKIT_KERNELS_DIR=FOLDER the operations take them for it, and
every test of an operation on the CPU becomes one of its CUDA code.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from peftkit_kernels import OPS, _build

HERE = Path(__file__).resolve().parent
FLAGS = ("-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-ftls-model=initial-exec")
SANITIZERS = ("-fsanitize=address,alignment,bounds", "-fno-sanitize-recover=all")
_SHARED = re.compile(r"__shared__\s+([\w:]+)\s+(\w+)((?:\[[^\]]+\])*);")
_PLACE = re.compile(r"(?<![.>])\b(threadIdx|blockIdx|blockDim|gridDim)\.")
_LAUNCH = re.compile(r"((?:\b\w+::)*\b[A-Za-z_]\w*(?:<[^<>]*>)?)\s*<<<(.*?)>>>\s*\(", re.DOTALL)


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    try:
        return _build.compiler("cpu")
    except _build.BuildError:
        return None


def sanitizer_libraries() -> list[str]:
    """What has to be loaded before a Python that loads sanitized code; nothing where the compiler has no sanitizers.

    With the C++ library, whose exceptions the sanitizer has to find when it starts.
    """
    command = compiler()
    if command is None or platform.system() != "Linux":
        return []
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        said = subprocess.run([command, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        path = Path(said.stdout.strip())
        if said.returncode or not path.is_absolute() or not path.exists():
            return []
        found.append(str(path))
    return found


def translated(source: str, name: str) -> str:
    """C++ of CUDA source: arrays of a block, launches, and where a thread is.

    Raises:
        ValueError: there is something that the emulation does not know.
    """
    if "extern __shared__" in source:
        raise ValueError(f"{name}: dynamic shared memory is not emulated")

    def array(found: re.Match[str]) -> str:
        kind, variable, sizes = found.groups()
        where = "cuda_emulation::Where::current()"
        return f'{kind} (&{variable}){sizes} = *cuda_emulation::shared<{kind}{sizes}>("{variable}", {where});'

    text = _LAUNCH.sub(r"cuda_emulation::Launch(\2)(\1, ", _SHARED.sub(array, source))
    text = _PLACE.sub(r"cuda_emulation::\1().", text).replace("__CUDA_ARCH__", "CUDA_EMULATION_ARCH")
    for left in ("__shared__", "<<<"):
        if left in text:
            line = text[: text.index(left)].count("\n") + 1
            raise ValueError(f"{name}:{line}: a {left} of a form that is not known here")
    return f'#line 1 "{name}"\n{text}'


def on_cpu(source: str, name: str) -> str:
    """The same of an operation's source, registered for the CPU.

    Raises:
        ValueError: as `translated`, or nothing is registered for CUDA.
    """
    text, count = re.subn(r"(STABLE_TORCH_LIBRARY_IMPL\(\w+, )CUDA,", r"\1CPU,", translated(source, name))
    if count != 1:
        raise ValueError(f"{name}: expected one STABLE_TORCH_LIBRARY_IMPL for CUDA, found {count}")
    return text


def library_name(op: str) -> str:
    """The file that the operation looks for as its CPU code."""
    unit = OPS[op].unit
    stem, end = _build._pattern(unit, "cpu")
    return f"{stem}{_build._source_digest(unit, 'cpu')}{end}"


def _compiled(line: Sequence[str], what: str) -> None:
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stderr[:4000]}")


def _scheduler(folder: Path) -> Path:
    """The compiled scheduler, which is not sanitized: it switches stacks itself."""
    out, source = folder / "cuda_emulation.o", HERE / "cuda_emulation.cpp"
    line = [str(compiler()), "-std=c++20", "-O2", *FLAGS, "-c", f"-I{HERE / 'include'}", str(source), "-o", str(out)]
    _compiled(line, source.name)
    return out


def program(name: str, folder: Path, sanitized: bool) -> Path:
    """A program of CUDA source beside this file.

    Raises:
        RuntimeError: the compiler failed; with what it said.
    """
    plain, out = folder / f"{name}.cpp", folder / name
    plain.write_text(translated((HERE / f"{name}.cu").read_text(), f"{name}.cu"))
    flags = [*FLAGS, *(SANITIZERS if sanitized else ()), f"-I{HERE / 'include'}"]
    _compiled([str(compiler()), "-std=c++20", "-O0", *flags, str(plain), str(_scheduler(folder)), "-o", str(out)], name)
    return out


def _started(op: str, folder: Path, scheduler: Path, sanitized: bool) -> subprocess.Popen[str]:
    """A compiler at work on the CUDA source of an operation."""
    source = OPS[op].unit.sources["cuda"]
    plain = folder / f"{op}.cpp"
    plain.write_text(on_cpu(source.read_text(), source.name))
    shared = Path(_build.__file__).parent / _build.SHARED
    for header in shared.glob("*.h"):
        if "threadIdx" in header.read_text():
            (folder / header.name).write_text(translated(header.read_text(), header.name))
    root = Path(torch.__file__).parent
    includes = [HERE / "include", folder, shared, root / "include"]
    line = [
        *(str(compiler()), "-std=c++20", "-O0", "-shared", *FLAGS, f"-DTORCH_TARGET_VERSION={_build.TARGET}"),
        *(SANITIZERS if sanitized else ()),
        *(f"-I{path}" for path in includes),
        *(str(plain), str(scheduler), "-o", str(folder / library_name(op))),
        *(f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"),
    ]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def with_cuda() -> list[str]:
    """Names of the operations that have CUDA code."""
    return [name for name, op in OPS.items() if "cuda" in op.sources]


def build(ops: Iterable[str], folder: Path, sanitized: bool, jobs: int = 2) -> None:
    """Compiles the CUDA sources of operations into a folder, a few at a time.

    Raises:
        RuntimeError: the compiler failed; with what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = _scheduler(folder)
    waiting, running = list(ops), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = _started(name, folder, scheduler, sanitized)
            name, process = next(iter(running.items()))
            said, _ = process.communicate()
            del running[name]
            if process.returncode:
                raise RuntimeError(f"{name}: {said[:4000]}")
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
