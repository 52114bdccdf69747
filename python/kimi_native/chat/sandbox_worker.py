"""The process in which a checkpoint's chat template runs: jinja2's sandbox inside limits of the operating system.

Started by sandbox.py with the limits as JSON argument. After a first line {}, one JSON object a line each way:
{"template", "variables": [...], "mark"} in; {"texts": [...]}, one for each set of variables, or {"error", "line"} out.
Imports nothing of this package and is told nothing but the conversation.
"""

from __future__ import annotations

import codecs
import functools
import json
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What code in a template can raise, memory and stack used up included.
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
MAX_MESSAGE = 300
WARM_UP = "{{ [1] | tojson }}{{ 'a\\n' | title | pprint }}{{ strftime_now('%c') }}{{ 1 / 0 }}"
OPEN_FILES = 3  # stdin, stdout, stderr: no other file or socket can be opened


class LimitError(ValueError):
    """The template asks for more than it may have."""


class Generation(Extension):
    """{% generation %} … {% endgeneration %}: marks the assistant's part for training; here, what is in it."""

    tags = frozenset({"generation"})

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Renderer:
    """Templates as the checkpoints' authors run them, with what they expect to find."""

    def __init__(self, limits: dict[str, int]) -> None:
        self._limits = limits
        self._steps = 0
        self._mark = ""
        self._now = datetime.now()
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", Generation],
        )
        self._environment.filters["tojson"] = self._to_json
        self._environment.globals |= {
            "range": self._range,
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: self._now.strftime(format),
        }
        for name in ("lipsum", "cycler", "joiner"):
            self._environment.globals.pop(name)
        self._compiled: Callable[[str], Template] = functools.lru_cache(maxsize=2)(
            self._environment.from_string
        )

    def render(self, request: dict[str, Any]) -> dict[str, Any]:
        self._mark, self._now = request["mark"], datetime.now()
        try:
            template = self._compiled(request["template"])
            texts = [self._text(template, variables) for variables in request["variables"]]
        except TEMPLATE_ERRORS as error:
            return {"error": _message(error), "line": _line(error)}
        return {"texts": texts}

    def _text(self, template: Template, variables: dict[str, Any]) -> str:
        self._steps = 0
        pieces, size = [], 0
        for piece in template.generate(variables):
            size += len(piece)
            if size > self._limits["output_chars"]:
                raise LimitError(
                    f"its output must have at most {self._limits['output_chars']} characters"
                )
            pieces.append(piece)
        return "".join(pieces)

    def _range(self, *args: int) -> Iterator[int] | range:
        steps = range(*args)
        self._steps += len(steps)
        if self._steps > self._limits["loop_steps"]:
            raise LimitError(f"its ranges must have at most {self._limits['loop_steps']} steps")
        return steps

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Without the escaping for HTML that jinja2's own does."""
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )
        return text.replace(json.dumps(self._mark)[1:-1], self._mark)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _message(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it must get by with less memory"
    text = str(error) or type(error).__name__
    return " ".join(text.split())[:MAX_MESSAGE]


def _line(error: Exception) -> int | None:
    """The template's line, which jinja2 puts into the traceback."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    lines = [
        number
        for frame, number in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == "<template>"
    ]
    return lines[-1] if lines else None


def _set_limits(limits: dict[str, int]) -> None:
    for what, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (value, value))


def main() -> None:
    limits = json.loads(sys.argv[1])
    renderer = Renderer(limits)
    # What is loaded at first use must be there before nothing more can be opened.
    for codec in ("ascii", "latin-1", "unicode_escape", "utf-8"):
        codecs.lookup(codec)
    renderer.render({"template": WARM_UP, "variables": [{}], "mark": "x"})
    _set_limits(limits)
    print("{}", flush=True)
    for line in sys.stdin:
        # The parent ends a render that takes too long; if the parent is gone, this does.
        signal.alarm(2 * limits["seconds"] + 1)
        print(json.dumps(renderer.render(json.loads(line))), flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
