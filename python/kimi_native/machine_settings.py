"""What the kernels are told for the whole process: threads, and the tier."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from kimi_native import ops


@contextlib.contextmanager
def machine_settings(threads: int | None, isa: str | None) -> Iterator[None]:
    """Sets what is process-wide; what fails or is interrupted inside leaves it as it was. None: as it is set.

    Of `threads` as many are started as this process may use cores: more would wait for each other.
    """
    with contextlib.ExitStack() as undo:
        if threads is not None:
            undo.callback(ops.set_num_threads, ops.num_threads())
            undo.callback(torch.set_num_threads, torch.get_num_threads())
            runnable = min(threads, len(os.sched_getaffinity(0)))
            ops.set_num_threads(runnable)
            torch.set_num_threads(runnable)
        if isa is not None:
            if isa and isa not in ops.supported_isas():
                supported = ", ".join(ops.supported_isas())
                raise RuntimeError(
                    f"load: isa={isa} is not available here (supported: {supported})"
                )
            undo.callback(ops.force_isa, ops.active_isa())
            ops.force_isa(isa)
        yield
        undo.pop_all()
