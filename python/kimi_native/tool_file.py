"""Tools from a Python file that the user names: its functions, as they would be passed to Model.chat.

The file is run. Nothing here is called for a file that the user did not name.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from kimi_native.chat.tool import Tool, as_tools
from kimi_native.errors import RequestError

_MODULE = "kimi_native_tool_file"  # no package of this name, so nothing is shadowed


def load_tools(path: str) -> tuple[Tool, ...]:
    """The tools of a file: its list TOOLS, or else every public function whose parameters all have type hints.

    Raises RequestError, naming the file, if it does not run, holds no tools, or one that cannot be declared or run.
    """
    module = _run_file(path)
    given = getattr(module, "TOOLS", None)
    try:
        tools = as_tools(_functions(module) if given is None else given)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from error
    if not tools:
        raise RequestError(
            f"{path}: must hold a list TOOLS or public functions with type hints (got neither)"
        )
    for tool in tools:
        if tool.function is None:
            raise RequestError(f"{path}: tool {tool.name} must have a function (got none)")
    return tools


def _run_file(path: str) -> ModuleType:
    if not Path(path).is_file():
        raise RequestError(f"{path}: must be a Python file (got none there)")
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise RequestError(f"{path}: must be a Python file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # where dataclasses and type hints look for their names
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    # Whatever the user's file raises, SystemExit too, is told in one line.
    except BaseException as error:
        raise RequestError(f"{path}: must run ({type(error).__name__}: {error})") from error
    return module


def _functions(module: ModuleType) -> list[Callable[..., Any]]:
    return [
        value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and inspect.isfunction(value)
        and value.__module__ == module.__name__
        and _is_typed(value)
    ]


def _is_typed(function: Callable[..., Any]) -> bool:
    return all(name in function.__annotations__ for name in inspect.signature(function).parameters)
