"""Adapter folders on disk: written in one step whatever happens, and read without trust."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peftkit import folder
from peftkit.errors import CheckpointError

OWN = {folder.CONFIG, folder.WEIGHTS, folder.PROVENANCE, folder.CARD}


def adapter(number):
    """The files and tensors of adapter `number`, so that a mix of two is seen."""
    files = {
        folder.CONFIG: json.dumps({"number": number}).encode(),
        folder.PROVENANCE: json.dumps({"number": number}).encode(),
        folder.CARD: str(number).encode(),
    }
    return files, {"a": torch.full((3, 2), float(number)), "b": torch.full((5,), float(number))}


def write(path, number):
    folder.write(Path(path), *adapter(number))


def number_in(path):
    """The number of the adapter in a folder; fails for a mix or an incomplete one."""
    found = {folder.read_json(path / folder.CONFIG)["number"]}
    found |= {int(value) for tensor in folder.read_tensors(path).values() for value in tensor.unique()}
    found.add(folder.read_json(path / folder.PROVENANCE)["number"])
    assert len(found) == 1, found
    return found.pop()


def left_over(parent):
    return sorted(p.name for p in parent.iterdir() if p.name.startswith("."))


def test_write_makes_parents_and_leaves_nothing_else(tmp_path):
    write(tmp_path / "a/b", 1)
    assert number_in(tmp_path / "a/b") == 1
    assert {p.name for p in (tmp_path / "a/b").iterdir()} == OWN
    assert left_over(tmp_path / "a") == []
    write(tmp_path / "a/b", 2)
    assert number_in(tmp_path / "a/b") == 2
    assert left_over(tmp_path / "a") == []


@pytest.mark.parametrize("exchange", [True, False])
def test_write_keeps_foreign_files_and_subfolders(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda a, b: False)
    target = tmp_path / "a"
    write(target, 1)
    (target / "notes.txt").write_text("mine")
    (target / "second/deep").mkdir(parents=True)
    (target / "second/deep/file").write_text("deep")
    (target / "link").symlink_to("notes.txt")
    (target / "loop").symlink_to("loop")
    write(target, 2)
    assert number_in(target) == 2
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "second/deep/file").read_text() == "deep"
    assert os.readlink(target / "link") == "notes.txt"
    assert os.readlink(target / "loop") == "loop"
    assert left_over(tmp_path) == []


def test_write_into_the_working_directory_keeps_it_usable(tmp_path, monkeypatch):
    target = tmp_path / "a"
    write(target, 1)
    (target / "sub").mkdir()
    for place in (target, target / "sub"):
        monkeypatch.chdir(place)
        write(target, 2)
        assert Path.cwd() == place
        assert number_in(Path("." if place == target else "..")) == 2
    monkeypatch.chdir(target)
    write(".", 3)
    assert number_in(target) == 3


def test_write_through_a_symbolic_link_keeps_the_link(tmp_path):
    write(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink()
    assert number_in(tmp_path / "real") == 2


def test_write_refuses_a_file_and_leaves_it(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(CheckpointError, match="a is a file; choose a folder"):
        write(tmp_path / "a", 1)
    with pytest.raises(CheckpointError, match="could not be written"):
        write(tmp_path / "a/b", 1)
    assert (tmp_path / "a").read_text() == "mine"
    assert left_over(tmp_path) == []


def test_write_replaces_a_folder_at_the_place_of_one_of_its_files(tmp_path):
    (tmp_path / "a" / folder.CONFIG).mkdir(parents=True)
    write(tmp_path / "a", 1)
    assert number_in(tmp_path / "a") == 1


CALLS = (
    "os.fsync",
    "os.open",
    "os.link",
    "os.rename",
    "os.mkdir",
    "os.scandir",
    "os.close",
    "pathlib.Path.write_bytes",
)


def calls_made(monkeypatch, path, act):
    """How often each of CALLS is made while `write` runs; `act(name, index)` is called before each."""
    counts = dict.fromkeys(CALLS, 0)
    with monkeypatch.context() as patch:
        for name in CALLS:
            module, attribute = name.rsplit(".", 1)
            owner = Path if "Path" in module else os
            original = getattr(owner, attribute)

            def wrapped(*args, _name=name, _original=original, **kwargs):
                index = counts[_name]
                counts[_name] += 1
                act(_name, index)
                return _original(*args, **kwargs)

            patch.setattr(owner, attribute, wrapped)
        act("start", 0)
        write(path, 2)
    return counts


@pytest.mark.parametrize("exchange", [True, False])
def test_write_leaves_the_old_folder_when_the_system_refuses_any_call(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda a, b: False)
    target = tmp_path / "a"
    write(target, 1)
    (target / "notes.txt").write_text("mine")
    counts = calls_made(monkeypatch, target, lambda name, index: None)
    assert counts["os.fsync"] >= 5
    cases = 0
    for name in ("os.fsync", "os.open", "os.mkdir", "os.scandir", "pathlib.Path.write_bytes", "os.rename"):
        for index in range(counts[name]):
            write(target, 1)
            armed = [True]

            def fail(called, number, name=name, index=index, armed=armed):
                if armed[0] and (called, number) == (name, index):
                    armed[0] = False
                    raise OSError(28, "No space left on device")

            outcome = None
            try:
                calls_made(monkeypatch, target, fail)
            except CheckpointError as error:
                outcome = error
            found = folder.located(target, "default")
            assert number_in(found) == (1 if outcome else 2), (name, index)
            assert (found / "notes.txt").read_text() == "mine"
            if outcome:
                assert "No space left on device" in str(outcome)
                assert [n for n in left_over(tmp_path) if n.endswith(".new")] == []
            for name_left in left_over(tmp_path):  # where removing what is no longer needed was refused
                shutil.rmtree(tmp_path / name_left)
            cases += 1
    assert cases > 10


def test_write_reports_a_full_disk_and_leaves_the_old_folder(tmp_path):
    """A process that may not write large files stands in for a full disk: the tensor file cannot be written."""
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(folder.__file__).parents[1])!r})
import torch
from pathlib import Path
from peftkit import folder
from peftkit.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    folder.write(Path({str(tmp_path / "a")!r}), {{}}, {{"a": torch.zeros(1 << 16)}})
except CheckpointError as error:
    print("refused", error)
"""
    write(tmp_path / "a", 1)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert "refused" in done.stdout, done.stderr
    assert "could not be written" in done.stdout
    assert number_in(tmp_path / "a") == 1
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_folder_is_old_or_new_when_the_writer_dies_before_any_call(exchange, tmp_path, monkeypatch):
    """A forked writer kills itself before each call in turn; the folder loads, complete, after every death."""
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda a, b: False)
    target = tmp_path / "a"
    write(target, 1)
    (target / "notes.txt").write_text("mine")
    counts = calls_made(monkeypatch, target, lambda name, index: None)
    seen = set()
    for name in CALLS:
        for index in range(counts[name]):
            write(target, 1)

            def die(called, number, name=name, index=index):
                if (called, number) == (name, index):
                    os.kill(os.getpid(), signal.SIGKILL)

            child = os.fork()
            if child == 0:
                calls_made(monkeypatch, target, die)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), (name, index)
            found = folder.located(target, "default")
            seen.add(number_in(found))
            assert (found / "notes.txt").read_text() == "mine"
            write(target, 1)
            assert number_in(target) == 1
    assert seen == {1, 2}


def test_named_folder_is_found_when_the_writer_died_between_two_renames(tmp_path):
    write(tmp_path / "all/second", 1)
    os.rename(tmp_path / "all/second", folder.previous_of(tmp_path / "all/second"))
    assert number_in(folder.located(tmp_path / "all", "second")) == 1


def test_write_removes_what_a_killed_writer_left_a_day_ago_and_nothing_younger(tmp_path):
    old, young = (tmp_path / f".a.{mark}.new" for mark in ("000000000001", "000000000002"))
    other = tmp_path / ".ab.000000000003.new"
    for place in (old, young, other):
        place.mkdir()
        (place / folder.WEIGHTS).write_bytes(b"half")
    for place in (old, other):
        os.utime(place, (0, 0))
    write(tmp_path / "a", 1)
    assert left_over(tmp_path) == sorted([young.name, other.name])


def test_readers_never_see_a_mix_of_two_adapters(tmp_path):
    target = tmp_path / "a"
    write(target, 1)
    stop = threading.Event()
    seen, wrong = set(), []

    def read():
        while not stop.is_set():
            try:
                # A reader that holds the folder open reads one adapter, whatever is swapped in meanwhile.
                descriptor = os.open(target, os.O_RDONLY)
                try:
                    inside = Path(f"/proc/self/fd/{descriptor}")
                    seen.add(number_in(inside))
                finally:
                    os.close(descriptor)
            except CheckpointError:
                pass  # the old folder was removed while it was read: an error, never a mix
            except BaseException as error:
                wrong.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        write(target, 1 + number % 2)
    stop.set()
    reader.join()
    assert not wrong
    assert seen


# Reading --------------------------------------------------------------------------------------------------------------


def damaged(path, change):
    """A complete folder whose tensor file went through `change`."""
    write(path, 1)
    file = path / folder.WEIGHTS
    file.write_bytes(change(file.read_bytes()))
    return path


def with_header(content, change):
    """The file with a changed header, its length adjusted."""
    size = struct.unpack("<Q", content[:8])[0]
    header = change(json.loads(content[8 : 8 + size]))
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + content[8 + size :]


def moved(name, **fields):
    def change(header):
        return {**header, name: {**header[name], **fields}}

    return change


HOSTILE = {
    "empty": lambda c: b"",
    "zeros": lambda c: b"\0" * len(c),
    "header longer than the file": lambda c: struct.pack("<Q", 10**6) + c[8:],
    "header of 2**63 bytes": lambda c: struct.pack("<Q", 2**63) + c[8:],
    "header of 2**64-1 bytes": lambda c: b"\xff" * 8 + c[8:],
    "header one byte short": lambda c: struct.pack("<Q", struct.unpack("<Q", c[:8])[0] - 1) + c[8:],
    "bytes behind the tensors": lambda c: c + b"more",
    "header is a list": lambda c: with_header(c, lambda h: []),
    "header is not JSON": lambda c: with_header(c, lambda h: b"{" * 64),
    "header nested deeply": lambda c: with_header(c, lambda h: b"[" * 200_000),
    "overlapping tensors": lambda c: with_header(c, moved("b", data_offsets=[0, 20])),
    "tensor beyond the file": lambda c: with_header(c, moved("b", data_offsets=[10**9, 10**9 + 20])),
    "offsets turned around": lambda c: with_header(c, moved("b", data_offsets=[44, 24])),
    "negative offset": lambda c: with_header(c, moved("b", data_offsets=[-20, 0])),
    "shape larger than its bytes": lambda c: with_header(c, moved("b", shape=[2**40, 2**40])),
    "negative shape": lambda c: with_header(c, moved("b", shape=[-5])),
    "unknown dtype": lambda c: with_header(c, moved("b", dtype="EVIL")),
    "shape is text": lambda c: with_header(c, moved("b", shape="5")),
    "a pickle": lambda c: b"\x80\x04cos\nsystem\n(S'touch /tmp/never'\ntR.",
    "a zip": lambda c: b"PK\x03\x04" + c,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tensor_file_is_refused(kind, tmp_path):
    path = damaged(tmp_path / "a", HOSTILE[kind])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is not a complete safetensors file"):
        folder.read_tensors(path)


def test_tensor_file_truncated_anywhere_is_refused(tmp_path):
    write(tmp_path / "a", 1)
    file = tmp_path / "a" / folder.WEIGHTS
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            folder.read_tensors(tmp_path / "a")
    file.write_bytes(whole)
    assert folder.read_tensors(tmp_path / "a").keys() == load_file(file).keys()


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_adapter.bin", folder.WEIGHTS])
def test_pickle_is_never_opened(name, tmp_path):
    write(tmp_path / "a", 1)
    (tmp_path / "a" / folder.WEIGHTS).unlink()
    torch.save(Planted(tmp_path / "ran"), tmp_path / "a" / name)
    with pytest.raises(CheckpointError, match=r"as a pickle|is not a complete safetensors file"):
        folder.read_tensors(tmp_path / "a")
    assert not (tmp_path / "ran").exists()
    trap = tmp_path / "a" / name
    torch.load(trap.rename(trap.with_suffix(".bin")), weights_only=False)
    assert (tmp_path / "ran").exists()  # the trap works: whoever opens it springs it


JSON = {
    "missing": (None, "does not exist"),
    "empty": (b"", "cannot be read as JSON"),
    "list": (b"[1]", "holds a JSON list, expected an object"),
    "number": (b"3", "holds a JSON int"),
    "null": (b"null", "holds a JSON NoneType"),
    "text": (b'"LORA"', "holds a JSON str"),
    "not utf-8": (b'{"a": "\xff\xfe"}', "cannot be read as JSON"),
    "nan": (b'{"r": NaN}', "NaN is no JSON value"),
    "infinity": (b'{"r": -Infinity}', "-Infinity is no JSON value"),
    "deep list": (b"[" * 200_000, "cannot be read as JSON"),
    "deep object": (b'{"a":' * 100_000, "cannot be read as JSON"),
    "huge number": (b'{"r": ' + b"9" * 10_000 + b"}", "cannot be read as JSON"),
    "truncated": (b'{"peft_type": "LO', "cannot be read as JSON"),
}


@pytest.mark.parametrize("kind", JSON)
def test_hostile_json_is_refused(kind, tmp_path):
    content, message = JSON[kind]
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        folder.read_json(tmp_path / "x.json")


def test_json_that_is_no_regular_file_is_refused_unread(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(folder.LARGEST_CONFIG + 1)
    for name in ("folder", "pipe", "huge", "loop"):
        with pytest.raises(CheckpointError, match=r"no regular file|Too many levels of symbolic links"):
            folder.read_json(tmp_path / name)


def test_located_says_what_is_there_instead(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        folder.located(tmp_path / "none", "default")
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json$"):
        folder.located(tmp_path, "default")
    write(tmp_path / "first", 1)
    with pytest.raises(CheckpointError, match="it holds adapters in first"):
        folder.located(tmp_path, "default")
    assert folder.located(tmp_path, "first") == tmp_path / "first"
    (tmp_path / "first" / folder.CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"holds adapter_model\.safetensors without adapter_config\.json"):
        folder.located(tmp_path / "first", "default")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError):
        folder.located(tmp_path / "loop", "default")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError):
        folder.located(tmp_path / "file", "default")
