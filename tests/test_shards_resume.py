"""A merge that is killed: OUT never looks complete, and the same call goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from shard_folders import LORA, adapter_folder, base_folder, merged_in_memory, tensors, weights
from tiny import bits

import peftkit
from peftkit.errors import CheckpointError
from peftkit.shards import merge_shards, running
from peftkit.shards.target import JOURNAL, unfinished

ROOT = Path(__file__).parents[1]
KILLED = """
    import os, signal, sys
    sys.path[:0] = [{root!r}, {kernels!r}]
    from peftkit.shards import merge_shards
    from peftkit.shards import target

    point, number = {point!r}, {number}
    count = 0

    def die(call):
        def wrapped(*args, **kwargs):
            global count
            count += 1
            if count == number and point.startswith("before"):
                os.kill(os.getpid(), signal.SIGKILL)
            found = call(*args, **kwargs)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return found
        return wrapped

    name = point.split()[1]
    holder = target.Writer if hasattr(target.Writer, name) else target
    setattr(holder, name, die(getattr(holder, name)))
    merge_shards({base!r}, {adapter!r}, {out!r})
"""
POINTS = [
    ("before write", 1),
    ("after write", 9),
    ("before note", 1),
    ("after note", 1),
    ("before note", 2),
    ("after put", 2),
    ("before finish", 1),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    base = base_folder(folder, "llama", torch.bfloat16, max_shard_size="20kB")
    adapter = adapter_folder(folder, base, peftkit.LoRA(**LORA))
    memory, _ = merged_in_memory(folder, base, adapter)
    whole = merge_shards(base, adapter, folder / "whole")
    return base, adapter, memory, folder / "whole", whole


def killed(base: Path, adapter: Path, out: Path, point: str, number: int) -> None:
    """Runs the merge in a process that is killed at a point."""
    text = textwrap.dedent(KILLED).format(
        root=str(ROOT),
        kernels=str(ROOT / "kernels"),
        point=point,
        number=number,
        base=str(base),
        adapter=str(adapter),
        out=str(out),
    )
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("point", "number"), POINTS, ids=[f"{p}-{n}".replace(" ", "-") for p, n in POINTS])
def test_killed_at_any_point_out_is_not_there_and_the_same_call_goes_on(tmp_path, folders, point, number):
    base, adapter, memory, whole, expected = folders
    out = tmp_path / "out"
    killed(base, adapter, out, point, number)
    assert not out.exists()
    left = unfinished(out)
    assert left.is_dir()
    lines = (left / JOURNAL).read_text().splitlines() if (left / JOURNAL).exists() else []
    done = [json.loads(line)["file"] for line in lines[1:]]
    stamps = {file: (left / file).stat().st_mtime_ns for file in done}
    report = merge_shards(base, adapter, out)
    assert not left.exists()
    assert weights(out) == weights(whole)
    assert report == expected
    assert {n: (out / n).read_bytes() for n in os.listdir(out)} == {
        n: (whole / n).read_bytes() for n in os.listdir(whole)
    }
    assert {file: (out / file).stat().st_mtime_ns for file in done} == stamps, "a finished file was written again"
    theirs = tensors(memory)
    assert {k: bits(v) for k, v in tensors(out).items()} == {k: bits(v) for k, v in theirs.items()}


class Stop(Exception):
    """Ends a merge in this process."""


def interrupted(base, adapter, out, after=1, **options):
    """A merge that ends after some finished files; gives the names of the files."""
    original, count = running.Writer.note, 0

    def note(self, shard, sites):
        nonlocal count
        original(self, shard, sites)
        count += 1
        if count == after:
            raise Stop

    running.Writer.note = note
    try:
        with pytest.raises(Stop):
            merge_shards(base, adapter, out, **options)
    finally:
        running.Writer.note = original
    return [json.loads(line)["file"] for line in (unfinished(out) / JOURNAL).read_text().splitlines()[1:]]


def written(base, adapter, out, **options):
    """The files that a merge writes, not those that it takes over."""
    seen, original = [], running.Writer.shard

    def shard(self, one):
        seen.append(one.file)
        return original(self, one)

    running.Writer.shard = shard
    try:
        merge_shards(base, adapter, out, **options)
    finally:
        running.Writer.shard = original
    return seen


def test_an_interrupted_merge_goes_on_where_it_was(tmp_path, folders):
    base, adapter, _, whole, _ = folders
    done = interrupted(base, adapter, tmp_path / "out", after=2)
    again = written(base, adapter, tmp_path / "out")
    assert len(done) == 2
    assert set(again) == set(weights(whole)) - set(done)
    assert weights(tmp_path / "out") == weights(whole)


def test_other_inputs_start_anew(tmp_path, folders):
    base, adapter, _, whole, _ = folders
    out, every = tmp_path / "out", set(weights(whole))
    interrupted(base, adapter, out)
    assert set(interrupted(base, {adapter: 0.5}, out)) <= every
    assert set(written(base, {adapter: 0.5}, out)) < every
    for options in ({"into": "fp32"}, {"ignore": ("base",)}, {"max_memory": "1GB", "into": "fp16"}):
        out = tmp_path / "-".join(map(str, options))
        interrupted(base, adapter, out)
        assert set(written(base, adapter, out, **options)) == every
    other = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA), name="other", seed=9)
    out = tmp_path / "last"
    interrupted(base, adapter, out)
    assert set(written(base, other, out)) == every


def test_a_base_that_was_touched_starts_anew(tmp_path):
    base = base_folder(tmp_path, "llama", torch.bfloat16, max_shard_size="20kB")
    adapter = adapter_folder(tmp_path, base, peftkit.LoRA(**LORA))
    every = set(weights(base))
    interrupted(base, adapter, tmp_path / "out")
    os.utime(next(base.glob("*.safetensors")))
    assert set(written(base, adapter, tmp_path / "out")) == every


@pytest.mark.parametrize("damage", ["shorter", "torn line", "no journal", "other journal"])
def test_a_damaged_unfinished_folder_is_not_trusted(tmp_path, folders, damage):
    base, adapter, _, whole, _ = folders
    out = tmp_path / "out"
    (file,) = interrupted(base, adapter, out)
    left = unfinished(out)
    journal = left / JOURNAL
    if damage == "shorter":
        os.truncate(left / file, 100)
    elif damage == "torn line":
        journal.write_text(journal.read_text()[:-20])
    elif damage == "no journal":
        journal.unlink()
    else:
        journal.write_text("[1]\n")
    assert file in written(base, adapter, out)
    assert weights(out) == weights(whole)


def test_two_merges_do_not_write_the_same_folder(tmp_path, folders):
    import fcntl

    base, adapter, *_ = folders
    interrupted(base, adapter, tmp_path / "out")
    held = os.open(unfinished(tmp_path / "out"), os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(CheckpointError, match=r"is being written by another process; wait for it, or end it"):
            merge_shards(base, adapter, tmp_path / "out")
    finally:
        os.close(held)
    merge_shards(base, adapter, tmp_path / "out")


def test_a_disk_without_room_is_refused_beforehand(tmp_path, folders, monkeypatch):
    base, adapter, *_ = folders
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(running.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"out takes [\d.]+ kB more, and .* has 1 kB free; free some"):
        merge_shards(base, adapter, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_leaves_out_as_it_was(tmp_path, folders, monkeypatch):
    base, adapter, *_ = folders
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match=r"out could not be written, and is as it was: .*No space left"):
        merge_shards(base, adapter, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == "old"
