"""The claims as pictures. Raises RequestError without matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    _plain_ticks(axes.xaxis, sorted({row["num_steps"] for row in result["cells"]}))
    axes.set_xlabel("steps")
    axes.set_ylabel("held-out problems solved")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    axes.set_title("lines: (accuracy of one step, fitted over all lengths) to the power of steps")
    figure.savefig(path, dpi=120)


def draw_int4(result: dict[str, Any], path: Path) -> None:
    """KL from the BF16 logits, and problems solved with 95 % intervals, of each variant."""
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    names = [row["variant"] for row in result["rows"]]
    kl = [row["kl"] for row in result["rows"][1:]]
    left.bar(names[1:], [k["mean"] for k in kl], yerr=[1.96 * k["error"] for k in kl], capsize=3)
    left.set_yscale("log")
    left.set_ylabel("KL from the BF16 copy, nats per token")
    solved = [Share(**row["solved"]) for row in result["rows"]]
    low = [share.rate - share.interval()[0] for share in solved]
    high = [share.interval()[1] - share.rate for share in solved]
    right.errorbar(names, [s.rate for s in solved], yerr=[low, high], fmt="o", capsize=3)
    right.margins(x=0.15)
    right.set_ylabel("held-out problems solved")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_routing(result: dict[str, Any], path: Path) -> None:
    """The largest load over the mean during training, and held-out loss at the end."""
    figure = new_figure()
    left, right = figure.subplots(1, 2)
    for row in result["rows"]:
        if "max_over_mean" in row:
            left.semilogy(row["step"], row["max_over_mean"], label=row["variant"], linewidth=1)
    _plain_ticks(left.yaxis, [1, 2, 3, 4, 6, 8])
    left.set_xlabel("step")
    left.set_ylabel("largest load of any layer / mean")
    left.legend(fontsize="small")
    names = [row["variant"] for row in result["rows"]]
    right.barh(names[::-1], [row["loss"] for row in result["rows"]][::-1])
    right.set_xlabel("held-out loss, nats per token")
    figure.savefig(path, dpi=120)


def _plain_ticks(axis: Any, values: Sequence[int]) -> None:
    """Of a logarithmic axis: numbers as one writes them."""
    axis.set_ticks(values, [str(value) for value in values])
    axis.set_ticks([], minor=True)


DRAW: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "interleaved": draw_interleaved,
    "int4": draw_int4,
    "routing": draw_routing,
}
