"""Rows of an experiment that takes hours, kept one by one: what was interrupted goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kimi_native.errors import RequestError


class KeptRows:
    """Rows by key in a file of JSON lines; the first line says of what.

    path     made if missing; None keeps the rows for this run only
    subject  what the rows are about: whatever else they depend on

    Raises RequestError if the file is of another subject or not such a file. A line that an interrupt has cut off is
    forgotten.
    """

    def __init__(self, path: Path | None, subject: Any) -> None:
        self._path, self._rows = path, {}
        head = {"of": json.loads(json.dumps(subject))}
        lines = [] if path is None or not path.exists() else path.read_text().split("\n")
        whole = lines[:-1]  # the last one, cut off or empty, ends in no line break
        try:
            objects = [json.loads(line) for line in whole]
            if objects and objects[0] != head:
                raise RequestError(
                    f"claims: {path} must be of the same model, settings and seed: name another folder "
                    f"(got {objects[0]['of']}, not {head['of']})"
                )
            self._rows = {json.dumps(o["key"]): o["row"] for o in objects[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"claims: {path} must hold JSON lines of rows ({error!r})") from None
        if path is not None and (not whole or lines[-1]):
            path.write_text("".join(f"{line}\n" for line in whole or [json.dumps(head)]))

    def get(self, key: Any) -> dict[str, Any] | None:
        return self._rows.get(json.dumps(key))

    def put(self, key: Any, row: dict[str, Any]) -> None:
        self._rows[json.dumps(key)] = row
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "row": row}) + "\n")
