"""A picture of rows: percent of limit by token count, one curve per op and shape, one panel per op."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from kimi_native.bench.rows import timed_rows
from kimi_native.errors import RequestError

COLUMNS = 3


def plot(rows: list[dict[str, Any]], out: str, *, threads: int | None = None) -> None:
    """Draws rows to a file; its suffix chooses the format.

    rows     of one run or several; a repeated case is drawn by its last row. Peers' rows are dashed.
    threads  draws the rows of this thread count (default: the largest there is)

    Raises RuntimeError without matplotlib, RequestError if there is nothing to draw, ValueError on an unknown suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            f"bench plot: matplotlib must be installed, as by pip install 'kimi-native[bench]' ({error})"
        ) from None
    panels = curves(rows, threads)
    if not panels:
        raise RequestError(
            f"bench plot: rows must hold timed cases with a limit and tokens (threads={threads})"
        )
    lines = -(-len(panels) // COLUMNS)
    columns = min(COLUMNS, len(panels))
    figure = Figure(figsize=(6.2 * columns, 4.2 * lines), layout="constrained")
    for i, (op, series) in enumerate(panels.items()):
        _panel(figure.add_subplot(lines, columns, i + 1), op, series)
    machine = rows_title(rows, threads)
    figure.suptitle(machine, fontsize=11)
    figure.savefig(out, dpi=110)


def curves(
    rows: list[dict[str, Any]], threads: int | None
) -> dict[str, dict[str, dict[int, float]]]:
    """op -> curve's name -> tokens -> percent of limit."""
    timed = [r for r in timed_rows(rows) if r["tokens"] > 0]
    if threads is None:
        threads = max((r["threads"] for r in timed), default=0)
    panels: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for r in timed:
        if r["threads"] == threads:
            name = r["shape"] if r.get("peer") is None else f"{r['shape']}, {r['peer']}"
            panels[r["op"]][name][r["tokens"]] = r["percent_of_limit"]
    return {op: dict(series) for op, series in panels.items()}


def rows_title(rows: list[dict[str, Any]], threads: int | None) -> str:
    """What the rows share: kernel tier and threads."""
    timed = timed_rows(rows)
    isas = sorted({r["isa"] for r in timed if r.get("isa")})
    count = threads or max((r["threads"] for r in timed), default=0)
    return f"percent of the measured limit (threads: {count}, kernel tier: {', '.join(isas)})"


def _panel(axes: Any, op: str, series: dict[str, dict[int, float]]) -> None:
    counts = sorted({tokens for points in series.values() for tokens in points})
    colors: dict[str, Any] = {}
    for name, points in series.items():
        shape, _, peer = name.partition(", ")
        tokens = sorted(points)
        line = axes.plot(
            tokens,
            [points[t] for t in tokens],
            marker="o",
            linestyle="--" if peer else "-",
            label=name,
            color=None if peer else colors.get(shape),
            alpha=0.7 if peer else 1.0,
        )
        colors.setdefault(shape, line[0].get_color())
    axes.set_title(op)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(c) for c in counts])
    axes.minorticks_off()
    best = max(percent for points in series.values() for percent in points.values())
    axes.set_ylim(0, max(105, 1.05 * best))  # a unit outside the limit's may be faster
    axes.axhline(100, color="black", linewidth=0.8)
    axes.set_xlabel("tokens")
    axes.set_ylabel("% of limit")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
