"""Blocking work for asyncio: every step in a thread, and no step left running when the task is canceled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import TypeVar

Value = TypeVar("Value")


async def in_thread(work: Callable[[], Value], cancel: Callable[[], None]) -> Value:
    """work() in a thread. A canceled task calls `cancel`, waits until work has returned, and only then ends."""
    step = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(step)
    except asyncio.CancelledError:
        cancel()
        while not step.done():  # canceled again: still wait, what work uses is not free yet
            with suppress(asyncio.CancelledError):
                await asyncio.wait([step])
        if not step.cancelled():
            step.exception()  # looked at, or asyncio would report it as lost
        raise


async def iterate(
    start: Callable[[], Iterator[Value]], cancel: Callable[[], None]
) -> AsyncIterator[Value]:
    """The values of the generator that `start` makes, every step in a thread; closes it, also when closed early.

    cancel  makes a step that is being computed return soon; called from another thread
    """
    values = await in_thread(start, cancel)
    end = object()
    try:
        while (value := await in_thread(lambda: next(values, end), cancel)) is not end:
            yield value
    finally:
        values.close()
