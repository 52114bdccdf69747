"""The log of a training run as a picture: loss, and how evenly the experts are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kimi_native.errors import RequestError
from kimi_native.nano.train_log import read_log
from kimi_native.whole_file import check_writable


def new_figure() -> Any:
    """An empty picture. Raises RequestError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RequestError(
            f"plot: matplotlib must be installed, pip install matplotlib (got {error})"
        ) from error
    return Figure(figsize=(9, 6), layout="constrained")


def check_picture(picture: Path) -> None:
    """Raises RequestError without matplotlib, on a name whose end it does not know, or where nothing can be written."""
    known = new_figure().canvas.get_supported_filetypes()
    if (end := picture.suffix[1:].lower()) not in known:
        raise RequestError(
            f"plot: {picture} must end in one of {', '.join(sorted(known))} (got {end!r})"
        )
    check_writable(picture)


def plot_log(log: Path, picture: Path) -> None:
    """Draw a log to a file whose name ends as matplotlib knows pictures.

    Raises RequestError without matplotlib, on an empty log or a name it does not know.
    """
    figure, steps = new_figure(), read_log(log)
    if not steps:
        raise RequestError(f"plot: {log} must have steps (got none)")
    upper, lower = figure.subplots(2, 1, sharex=True)
    at = [s["step"] for s in steps]
    upper.semilogy(at, [s["loss"] for s in steps], label="loss, nats per token")
    looked = [s for s in steps if s["held_out_loss"] is not None]
    if looked:
        upper.semilogy(
            [s["step"] for s in looked], [s["held_out_loss"] for s in looked], "o", label="held out"
        )
    upper.legend()
    for layer in range(len(steps[0]["loads"])):
        loads = [s["loads"][layer] for s in steps]
        ratio = [max(load) * len(load) / max(sum(load), 1) for load in loads]
        lower.plot(at, ratio, label=f"layer with experts {layer + 1}")
    lower.set_ylabel("largest load / mean")
    lower.set_xlabel("step")
    figure.legend(handles=lower.get_lines(), loc="outside lower center", fontsize="small", ncols=4)
    try:
        figure.savefig(picture)
    except (OSError, ValueError) as error:
        raise RequestError(f"plot: {picture} cannot be written (got {error})") from error
