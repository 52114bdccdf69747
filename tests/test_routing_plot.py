"""The picture of a measurement, read back as pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from kimi_native.routing_plot import heat_map
from kimi_native.routing_statistics import layer_statistics

GRAY = 0.82  # of experts without a token
BLUE = (0x3B, 0x6F, 0xB6)  # of the bars


def pixels(*layers, num_experts=4, labels=None):
    statistics = [
        layer_statistics(
            i + 1,
            np.array(experts),
            np.ones((len(experts), len(experts[0]))),
            np.zeros(len(experts), int) if labels is None else np.array(labels),
            num_experts=num_experts,
            num_labels=2,
            shuffles=1,
        )
        for i, experts in enumerate(layers)
    ]
    return imread(io.BytesIO(heat_map(statistics, "title")))[..., :3]


def share(image, color):
    return (np.abs(image - np.array(color)).max(axis=-1) < 1.5 / 255).mean()


def test_plot_shows_experts_without_a_token_in_gray():
    assert share(pixels([[0, 1], [2, 3]]), [GRAY] * 3) < 0.001
    half = share(pixels([[0, 1], [0, 1]]), [GRAY] * 3)
    assert half > 0.1
    assert share(pixels([[0, 1], [0, 1]], [[0, 1], [2, 3]]), [GRAY] * 3) == pytest.approx(
        half / 2, rel=0.2
    )


def test_plot_colors_are_the_loads():
    """One expert with four times the mean is the brightest, the mean is log(2) / log(5) of the way."""
    image = pixels([[0]] * 4, [[0], [1], [2], [3]])
    colors = colormaps["viridis"]
    assert share(image, colors(1.0)[:3]) > 0.02
    assert share(image, colors(np.log(2) / np.log(5))[:3]) > 0.1


def test_plot_bars_are_there_where_experts_tell_something():
    told = pixels([[0], [1]] * 20, labels=[0, 1] * 20)
    assert share(told, np.array(BLUE) / 255) > 0.05
    assert share(pixels([[0], [1]] * 20), np.array(BLUE) / 255) < 0.01


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (60, 384)])
def test_plot_of_every_size_can_be_drawn(layers, experts):
    image = pixels(*[[[experts - 1]]] * layers, num_experts=experts)
    assert min(image.shape[:2]) > 300
    assert max(image.shape[:2]) <= 2700
