"""What the kernels are told for the whole process: threads, and the tier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from kimi_native import ops


@contextlib.contextmanager
def machine_settings(threads: int | None, isa: str | None) -> Iterator[None]:
    """Sets what is process-wide; what fails or is interrupted inside leaves it as it was."""
    with contextlib.ExitStack() as undo:
        if threads is not None:
            undo.callback(ops.set_num_threads, ops.num_threads())
            undo.callback(torch.set_num_threads, torch.get_num_threads())
            ops.set_num_threads(threads)
            torch.set_num_threads(threads)
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
