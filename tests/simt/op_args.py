"""The Args structs of ops.h as ctypes structures, read from the header itself so that the two cannot differ."""

from __future__ import annotations

import ctypes
import re
from functools import cache
from pathlib import Path

HEADER = Path(__file__).resolve().parents[2] / "csrc/include/kimi_native/ops.h"
SCALARS = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "float": ctypes.c_float,
    "bool": ctypes.c_bool,
    "DType": ctypes.c_int32,
    "Compute": ctypes.c_int32,
    "Scoring": ctypes.c_int32,
    "GroupScore": ctypes.c_int32,
}


def field_list(body: str) -> list[tuple[str, type]]:
    """Fields of a struct body: `const void* x; int64_t tokens, hidden;`."""
    fields = []
    for statement in re.sub(r"//[^\n]*", "", body).split(";"):
        if not statement.strip():
            continue
        kind, names = re.fullmatch(r"\s*([\w\s*]*[\s*])(\w[\w\s,]*)", statement).groups()
        ctype = ctypes.c_void_p if "*" in kind else SCALARS[kind.strip()]
        fields += [(name.strip(), ctype) for name in names.split(",")]
    return fields


@cache
def args_type(name: str) -> type[ctypes.Structure]:
    """RmsNormArgs for "rms_norm"."""
    struct = "".join(part.capitalize() for part in name.split("_")) + "Args"
    body = re.search(rf"struct {struct} {{(.*?)^}};", HEADER.read_text(), re.DOTALL | re.MULTILINE)
    return type(struct, (ctypes.Structure,), {"_fields_": field_list(body.group(1))})
