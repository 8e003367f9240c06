from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import pytest
from peftkit_bench import sandbox
from peftkit_bench.sandbox import SandboxError, run

FULL = 'import os, sys\nos.write({fd}, b"x")'


def walls() -> tuple[str, ...]:
    return run("").walls


def test_a_program_passes_with_its_asserts_and_fails_with_one_that_does_not_hold() -> None:
    assert run("def f(x): return x + 1", checks="assert f(1) == 2\nassert f(2) == 3").passed
    outcome = run("def f(x): return x + 1", checks="assert f(1) == 2\nassert f(2) == 4, 'two'")
    assert not outcome.passed
    assert outcome.reason == "AssertionError: two (checks.py, line 2)"


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(:", "SyntaxError: invalid syntax (program.py, line 1)"),
        ("x = 1\nraise ValueError('a\\nb')", "ValueError: a b (program.py, line 2)"),
        ("class E(Exception):\n  def __str__(self): raise E\nraise E", "E (program.py, line 3)"),
        ("raise SystemExit(0)", "ended by itself, with status 0, before its last line"),
        ("import sys; sys.exit()", "ended by itself, with status None, before its last line"),
        ("import os; os._exit(0)", "ended by itself, with status 0, before its last line"),
        ("import os; os._exit(3)", "ended by itself, with status 3, before its last line"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9"),
        ("import os; os.abort()", "was killed by signal 6"),
        ("input()", "EOFError: EOF when reading a line (program.py, line 1)"),
        ("x = bytearray(10**10)", "MemoryError (program.py, line 1)"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy' (program.py, line 1)"),
        ("open('big', 'wb').write(bytes(10**8))", "OSError: [Errno 27] File too large (program.py, line 1)"),
        ("x = '\udcff'", "AssertionError: reached (checks.py, line 1)"),
    ],
)
def test_what_ends_early_has_not_passed_and_says_why(program: str, reason: str) -> None:
    outcome = run(program, checks="assert False, 'reached'")
    assert not outcome.passed
    assert outcome.reason == reason


@pytest.mark.parametrize("ending", ['x = """', "if False:", "try:\n  pass\nexcept:", "x = (", "y = 1 \\"])
def test_the_end_of_a_program_does_not_swallow_its_asserts(ending: str) -> None:
    assert not run(ending, checks='assert False, """"""').passed


def test_a_program_that_prints_a_verdict_has_not_passed() -> None:
    forged = (
        "import json, os\nfor fd in range(3, 64):\n  try: os.write(fd, b'\"passed \"\\n')\n  except OSError: pass\n"
    )
    assert not run(forged + "os._exit(0)").passed
    assert not run("print('passed')\nassert False").passed


def test_time_is_limited_also_for_what_sleeps() -> None:
    for program in ("while True: pass", "import time; time.sleep(60)"):
        begun = time.monotonic()
        assert run(program, seconds=0.5).reason == "was not done after 0.5 s"
        assert time.monotonic() - begun < 3


def test_memory_is_limited() -> None:
    program = "x = []\nwhile len(x) < 200: x.append(bytearray(2**20))"
    assert run(program).passed
    assert run(program, memory_bytes=128 * 2**20).reason == "MemoryError (program.py, line 2)"


def test_limits_that_leave_no_room_to_start_are_no_verdict() -> None:
    with pytest.raises(
        SandboxError, match=r"at least 67,108,864 bytes of address space.* found 1,000,000 bytes and 5 s"
    ):
        run("x = 1", memory_bytes=10**6)
    with pytest.raises(SandboxError, match=r"and time; found .* and 0 s"):
        run("x = 1", seconds=0)


def test_an_interpreter_that_does_not_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(SandboxError, match="/bin/false ended with status 1 before the program began"):
        run("x = 1")


def running(mark: str) -> bool:
    """Whether any process has this in its command line."""
    time.sleep(0.05)
    return any(mark.encode() in _content(path) for path in Path("/proc").glob("[0-9]*/cmdline"))


def test_a_fork_bomb_is_bounded_and_nothing_of_it_is_left() -> None:
    mark = f"98{os.getpid()}"
    bomb = f"""
import os
while True:
    try:
        if os.fork() and os.fork() == 0: os.execlp('sleep', 'sleep', '{mark}')
    except OSError: pass
"""
    if "processes" in walls():
        assert not run(bomb, seconds=0.5).passed
        count = f"""
import os
n = 0
try:
    while n < 500:
        if os.fork() == 0: os.execlp('sleep', 'sleep', '{mark}')
        n += 1
except OSError: pass
assert n < 40, n
"""
        assert run(count).reason == ""
    assert not running(mark)


def test_processes_and_threads_left_behind_are_not_waited_for_and_end() -> None:
    mark = f"97{os.getpid()}"
    begun = time.monotonic()
    assert run("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()").passed
    assert run(f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'])").passed
    if "process table" in walls():
        assert run(f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'], start_new_session=True)").passed
    assert time.monotonic() - begun < 20
    assert not running(mark)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a process that adopts orphans, which Linux has")
def test_a_program_that_is_stopped_leaves_no_process_to_be_reaped() -> None:
    adopt_orphans, parent = 36, f") Z {os.getpid()} ".encode()
    libc = ctypes.CDLL(None)
    libc.prctl(adopt_orphans, 1, 0, 0, 0)
    try:
        assert not run("import os, time; os.fork(); time.sleep(60)", seconds=0.2).passed
        assert not run("import time; time.sleep(60)", seconds=0.2).passed
        time.sleep(0.05)
        assert not [path for path in Path("/proc").glob("[0-9]*/stat") if parent in _content(path)]
    finally:
        libc.prctl(adopt_orphans, 0, 0, 0, 0)


def test_output_is_thrown_away() -> None:
    assert run("import sys\nfor _ in range(100): print('x' * 10**6); print('y', file=sys.stderr)").passed


def test_it_sees_no_environment_and_no_open_file_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTKIT_SECRET", "1")
    program = "import os\nassert 'PEFTKIT_SECRET' not in os.environ and 'HOME' not in os.environ, sorted(os.environ)"
    assert run(program).reason == ""
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        look = "import os\nfor n in range(64):\n  try: assert not os.readlink(f'/proc/self/fd/{n}').endswith('/open')\n"
        assert run(look + "  except FileNotFoundError: pass").reason == ""


def test_its_directory_is_its_own_and_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path / "temporary"))
    program = (
        f"import os\nopen('a', 'w').write('a')\nos.mkdir('b')\nos.symlink({str(tmp_path / 'kept')!r}, 'c')\n"
        "os.chmod('b', 0)\nassert sorted(os.listdir()) == ['a', 'b', 'c', 'checks.py', 'program.py'], os.listdir()"
    )
    assert run(program).reason == ""
    assert list((tmp_path / "temporary").iterdir()) == []
    assert (tmp_path / "kept" / "file").exists()


def test_writes_outside_are_refused_where_the_kernel_can(tmp_path: Path) -> None:
    if "writes" not in walls():
        pytest.skip("this kernel has no Landlock")
    (tmp_path / "there").write_text("kept")
    tmp_path.chmod(0o777)
    (tmp_path / "there").chmod(0o666)
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(tmp_path / 'there')!r}, 'w')",
        f"import os; os.unlink({str(tmp_path / 'there')!r})",
        f"import os; os.rename({str(tmp_path / 'there')!r}, 'mine')",
        f"import os; os.truncate({str(tmp_path / 'there')!r}, 0)",
    ):
        assert run(program).reason.startswith(("PermissionError", "OSError: [Errno 18]")), program
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "kept"


def test_there_is_no_network_where_the_kernel_can() -> None:
    if "network" not in walls():
        pytest.skip("this kernel gives no network namespace to this user")
    assert run("import os\nimport socket\n"
               "assert [n for _, n in socket.if_nameindex()] == ['lo']").reason == ""  # fmt: skip
    assert not run("import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)").passed


def test_sets_have_the_same_order_every_time() -> None:
    order = "x = list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})\nassert False, x"
    assert len({run(order).reason for _ in range(3)}) == 1
