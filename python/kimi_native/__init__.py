"""Kimi K2 and its family on hand-written kernels, from the checkpoint as published.

Importing the package imports neither torch nor the native module; each name of __all__ is looked up on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "kimi_native.chat.types": (
        "ContentDelta",
        "Event",
        "Finish",
        "Message",
        "ReasoningDelta",
        "ToolCall",
        "ToolCallDelta",
        "Usage",
    ),
    "kimi_native.chat.tool": ("Tool",),
    "kimi_native.conversation": ("Chat", "ChatEvent", "ChatFinish", "Reply"),
    "kimi_native.errors": (
        "ConfigError",
        "KimiNativeError",
        "MemoryPlanError",
        "ModelFormatError",
        "NonFiniteLogitsError",
        "RequestError",
        "TokenizerError",
    ),
    "kimi_native.generate": ("Model", "load"),
    "kimi_native.generation": ("Generation", "Timing"),
    "kimi_native.prefixes": ("KeptPrefix",),
    "kimi_native.sampling": ("SampledToken", "SamplingParams"),
    "kimi_native.tool_runner": ("ToolResult",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted((*_MODULE_OF, "__version__"))


def _version() -> str:
    from importlib import metadata  # slow to import, and seldom asked for

    try:
        return metadata.version("kimi-native")
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "0+unknown"


def __getattr__(name: str) -> Any:
    """Imports an exported name on first use (PEP 562)."""
    if name == "__version__":
        value = _version()
    elif name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module 'kimi_native' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
