"""`python -m peftkit_bench.shards`: merging a 7B-shaped folder of random weights: peak memory, time against copying.

The folder has the tensors of a Llama of 7 billion parameters, with fewer layers where the disk allows no more. A merge
runs in a process of its own; files are taken out of the page cache before each timing, and both the copy and the merge
end on the disk (fsync).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit_bench.timing import append

SHARD = 2_000_000_000
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "dora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "use_dora": True},
    "ia3": {},
    "oft": {"oft_block_size": 32, "target_modules": "all-linear"},
    "loha": {"r": 8, "target_modules": "all-linear"},
}
"""Name -> fields of the config; "dora" is LoRA's."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One merge."""

    name: str
    layers: int
    bytes: int
    """Of the base's weights."""
    largest_bytes: int
    """Of the largest tensor."""
    merge_seconds: float
    copy_seconds: float
    """Copying the same files, median."""
    ratio: float
    """merge_seconds / copy_seconds."""
    start_rss_bytes: int
    """Resident memory when everything is imported and planned, before the first weight is read."""
    peak_rss_bytes: int
    """VmHWM of the process: anonymous memory and mapped files, the libraries' code included."""
    peak_anonymous_bytes: int
    """Largest RssAnon seen every 20 ms: memory that the process itself allocated."""
    peak_over_start_in_largest: float
    """(peak_rss_bytes - start_rss_bytes) / largest_bytes."""
    buffers_bytes: int
    """What `plan_shards` said of the buffers."""
    max_memory: str | None
    effect_kept: float


def status() -> dict[str, int]:
    """Bytes of resident memory of this process: VmRSS, VmHWM, RssAnon, RssFile."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmRSS", "VmHWM", "RssAnon", "RssFile"):
            found[name] = int(rest.split()[0]) * 1024
    return found


@contextmanager
def anonymous_peak(found: list[int]) -> Iterator[None]:
    """Appends the largest RssAnon inside the block."""
    stop = threading.Event()

    def watch() -> None:
        peak = 0
        while not stop.wait(0.02):
            peak = max(peak, status()["RssAnon"])
        found.append(peak)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def make_base(folder: Path, layers: int) -> None:
    """Writes the base: random bfloat16 weights in the shapes of a Llama of 7 billion parameters."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards: list[list[str]] = [[]]
    state, room = model.state_dict(), SHARD
    for name, tensor in state.items():
        if 2 * tensor.numel() > room:
            shards.append([])
            room = SHARD
        shards[-1].append(name)
        room -= 2 * tensor.numel()
    generator = torch.Generator().manual_seed(0)
    mapping = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        made = {}
        for name in names:
            made[name] = torch.empty(state[name].shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            mapping[name] = file
        save_file(made, folder / file, metadata={"format": "pt"})
        del made
        gc.collect()
    total = sum(2 * t.numel() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": mapping}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_adapter(folder: Path, base: Path, name: str) -> None:
    """Writes an adapter of random tensors, with a fingerprint of the base, which merging then checks."""
    import torch
    import transformers
    from safetensors import safe_open

    import peftkit
    from peftkit import checkpoint, fingerprint
    from peftkit import folder as folders

    config = transformers.AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    method = peftkit.METHODS["lora" if name == "dora" else name]
    planned = peftkit.plan(model, method.config(**METHODS[name]))
    generator = torch.Generator().manual_seed(1)
    state = {
        path: {n: torch.randn(t.shape, generator=generator) * 0.01 + _centre(n) for n, t in tensors.items()}
        for path, tensors in checkpoint.expected_state(planned).items()
    }
    known_file = base.parent / "fingerprint.json"
    if not known_file.exists():
        known: dict[str, Any] = {}
        for file in sorted(base.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # not a dict
                    known |= fingerprint.fingerprint({key: opened.get_tensor(key)})
        known_file.write_text(json.dumps(known))
    about = {
        "format": 1,
        "method": method.name,
        "base": {"class": "LlamaForCausalLM", "tensors": json.loads(known_file.read_text())},
    }
    written = {
        folders.CONFIG: json.dumps(checkpoint.written_config(model, planned)).encode(),
        folders.PROVENANCE: json.dumps(about).encode(),
    }
    folders.write(folder, written, checkpoint.packed(planned, state))


def _centre(name: str) -> float:
    """Where the random values of a tensor lie around: factors that scale lie around 1."""
    return 1.0 if name in ("ia3_l", "lora_magnitude_vector") else 0.0


def forget(folder: Path) -> None:
    """Takes a folder's files out of the page cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy_seconds(base: Path, out: Path) -> float:
    """Seconds that copying the files takes, to the disk."""
    forget(base)
    start = time.perf_counter()
    shutil.copytree(base, out)
    for file in out.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def child(base: Path, adapter: Path, out: Path, max_memory: str | None) -> None:
    """Merges in this process and prints what was measured."""
    from peftkit.shards import merge_shards, plan_shards

    plan = plan_shards(base, adapter, out, max_memory=max_memory)
    gc.collect()
    before = status()
    peaks: list[int] = []
    start = time.perf_counter()
    with anonymous_peak(peaks):
        report = merge_shards(base, adapter, out, max_memory=max_memory)
    sys.stdout.write(
        json.dumps(
            {
                "merge_seconds": time.perf_counter() - start,
                "start_rss_bytes": before["VmRSS"],
                "peak_rss_bytes": status()["VmHWM"],
                "peak_anonymous_bytes": peaks[0],
                "buffers_bytes": plan.memory,
                "effect_kept": report.effect_kept,
            }
        )
    )


def measure(folder: Path, layers: int, names: list[str], rounds: int, bounds: list[str | None]) -> Iterator[Result]:
    """Each method with each bound, and a copy of the files before and after each merge; none of them stays."""
    base, out = folder / "base", folder / "out"
    if not base.exists():
        make_base(base, layers)
    size = sum(f.stat().st_size for f in base.glob("*.safetensors"))
    largest = 2 * 32000 * 4096
    for name in names:
        adapter = folder / name
        if not adapter.exists():
            make_adapter(adapter, base, name)
        for bound in bounds:
            if not rounds:
                continue
            merges: list[dict[str, Any]] = []
            copies = [copy_seconds(base, out)]
            for _ in range(rounds):
                forget(base)
                words = [sys.executable, "-m", "peftkit_bench.shards", "--child", str(base), str(adapter), str(out)]
                done = subprocess.run([*words, bound or ""], check=True, capture_output=True, text=True)
                merges.append(json.loads(done.stdout.splitlines()[-1]))
                shutil.rmtree(out)
                copies.append(copy_seconds(base, out))
            merges.sort(key=lambda m: m["merge_seconds"])
            found, copied = merges[len(merges) // 2], sorted(copies)[len(copies) // 2]
            yield Result(
                name=name,
                layers=layers,
                bytes=size,
                largest_bytes=largest,
                copy_seconds=copied,
                ratio=found["merge_seconds"] / copied,
                peak_over_start_in_largest=(found["peak_rss_bytes"] - found["start_rss_bytes"]) / largest,
                max_memory=bound,
                **found,
            )


def main() -> None:
    """Reads the command line, measures, and appends the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help="where the weights are made, and stay; default: a temporary folder")
    parser.add_argument("--layers", type=int, default=22, help="of 32; 22 take 9.4 GB, twice that on the disk")
    parser.add_argument("--rounds", type=int, default=1, help="merges of each kind; 0 makes the weights only")
    parser.add_argument("--methods", default="lora", help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--max-memory", default="", help="bounds, such as 200MB,; empty: none given")
    parser.add_argument("--out", type=Path, help="JSONL file that the results are appended to")
    given = parser.parse_args()
    if given.child:
        base, adapter, out, bound = given.child
        child(Path(base), Path(adapter), Path(out), bound or None)
        return
    bounds = [b or None for b in given.max_memory.split(",")]
    with tempfile.TemporaryDirectory(prefix="peftkit-shards-") as temporary:
        folder = Path(given.folder or temporary)
        for result in measure(folder, given.layers, given.methods.split(","), given.rounds, bounds):
            sys.stdout.write(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
            if given.out:
                append([result], given.out)


if __name__ == "__main__":
    main()
