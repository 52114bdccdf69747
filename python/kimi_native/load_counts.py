"""The counts among the arguments of generate.load: what each must be."""

from __future__ import annotations

from kimi_native.errors import RequestError

MAX_THREADS = 1024  # more is a slip of the pen


def check_counts(**given: object) -> None:
    """Raises RequestError unless each is an integer of at least 1; None where it is not max_batch."""
    for name, value in given.items():
        if value is None and name != "max_batch":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RequestError(f"load: {name} must be an integer of at least 1 (got {value!r})")
        if name == "threads" and value > MAX_THREADS:
            raise RequestError(f"load: threads must be at most {MAX_THREADS} (got {value})")
