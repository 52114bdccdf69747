"""The claims as pictures. Raises RequestError without matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kimi_native.nano.evaluate import Share
from kimi_native.nano.plot import new_figure

_COLORS = {0.0: "#1b7837", 0.05: "#4393c3", 0.1: "#e08214", 0.2: "#b2182b"}
_LINES = {"interleaved": "-", "plan-first": "--", "no-tools": ":"}


def draw_interleaved(result: dict[str, Any], path: Path) -> None:
    """Success against the number of steps: points with 95 % intervals, and what the fitted step makes of n steps."""
    figure = new_figure()
    axes = figure.subplots()
    fits = {(f["mode"], f["failure_rate"]): Share(**f["step"]).rate for f in result["fits"]}
    for (mode, rate), step in fits.items():
        cells = [r for r in result["cells"] if (r["mode"], r["failure_rate"]) == (mode, rate)]
        at = [row["num_steps"] for row in cells]
        solved = [Share(**row["solved"]) for row in cells]
        color = _COLORS.get(rate, "black")
        lengths = [1 + (max(at) - 1) * i / 100 for i in range(101)]
        axes.plot(lengths, [step**n for n in lengths], _LINES[mode], color=color, linewidth=1)
        low = [share.rate - share.interval()[0] for share in solved]
        high = [share.interval()[1] - share.rate for share in solved]
        marker = {"interleaved": "o", "plan-first": "s", "no-tools": "^"}[mode]
        axes.errorbar(
            at,
            [share.rate for share in solved],
            yerr=[low, high],
            fmt=marker,
            color=color,
            markersize=4,
            capsize=2,
            label=f"{mode}, {100 * rate:g} % fail",
        )
    axes.set_xscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel("held-out problems solved")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    axes.set_title("lines: (accuracy of one step, fitted over all lengths) to the power of steps")
    figure.savefig(path, dpi=120)


DRAW: dict[str, Callable[[dict[str, Any], Path], None]] = {"interleaved": draw_interleaved}
