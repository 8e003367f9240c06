"""What runs inside the sandbox: a process that walls itself in, runs a program and reports. Standard library only.

It is started by `peftkit_bench.sandbox` by its path, in an interpreter that cannot import this package.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

PROCESSES, OPEN_FILES, FILE_BYTES = 32, 64, 16 * 2**20
LONGEST_REASON = 300
_NEW_USER, _NEW_PID, _NEW_NET, _NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000
_KEEP_CAPABILITIES, _NO_NEW_PRIVILEGES = 8, 38
_READ_ANY_FILE = 1 << 2  # CAP_DAC_READ_SEARCH
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_LIBC: Any = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Runs program.py and then checks.py of the working directory; the first argument says how."""
    asked = json.loads(sys.argv[1])
    walls = _walls(asked["seconds"], asked["memory_bytes"])
    os.write(asked["result"], (json.dumps(walls) + "\n").encode())
    space: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        for name in ("program.py", "checks.py"):
            exec(compile(Path(name).read_text(encoding="utf-8"), name, "exec"), space)
    except BaseException as error:  # whatever the program raises, SystemExit included, is the answer
        verdict = "failed " + _reason(error)
    else:
        # Read only now, so that it stands nowhere in the memory of the program while that runs.
        verdict = "passed " + os.read(asked["token"], 64).decode()
    os.write(asked["result"], (json.dumps(verdict) + "\n").encode())
    os._exit(0)  # threads that are left behind are not waited for


def _reason(error: BaseException) -> str:
    """What went wrong, in one line, with the line of the program or of the checks."""
    if isinstance(error, SystemExit):
        return f"ended by itself, with status {error.code!r:.40}, before its last line"
    line = error.lineno if isinstance(error, SyntaxError) else None
    place = error.filename if isinstance(error, SyntaxError) else None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("program.py", "checks.py"):
            place, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next
    try:
        message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    except BaseException:  # an exception class of the program's own
        message = ""
    where = f" ({place}, line {line})" if line is not None else ""
    return f"{type(error).__name__}{': ' if message else ''}{message:.{LONGEST_REASON}}{where}"


def _walls(seconds: float, memory_bytes: int) -> list[str]:
    """Takes away from this process what can be taken; returns the names of what was."""
    walls = ["time", "memory", "files", *(_linux_walls() if sys.platform == "linux" else [])]
    whole = max(1, round(seconds + 0.5))
    for what, limit in (
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    return walls


def _linux_walls() -> list[str]:
    """Those that the kernel offers to this user."""
    walls = []
    user = os.geteuid()
    if user == 0:
        if _LIBC.unshare(_NEW_PID | _NEW_NET | _NEW_IPC) == 0:
            walls += ["network", "process table"]
            _follow()
        if _other_user():
            walls.append("user")
    elif _LIBC.unshare(_NEW_USER | _NEW_PID | _NEW_NET | _NEW_IPC) == 0:
        walls += ["network", "process table"]
        group = os.getegid()
        for name, value in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with contextlib.suppress(OSError):
                Path(f"/proc/self/{name}").write_text(value, encoding="ascii")
        _follow()
        _keep_capabilities(0)
    _LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if _landlock():
        walls.append("writes")
    # The kernel counts by user: that is this program alone where it has a user, or a table of users, of its own.
    if "user" in walls or (user != 0 and "process table" in walls):
        resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))
        walls.append("processes")
    return walls


def _follow() -> None:
    """Goes on in a process below one that is the first of a new process table; when that ends, the table's end too."""
    for _ in range(2):
        child = os.fork()
        if child:
            # How the caller ends it: the first of a table does not end by its own children's hands, and is reaped here.
            signal.signal(signal.SIGTERM, functools.partial(_kill, child))
            _, status = os.waitpid(child, 0)
            os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _kill(child: int, *_: object) -> None:
    os.kill(child, signal.SIGKILL)


def _other_user() -> bool:
    """Turns root into a user that owns nothing but the working directory; files may still be read, to import from."""
    chance = int.from_bytes(os.urandom(4))
    for user in (10**9 + chance % 10**9, 60_000 + chance % 5_000):
        with contextlib.suppress(OSError):
            os.chown(".", user, user)
            os.setgroups([])
            _LIBC.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            _keep_capabilities(_READ_ANY_FILE)
            return True
    return False


def _keep_capabilities(kept: int) -> None:
    header = struct.pack("Ii", 0x20080522, 0)
    if _LIBC.capset(header, struct.pack("6I", kept, kept, 0, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _landlock() -> bool:
    """Writing outside the working directory is refused by the kernel from here on, and TCP where it can do that."""
    version = _LIBC.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    write_file, truncate = 1 << 1, (1 << 14 if version >= 3 else 0)
    # Removing and making of every kind, moving between folders, truncating; not executing and reading.
    handled = write_file | sum(1 << bit for bit in range(4, 13)) | (1 << 13 if version >= 2 else 0) | truncate
    tcp = 0b11 if version >= 4 else 0
    scopes = 0b11 if version >= 6 else 0
    attributes = struct.pack("QQQ", handled, tcp, scopes)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = _LIBC.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    for path, allowed in ((".", handled), ("/dev/null", write_file | truncate)):
        place = os.open(path, os.O_PATH)
        done = _LIBC.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
        if done != 0:
            return False
    restricted = _LIBC.syscall(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return bool(restricted)


if __name__ == "__main__":
    main()
