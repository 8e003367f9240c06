"""Builds emulated CUDA code, or runs the cases of operations on what was built and prints a line of JSON for each."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from peftkit_kernels import OPS
from peftkit_kernels._case import Case

import cuda_emulation


def main(arguments: Sequence[str]) -> int:
    command, folder, *ops = arguments
    names = ops or cuda_emulation.with_cuda()
    if command == "build":
        cuda_emulation.build(names, Path(folder), bool(cuda_emulation.sanitizer_libraries()))
        return 0
    torch.set_num_threads(1)
    for name in names:
        if OPS[name].problems:
            raise RuntimeError(f"{name}: {OPS[name].problems}")
        for case in OPS[name].cases():
            if "cuda" in case.function.devices:
                _run(Path(folder), name, case)
    return 0


def _run(folder: Path, name: str, case: Case) -> None:
    label = f"{case.function.name}-{case.label}"
    before = case.inputs(torch.Generator().manual_seed(sum(label.encode())), torch.device("cpu"))
    if before[0].dtype == torch.float64:  # the definition answers
        return
    if not case.function.compiled_for("cpu"):
        raise RuntimeError(f"{label}: nothing is compiled in {folder}, or PEFTKIT_KERNELS_DIR names another folder")
    # Said before, so that what ends the process is known by its name.
    print(json.dumps({"op": name, "case": label}), flush=True)
    after = tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in before)
    start, error = time.perf_counter(), None
    try:
        case.check(before, after, case.function(*after))
    except Exception:
        error = traceback.format_exc(limit=-2)
    seconds = round(time.perf_counter() - start, 4)
    print(json.dumps({"op": name, "case": label, "ok": error is None, "error": error, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
