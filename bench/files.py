"""Files that are whole at every moment."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def check_targets(files: Mapping[str, Path | None]) -> None:
    """Raise ValueError, naming the option, for files that cannot be written: before anything is measured for them."""
    for option, file in files.items():
        if file is None:
            continue
        if file.is_dir():
            raise ValueError(f"{option}: expected a file, got the folder {file}")
        if not file.parent.is_dir():
            raise ValueError(f"{option}: there is no folder {file.parent} for {file.name}")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ValueError(f"{option}: {file} cannot be written")


def replace(file: Path, text: str) -> None:
    """Write a file so that a process killed at any moment leaves the old one or the new one, whole.

    A link stays one; what is no regular file (a pipe, a terminal) is written to as it is.
    """
    file = file.resolve()
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(name, 0o644)  # mkstemp's files are private; a table or a report may be a team's
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
