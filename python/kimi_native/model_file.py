"""Files of a model folder, found with suspicion: regular files that lie inside the folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kimi_native.errors import ConfigError, KimiNativeError, RequestError


def model_folder(op: str, path: object) -> Path:
    """The path of a model folder as the caller of `op` gave it; whether it is one shows when it is read.

    Raises TypeError on what is no path, RequestError on an empty one, which Path takes for the current folder.
    """
    if not isinstance(path, str) and not isinstance(path, os.PathLike):
        raise TypeError(f"{op}: the folder must be a str or os.PathLike (got {path!r:.80})")
    if not os.fspath(path):
        raise RequestError(f"{op}: the folder must be named (got an empty path)")
    return Path(path)


def is_plain_name(name: str) -> bool:
    """Whether a text can name a file of a folder, and nothing outside it."""
    return 0 < len(name) <= 255 and name not in (".", "..") and not any(c in name for c in "/\\\0")


def file_inside(folder: Path, name: str, error: type[KimiNativeError] = ConfigError) -> Path:
    """The path of a regular file of a model folder; refuses names and links that lead out of it.

    A Hugging Face cache keeps snapshots/<revision>/name as a link to blobs/<hash> of the same repository, so links
    into that blobs folder are followed.

    Raises `error` on a name with a folder part, on a link elsewhere, to nothing or to itself, and on anything but a
    regular file; FileNotFoundError or NotADirectoryError if nothing has that name.
    """
    if not is_plain_name(name):
        raise error(f"{folder}: a file name must be plain, without a folder (got {name!r})")
    path = folder / name
    os.lstat(path)
    real = Path(os.path.realpath(path))
    home = Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(Path(os.path.realpath(home.parent.parent / "blobs")))
    if real.parent not in allowed:
        raise error(f"{path}: a link must stay inside the model folder (leads to {real})")
    try:
        mode = os.stat(real).st_mode
    except OSError as e:  # a download that stopped half-way leaves such links
        raise error(f"{path}: a link must lead to a file (got {real}: {e.strerror})") from None
    if not stat.S_ISREG(mode):
        raise error(f"{path}: must be a regular file")
    return path


def find_file(folder: Path, name: str, error: type[KimiNativeError] = ConfigError) -> Path | None:
    """As file_inside; None if nothing has that name or the folder is none."""
    try:
        return file_inside(folder, name, error)
    except (FileNotFoundError, NotADirectoryError):
        return None
