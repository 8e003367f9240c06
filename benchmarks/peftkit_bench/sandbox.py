"""Runs a generated Python program with its asserts, in a process of its own that may do little.

What holds on every Unix: a fresh interpreter without installed packages, an empty environment, a working directory of
its own that is removed, no standard input, output thrown away, no open files of the caller's, and limits of time, of
memory (for each process), of the size of a file and the number of open ones. When the program is over, or its time is,
its whole process group is killed.

What holds where the kernel offers it, as `Outcome.walls` says. On Linux that takes no special rights: "network": none;
"process table": it sees no process but its own, and none outlives it; "processes": at most 32; "writes": it cannot
change files outside its directory (Landlock); "user": where the caller is root, the program is not.

What it does not do: files that the caller may read can be read, and without "writes" those that it may write can be
written; a fault of the kernel is not stopped. A program that sets out to cheat can do so, since its asserts run in the
same process: an object may equal everything. It is a fence around the mistakes of a model, no prison for an attacker.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import PeftkitError

SECONDS = 5.0
MEMORY_BYTES = 512 * 2**20
SMALLEST_MEMORY_BYTES = 64 * 2**20
STARTING_SECONDS = 60.0
"""An interpreter that has not started by then, on however busy a machine, never will."""
ENDING_SECONDS = 2.0
_REPORT_BYTES = 16_384


class SandboxError(PeftkitError, RuntimeError):
    """The sandbox itself cannot run here; says nothing about the program."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a program."""

    passed: bool
    """It ran to its last line, and so did the checks."""
    reason: str
    """Why it did not pass, in one line; empty where it did."""
    seconds: float
    """Wall-clock time, without the start of the interpreter."""
    walls: tuple[str, ...]
    """What was held from it, see the module."""


def run(program: str, *, checks: str = "", seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Whether a program runs to its last line, and its checks after it.

    A program that ends early, with whatever status, has not passed: only a token that is handed out after the last line
    of the checks counts.

    Args:
        program: Python source.
        checks: more source, such as asserts, that sees the program's names. It is compiled by itself, so that
            an unfinished string or block at the end of the program cannot swallow it.
        seconds: of wall-clock time, and about as much of processor time.
        memory_bytes: of address space, the interpreter's 50 MB included.

    Raises:
        SandboxError: this machine cannot limit a process, none could be started, or the limits are too small to.
    """
    if os.name != "posix":
        raise SandboxError("programs are run with the limits of a Unix process, which this system lacks; use Linux")
    if memory_bytes < SMALLEST_MEMORY_BYTES or seconds <= 0:
        raise SandboxError(
            f"expected at least {SMALLEST_MEMORY_BYTES:,} bytes of address space, which an interpreter needs by "
            f"itself, and time; found {memory_bytes:,} bytes and {seconds:g} s"
        )
    with tempfile.TemporaryDirectory(prefix="peftkit-program-", ignore_cleanup_errors=True) as folder:
        for name, text in (("program.py", program), ("checks.py", checks)):
            # A lone surrogate, which a model can generate, is no text that Python reads: a syntax error.
            (Path(folder) / name).write_text(text, encoding="utf-8", errors="replace")
        return _run(folder, seconds, memory_bytes)


def _run(folder: str, seconds: float, memory_bytes: int) -> Outcome:
    token = secrets.token_hex(16)
    token_read, token_write = os.pipe()
    result_read, result_write = os.pipe()
    ours = [token_read, token_write, result_read, result_write]
    try:
        os.write(token_write, token.encode())
        asked = {"seconds": seconds, "memory_bytes": memory_bytes, "token": token_read, "result": result_write}
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8",
             str(Path(__file__).with_name("sandboxed.py")), json.dumps(asked)],
            cwd=folder,
            # Not `-I`, which ignores it: the order of sets must not change from run to run.
            env={"PYTHONHASHSEED": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(token_read, result_write),
            start_new_session=True,
        )  # fmt: skip
        # So that reading ends where the process does.
        os.close(result_write)
        ours.remove(result_write)
        status: int | None = None
        try:
            line, _, rest = _read(result_read, STARTING_SECONDS).partition(b"\n")
            walls = _value(line)
            begun = time.monotonic()
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=seconds if walls else STARTING_SECONDS)
            took = time.monotonic() - begun
            if status is None:
                # It kills the program's process table and waits for it; killed itself, it would leave that unreaped.
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=ENDING_SECONDS)
        finally:
            # Also where the program itself is over: what it started is not.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not walls:
            raise SandboxError(
                f"{sys.executable} ended with status {status} before the program began; expected it to start"
            )
        verdict = _value(rest + _read(result_read, 0))
    finally:
        for each in ours:
            os.close(each)
    reason = "" if status == 0 and verdict == f"passed {token}" else _reason(verdict, status, seconds)
    return Outcome(passed=not reason, reason=reason, seconds=took, walls=tuple(walls))


def _read(pipe: int, seconds: float) -> bytes:
    """What the process has written; nothing where it writes nothing in this time."""
    return os.read(pipe, _REPORT_BYTES) if select.select([pipe], [], [], seconds)[0] else b""


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _reason(verdict: Any, status: int | None, seconds: float) -> str:
    if status is None:
        return f"was not done after {seconds:g} s"
    if isinstance(verdict, str) and verdict.startswith("failed "):
        return verdict.removeprefix("failed ")
    # A status that came through the processes in between is that of a shell's: 256 less the signal.
    if status < 0 or status > 192:
        return f"was killed by signal {-status if status < 0 else 256 - status}"
    return f"ended by itself, with status {status}, before its last line"
