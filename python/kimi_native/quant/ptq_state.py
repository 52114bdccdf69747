"""The record of an unfinished quantize: of what source, with which settings, and which shards are done.

It is the first file that quantize writes and the last that it removes. While it is there `load` refuses the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_native.checkpoint_writer import FolderWriter
from kimi_native.errors import ModelFormatError
from kimi_native.folder_names import UNFINISHED_NAME
from kimi_native.json_file import printable, read_json, short

MAX_STATE_BYTES = 16 << 20
_FIELDS = ("source", "files", "settings", "shards")


@dataclass
class RunState:
    """source    the source folder, for the reader
    files     of the source: name -> [bytes, modification time in ns]
    settings  what the new bytes depend on besides
    shards    finished ones: name -> [bytes, modification time in ns]
    """

    source: str
    files: dict[str, list[int]]
    settings: dict[str, Any]
    shards: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> RunState | None:
        """The state in a folder, None if it has none. Raises ModelFormatError on a file that is no such state."""
        path = folder / UNFINISHED_NAME
        try:
            values = read_json(path, max_bytes=MAX_STATE_BYTES, error=ModelFormatError)
        except FileNotFoundError:
            return None
        good = (
            values.keys() == set(_FIELDS)
            and isinstance(values["source"], str)
            and isinstance(values["settings"], dict)
            and all(_is_stamps(values[key]) for key in ("files", "shards"))
        )
        if not good:
            raise ModelFormatError(f"{path}: must be the state of an unfinished quantize")
        return RunState(**values)

    def write(self, folder: FolderWriter) -> None:
        folder.write_json(UNFINISHED_NAME, {key: getattr(self, key) for key in _FIELDS})

    def difference(self, other: RunState) -> str | None:
        """What is not the same in another run, in words; None if that one can be continued by this one."""
        for key in self.settings.keys() | other.settings.keys():
            now, before = self.settings.get(key), other.settings.get(key)
            if now != before:
                return f"{printable(key)} {short(before)}, not {short(now)}"
        return changed_file(self.files, other.files)


def changed_file(now: dict[str, list[int]], before: dict[str, list[int]]) -> str | None:
    """The first file that is not as it was, in words."""
    for name in sorted(now.keys() | before.keys()):
        if now.get(name) != before.get(name):
            what = "new" if name not in before else "gone" if name not in now else "changed"
            return f"source file {printable(name)}, which is {what} since"
    return None


def stamps(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """name -> [bytes, modification time in ns]: what tells a changed file. What cannot be asked is left out."""
    found = {}
    for name in names:
        try:
            status = os.stat(folder / name)
        except OSError:
            continue
        found[name] = [status.st_size, status.st_mtime_ns]
    return found


def _is_stamps(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(v, list) and len(v) == 2 and all(type(n) is int for n in v)
        for v in value.values()
    )
