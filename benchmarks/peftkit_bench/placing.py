"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def place(path: Path, content: str | bytes) -> None:
    """Writes a file, and its folder where it is missing; what was there stays until all of the new one is on the disk.

    Args:
        content: text is written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
