"""Where measurements are drawn: in axes that are given, or in a figure that pyplot knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from newtonopt import LinearOperator
from newtonopt.curvature import extreme_eigenvalues, loss_slice, spectral_density
from newtonopt.curvature.drawing import drawing


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    plt.close("all")
    yield
    plt.close("all")


def density() -> Any:
    return spectral_density(LinearOperator(lambda v: 2.0 * v, (3, 3), torch.zeros(3)))


def line(directions: int = 1) -> Any:
    theta = torch.ones(2, requires_grad=True)
    return loss_slice(lambda: theta.square().sum(), [theta], list(torch.eye(2)[:directions]), points=3)


def square() -> Any:
    return line(2)


def spectrum() -> Any:
    weights = torch.tensor([1.0, 2.0, 5.0, -1.0])
    return extreme_eigenvalues(LinearOperator(lambda v: weights * v, (4, 4), weights), top=2, bottom=1)


def test_eigenvalues_stand_in_ascending_order_with_their_intervals() -> None:
    found = spectrum()
    found.plot()
    axes = plt.gca()
    points = [(entry.get_xdata()[0], entry.get_ydata()[0]) for entry in axes.lines if entry.get_marker() == "o"]
    entries = [found.bottom[0], found.top[1], found.top[0]]
    assert points == [(place, entry.value) for place, entry in zip((0, 2, 3), entries, strict=True)]
    bars = [tuple(bar.get_ydata()) for bar in axes.lines if bar.get_linewidth() == 6]
    assert bars == [(entry.lower, entry.upper) for entry in entries]


@pytest.mark.parametrize("measured", [density, line, square, spectrum])
def test_a_figure_is_known_to_pyplot(measured: Callable[[], Any]) -> None:
    figure = measured().plot()
    assert plt.get_fignums() == [figure.number]
    assert plt.gcf() is figure


@pytest.mark.parametrize("measured", [density, line, spectrum])
def test_it_draws_into_axes_that_are_given(measured: Callable[[], Any]) -> None:
    figure, (left, right) = plt.subplots(1, 2)
    assert measured().plot(ax=right) is figure
    assert right.lines and not left.lines
    assert plt.get_fignums() == [figure.number]


def test_a_square_takes_two_axes() -> None:
    figure, panels = plt.subplots(2, 2)
    assert square().plot(ax=panels[1]) is figure
    assert [axes.get_title() for axes in panels.flat] == ["", "", "loss", "quadratic model"]


@pytest.mark.parametrize(
    ("measured", "ax", "words"),
    [
        (density, lambda: plt.subplots(), r"ax must be matplotlib axes, got .* Write plt.subplots\(\)\[1\]"),
        (density, lambda: plt.figure(), "ax must be matplotlib axes, got <Figure"),
        (line, lambda: plt, "ax must be matplotlib axes, got a module"),
        (square, lambda: plt.subplots()[1], r"ax must be two matplotlib axes, .* Write plt.subplots\(1, 2\)\[1\]"),
    ],
)
def test_what_is_no_axes_is_refused(measured: Callable[[], Any], ax: Callable[[], Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        measured().plot(ax=ax())


@pytest.mark.parametrize("count", [1, 2])
def test_a_drawing_for_a_log_is_not_kept_by_pyplot(count: int) -> None:
    figure, panels = drawing(count)
    (line if count == 1 else square)().plot(ax=panels)
    assert isinstance(figure, Figure) and len(panels) == count
    assert plt.get_fignums() == []
