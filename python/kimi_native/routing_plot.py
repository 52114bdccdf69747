"""A measurement as a picture: the loads, layers by experts, and beside each layer what its experts tell of labels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from kimi_native.errors import RequestError
from kimi_native.routing_statistics import LayerStatistics

_SHOWN_TICKS = 16


def new_figure(width: float, height: float) -> Any:
    """An empty picture, inches. Raises RequestError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RequestError(
            f"routing: matplotlib must be installed for --png, pip install matplotlib (got {error})"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def heat_map(statistics: Sequence[LayerStatistics], title: str) -> bytes:
    """The bytes of a PNG file: one row per layer, one column per expert; experts without a token are gray.

    Raises RequestError without matplotlib.
    """
    shares = np.stack([s.shares for s in statistics])
    layers, experts = shares.shape
    width = min(18.0, 5.0 + max(2.5, 0.28 * experts))
    figure = new_figure(width, min(16.0, 2.2 + max(1.0, 0.24 * layers)))
    left, bar, right = figure.subplots(1, 3, width_ratios=[width - 2.8, 0.2, 1.8])
    _draw_shares(figure, left, bar, shares)
    right.sharey(left)
    left.set_title(title, loc="left", fontsize=10)
    rows = np.arange(layers)
    right.barh(rows, [s.information for s in statistics], height=0.7, color="#3b6fb6")
    right.axvline(0, color="0.4", linewidth=0.8)
    right.set_title("expert tells of label, bits", loc="left", fontsize=9)
    right.locator_params(axis="x", nbins=3)
    right.tick_params(left=False, labelleft=False)
    right.spines[["top", "right", "left"]].set_visible(False)
    step = -(-layers // _SHOWN_TICKS)
    left.set_yticks(rows[::step], [str(s.layer) for s in statistics[::step]])
    left.set_ylabel("layer")
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def _draw_shares(figure: Any, axes: Any, bar_axes: Any, shares: np.ndarray) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import FuncNorm

    colors = colormaps["viridis"].with_extremes(bad="0.82")
    top = max(2.0, float(shares.max()))
    image = axes.imshow(
        np.ma.masked_equal(shares, 0),
        aspect="auto",
        interpolation="nearest",
        cmap=colors,
        norm=FuncNorm((np.log1p, np.expm1), vmin=0, vmax=top),
    )
    step = -(-shares.shape[1] // _SHOWN_TICKS)
    axes.set_xticks(range(0, shares.shape[1], step))
    axes.set_xlabel("expert (gray: chosen by no token)")
    ticks = [t for t in (0, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256) if t <= top]
    bar = figure.colorbar(image, cax=bar_axes, ticks=ticks)
    bar.ax.set_yticklabels([f"{t:g}" for t in ticks])
    bar.set_label("load / mean load")
