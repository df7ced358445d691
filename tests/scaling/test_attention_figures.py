"""The picture of attention maps: its panels, its labels, and what it does with letters that a font or TeX reads otherwise."""

import numpy as np
import pytest

from llm_jax.generation.maps import Map
from scaling import drawing
from scaling.attention_figures import attention_plot


def uniform(name: str, layers: int, heads: int, queries: int, keys: int) -> Map:
    """Every query sees every key alike."""
    visible_TxS = np.ones((queries, keys), bool)
    weights = np.full((layers, heads, queries, keys), 1 / keys)
    return Map(name, weights, visible_TxS, ("$x_1",) * queries, ("Ж",) * keys)


def draw(*maps: Map):
    with drawing.style():
        return attention_plot(maps, "$x_1 Ж" * 10)


@pytest.mark.parametrize(
    ("maps", "panels", "labelled"),
    [
        ([uniform("self", 2, 4, 20, 20)], 8, True),
        ([uniform("self", 12, 16, 64, 64)], 192, False),
        ([uniform("encoder", 1, 4, 7, 7), uniform("decoder", 2, 4, 5, 5), uniform("cross", 2, 4, 5, 7)], 20, True),
        ([uniform("cross", 1, 1, 3, 60)], 1, True),
    ],
    ids=["small", "large", "encoder and decoder", "one"],
)
def test_a_panel_a_layer_and_head_inside_of_the_figure(maps, panels, labelled):
    """Panels are placed by hand: none may lie on another or beyond the edge, and tokens are written where there is room."""
    figure = draw(*maps).figure
    places = np.array([axes.get_position().bounds for axes in figure.axes])
    assert len(places) == panels + 1, "and the key of the colours"
    low, high = places[:, :2], places[:, :2] + places[:, 2:]
    assert low.min() > 0
    assert high.max() < 1
    apart = (low[:, None] >= high[None] - 1e-9).any(-1)
    assert (apart | apart.T | np.eye(len(places), dtype=bool)).all()
    words = {label.get_text() for axes in figure.axes for label in axes.get_yticklabels()}
    assert ("$x_1" in words) == labelled


def test_both_formats_are_written_and_repeat_to_the_byte():
    """A token may hold what mathtext reads as a formula, or refuses; a figure that differs each time cannot be compared."""
    one = uniform("self", 1, 2, 3, 3)
    assert drawing.png(draw(one)).startswith(b"\x89PNG")
    assert drawing.svg(draw(one)) == drawing.svg(draw(one))
