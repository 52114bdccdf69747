"""Files that appear whole or not at all, and are refused before the work that would fill them."""

from __future__ import annotations

import os
from pathlib import Path

from kimi_native.errors import RequestError


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises RequestError if `write_whole` could not write there; leaves nothing behind."""
    part = _part(path)
    try:
        part.unlink(missing_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise RequestError(f"{path}: must be writable (got {error.strerror})") from error


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes under a temporary name, flushes, and renames; what was there stays until then. Raises RequestError."""
    part = _part(path)
    try:
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(Path(path).resolve())
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise RequestError(f"{path}: must be writable (got {error.strerror})") from error


def _part(path: str | os.PathLike[str]) -> Path:
    """Where the file is written first; behind a link, beside what it points to."""
    target = Path(path).resolve()
    # Renaming onto a device or a folder would replace it, or fail when all is computed.
    if not target.name or (target.exists() and not target.is_file()):
        raise RequestError(f"{path}: must be the name of an ordinary file (got something else)")
    return target.with_name(target.name + ".part")
