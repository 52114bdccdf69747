"""Docstrings taken apart: the description, and what each parameter is for.

Three styles are understood, mixed if need be: Google ("Args:" and an indented list), NumPy ("Parameters" with a line of
dashes) and Sphinx (":param name:").
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

_PARAMETER_SECTIONS = ("args", "arguments", "parameters", "params", "attributes")
_OTHER_SECTIONS = (
    *("returns", "return", "yields", "yield", "raises", "warns", "receives"),
    *("examples", "example", "notes", "note", "references", "see also", "warnings", "warning"),
    *("todo", "other parameters"),
)
_SECTIONS = (*_PARAMETER_SECTIONS, *_OTHER_SECTIONS)
_GOOGLE_ENTRY = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:(?:\s+|$)(.*)")
_NUMPY_ENTRY = re.compile(r"(\*{0,2}\w+(?:\s*,\s*\*{0,2}\w+)*)\s*(?::.*)?")
_SPHINX_FIELD = re.compile(r":(\w+)(?:\s+([^:]*?))?\s*:(?:\s+|$)(.*)")
_SPHINX_PARAMETER = ("param", "parameter", "arg", "argument", "key", "keyword")


@dataclass(frozen=True)
class Docstring:
    """description: what stands before the first section. parameters: name -> description in one line."""

    description: str
    parameters: dict[str, str]


def parse_docstring(text: str | None) -> Docstring:
    """The parts of a docstring; empty for None. Nothing is an error: what is in no known form is description."""
    lines = inspect.cleandoc(text or "").splitlines()
    parameters: dict[str, str] = {}
    lines = _take_sphinx_fields(lines, parameters)
    start = next((i for i in range(len(lines)) if _section(lines, i)), len(lines))
    index = start
    while index < len(lines):
        name, width = _section(lines, index) or ("", 1)
        end = next((i for i in range(index + 1, len(lines)) if _section(lines, i)), len(lines))
        if name in _PARAMETER_SECTIONS:
            entry = _GOOGLE_ENTRY if width == 1 else _NUMPY_ENTRY
            _read_entries(lines[index + width : end], entry, parameters)
        index = end
    return Docstring("\n".join(lines[:start]).strip(), parameters)


def _section(lines: list[str], index: int) -> tuple[str, int] | None:
    """Name of the section whose heading stands on this line, and the lines the heading takes."""
    line = lines[index]
    name = line.rstrip().removesuffix(":").lower()
    if name not in _SECTIONS:
        return None
    following = lines[index + 1].strip() if index + 1 < len(lines) else ""
    if len(following) >= 3 and set(following) == {"-"}:
        return name, 2
    return (name, 1) if line.rstrip().endswith(":") else None


def _read_entries(lines: list[str], entry: re.Pattern[str], parameters: dict[str, str]) -> None:
    """Entries begin at the indentation of the first; what is indented deeper belongs to the entry above it."""
    filled = [line for line in lines if line.strip()]
    indent = min((_indent(line) for line in filled), default=0)
    names: list[str] = []
    texts: list[str] = []
    for line in filled:
        match = entry.fullmatch(line.strip()) if _indent(line) == indent else None
        if match is None:
            texts.append(line.strip())
            continue
        _store(names, texts, parameters)
        names = [name.strip(" *") for name in match[1].split(",")]
        texts = [match[2]] if entry.groups > 1 else []
    _store(names, texts, parameters)


def _take_sphinx_fields(lines: list[str], parameters: dict[str, str]) -> list[str]:
    """The lines without the fields; an indented line after a field is part of it."""
    rest: list[str] = []
    names: list[str] = []
    texts: list[str] = []
    is_field = False
    for line in lines:
        match = _SPHINX_FIELD.fullmatch(line.rstrip())
        if match is not None:
            _store(names, texts, parameters)
            is_parameter = match[1] in _SPHINX_PARAMETER and match[2]
            names = [match[2].split()[-1].lstrip("*")] if is_parameter else []
            texts = [match[3]]
            is_field = True
        elif is_field and line.strip() and _indent(line) > 0:
            texts.append(line.strip())
        else:
            is_field = is_field and not line.strip()
            rest.append(line)
    _store(names, texts, parameters)
    return rest


def _store(names: list[str], texts: list[str], parameters: dict[str, str]) -> None:
    text = " ".join(text for text in texts if text)
    for name in names:
        if text:
            parameters.setdefault(name, text)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
