"""The figure of a history: its lines are the values, and where there are none a sentence says so."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from newtonopt.curvature import Measured, measure, plot_history
from newtonopt.curvature.dashboard import dashboard
from newtonopt.curvature.histories import Log

STEPS = (0, 10, 20, 30)
RATIOS = (0.5, 1.5, 1.25, 0.75)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    plt.close("all")
    yield
    plt.close("all")


def measured(scale: float) -> Measured:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    weights = scale * torch.tensor([1.0, 3.0], dtype=torch.float64)
    return measure(lambda: 0.5 * (weights * w**2).sum(), [w], torch.optim.SGD([w], lr=0.5), sharpness=None)


def log_of_all() -> Log:
    log = Log()
    for number, (step, ratio) in enumerate(zip(STEPS, RATIOS, strict=True)):
        largest = 4.0 * ratio
        values = {
            "lambda_max": largest,
            "lambda_max_lower": largest - 0.25,
            "lambda_max_upper": largest + 0.5,
            "lambda_2": 0.5 * largest,
            "certified": float(number % 2 == 0),
            "stability_threshold": 4.0,
            "stability_ratio": ratio,
            "lambda_min": -1.0 - number,
            "sharpness": 0.5 + number,
            "step_margin": 0.5 * number,
            "critical_sharpness": 2.0 + number,
            "trace": 10.0 + number,
            "trace_error": 1.0,
            "lambda_max_of/encoder": 10.0 ** (1 + number),
            "lambda_max_of/decoder": 1.0,
        }
        for name, value in values.items():
            log.add_value(step, name, value)
        log.add_density(step, [0.0, 1.0, 3.0], [math.log10(1.0 + 6.0), math.log10(1.0 + 4.0)])
    for step in range(0, 31, 5):
        log.add_training(step, "newton/damping", 1.0 + step)
        log.add_training(step, "newton/ratio", 0.5)
        log.add_training(step, "train_loss", 1.0 / (1.0 + step))
    log.add_words(["Costs $\\frac{$ of it.", "Measured with 5 products in 1 s."])
    return log


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def lines(axes: Axes) -> list[tuple[list[float], list[float]]]:
    return [(np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in axes.lines]


def drawn(figure: Figure) -> bytes:
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        return file.getvalue()


def test_all_panels_show_their_values() -> None:
    figure = dashboard(log_of_all().history())
    assert titles(figure) == [
        "Largest eigenvalues",
        "Largest eigenvalue over the threshold",
        "Smallest eigenvalue",
        "Sharpness",
        "Step margin: above 1 the step overshot",
        "Critical sharpness",
        "Trace",
        "Training loss",
        "Damping, radius or sigma",
        "Actual over predicted decrease",
        "All eigenvalues",
        "Largest eigenvalue of each part",
    ]
    steps, every_five = [*map(float, STEPS)], [*map(float, range(0, 31, 5))]
    for title, values in {
        "Largest eigenvalue over": [*RATIOS],
        "Smallest": [-1.0, -2.0, -3.0, -4.0],
        "Sharpness": [0.5, 1.5, 2.5, 3.5],
        "Step margin": [0.0, 0.5, 1.0, 1.5],
        "Critical": [2.0, 3.0, 4.0, 5.0],
        "Trace": [10.0, 11.0, 12.0, 13.0],
    }.items():
        assert (steps, values) in lines(panel(figure, title)), title
    assert (every_five, [1.0 / (1.0 + step) for step in every_five]) in lines(panel(figure, "Training loss"))
    assert (every_five, [1.0 + step for step in every_five]) in lines(panel(figure, "Damping"))
    assert (every_five, [0.5] * 7) in lines(panel(figure, "Actual"))
    drawn(figure)


def test_the_largest_eigenvalue_is_drawn_with_interval_markers_threshold_and_shading() -> None:
    axes = panel(dashboard(log_of_all().history()), "Largest eigenvalues")
    by_label: dict[str, Any] = {str(line.get_label()): line for line in axes.lines}
    assert by_label["certified"].get_xdata().tolist() == [0.0, 20.0]
    assert by_label["certified"].get_markerfacecolor() == by_label["certified"].get_color()
    assert by_label["tracked"].get_xdata().tolist() == [10.0, 30.0]
    assert by_label["tracked"].get_markerfacecolor() == "white"
    assert by_label["stability threshold"].get_ydata().tolist() == [4.0] * 4
    assert by_label["stability threshold"].is_dashed()
    assert by_label["2nd"].get_ydata().tolist() == [2.0 * ratio for ratio in RATIOS]
    corners = axes.collections[0].get_paths()[0].vertices
    assert (10.0, 6.5) in map(tuple, corners) and (10.0, 5.75) in map(tuple, corners)
    # The line of ratios crosses one halfway between 0 and 10, and halfway between 20 and 30.
    (shade,) = axes.patches
    assert shade.get_x() == pytest.approx(5.0) and shade.get_width() == pytest.approx(20.0)


def test_a_value_that_nobody_calls_certified_or_tracked_has_a_filled_marker() -> None:
    log = Log()
    log.add_value(0, "lambda_max", 1.0)
    axes = panel(dashboard(log.history()), "Largest eigenvalues")
    assert [str(line.get_label()) for line in axes.lines][1:] == ["certified"]


def test_heat_maps_show_counts_and_layers() -> None:
    figure = dashboard(log_of_all().history())
    mesh = panel(figure, "All eigenvalues").collections[0]
    counts = 10.0 ** np.asarray(mesh.get_array()) - 1.0
    assert counts.shape == (120, 4)
    assert counts.sum(0) == pytest.approx([10.0] * 4)
    assert counts[:40].sum(0) == pytest.approx([6.0] * 4)  # a third of the range, of which the first bar is
    axes = panel(figure, "Largest eigenvalue of each part")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["encoder", "decoder"]
    assert np.asarray(axes.collections[0].get_array()).tolist() == [[1.0, 2.0, 3.0, 4.0], [0.0] * 4]


def test_the_last_sentences_are_the_caption_and_are_no_formulas() -> None:
    figure = dashboard(log_of_all().history())
    assert figure.get_supxlabel() == "Step 30. Costs $\\frac{$ of it."
    drawn(figure)


def test_a_long_caption_keeps_the_verdict_and_what_to_do_and_marks_what_it_leaves_out() -> None:
    log = log_of_all()
    log.add_words(["In short: beyond the edge.", "Lower lr.", *(f"Sentence {number}." for number in range(100))])
    caption = " ".join(dashboard(log.history()).get_supxlabel().split())
    assert caption.startswith("Step 30. In short: beyond the edge. Lower lr. Sentence 0. ")
    assert caption.endswith(". ...") and len(caption) < 760


def test_a_preconditioned_panel_holds_the_runs_that_have_that_eigenvalue(tmp_path: Path) -> None:
    folder_of(tmp_path / "sgd", {"lambda_max": 1.0, "stability_threshold": 2.0})
    folder_of(tmp_path / "adam", {"lambda_max": 3.0, "preconditioned_lambda_max": 5.0, "stability_threshold": 4000.0})
    axes = panel(plot_history(str(tmp_path)), "Largest preconditioned")
    assert sorted(max(values) for _, values in lines(axes) if values) == [10.0, 10.0, 8000.0]
    assert axes.get_yscale() == "log"


def test_a_threshold_of_the_preconditioned_matrix_stands_with_that_matrix() -> None:
    log = Log()
    for step in STEPS:
        for name, value in (("lambda_max", 1.0), ("preconditioned_lambda_max", 50.0), ("stability_threshold", 40.0)):
            log.add_value(step, name, value)
    figure = dashboard(log.history())
    assert all(40.0 not in values for _, values in lines(panel(figure, "Largest eigenvalues")))
    assert any(40.0 in values for _, values in lines(panel(figure, "Largest preconditioned")))


def test_values_of_many_sizes_get_a_logarithmic_axis() -> None:
    log = Log()
    for step in range(4):
        log.add_value(step, "lambda_max", 10.0**step)
        log.add_value(step, "sharpness", 1.0 + step)
    figure = dashboard(log.history())
    assert panel(figure, "Largest").get_yscale() == "log" and panel(figure, "Sharpness").get_yscale() == "linear"


def test_values_that_explode_do_not_flatten_the_others_and_are_noted() -> None:
    log = Log()
    for step in range(10):
        exploded = step > 7
        log.add_value(step, "lambda_max", 1e30 if exploded else 2.0 + step)
        log.add_value(step, "stability_threshold", 40.0)
        log.add_value(step, "lambda_min", -1e30 if exploded else -2.0 - step)
        log.add_value(step, "sharpness", 1e-300 if exploded else 1.0)
    axes = {a.get_title(loc="left"): a for a in dashboard(log.history()).axes}
    largest, smallest, sharpness = (axes[t] for t in ("Largest eigenvalues", "Smallest eigenvalue", "Sharpness"))
    assert largest.get_yscale() == "log" and 40.0 < largest.get_ylim()[1] < 100.0
    assert smallest.get_yscale() == "symlog" and -20.0 < smallest.get_ylim()[0] < -9.0
    assert sharpness.get_yscale() == "log" and 0.1 < sharpness.get_ylim()[0] < 1.0
    notes = [[text.get_text() for text in a.texts] for a in (largest, smallest, sharpness)]
    assert notes == [["up to 10³⁰"], ["down to -10³⁰"], ["down to 10⁻³⁰⁰"]]


def test_a_further_eigenvalue_has_a_gap_where_it_was_not_known() -> None:
    log = Log()
    for step in range(5):
        log.add_value(step, "lambda_max", 2.0)
        if step != 2:
            log.add_value(step, "lambda_2", 1.0)
    (line,) = [line for line in dashboard(log.history()).axes[0].lines if line.get_label() == "2nd"]
    assert np.isnan(np.asarray(line.get_ydata(), float)).tolist() == [False, False, True, False, False]


def test_results_of_measure_by_step_by_pairs_and_in_a_list_are_one_picture() -> None:
    found = [measured(scale) for scale in (1.0, 2.0)]
    figures = [plot_history(source) for source in ({0: found[0], 1: found[1]}, [(0, found[0]), (1, found[1])], found)]
    for figure in figures:
        steps, values = lines(panel(figure, "Largest eigenvalues"))[0]
        assert steps == [0.0, 1.0] and values == pytest.approx([3.0, 6.0])
    assert figures[0].number in plt.get_fignums()
    assert figures[0].get_supxlabel().startswith("Step 1. In short: beyond the edge of stability (ratio 1.5); ")


def folder_of(path: Path, values: dict[str, float]) -> Path:
    with SummaryWriter(path) as writer:
        for name, value in values.items():
            writer.add_scalar(f"curvature/{name}", value, 5)
            writer.add_scalar(f"curvature/{name}", 2.0 * value, 7)
    return path


def test_runs_of_a_folder_are_compared_by_colour(tmp_path: Path) -> None:
    folder_of(tmp_path / "_sgd", {"lambda_max": 1.0, "stability_threshold": 2.0, "stability_ratio": 0.5})
    folder_of(tmp_path / "adam$^{$", {"lambda_max": 3.0})
    figure = plot_history(str(tmp_path))
    axes = panel(figure, "Largest eigenvalues")
    known = {tuple(values): to_hex(line.get_color()) for line, (_, values) in zip(axes.lines, lines(axes), strict=True)}
    assert known[1.0, 2.0] == known[2.0, 4.0] != known[3.0, 6.0]
    (legend,) = figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["_sgd", "adam$^{$"]
    assert not axes.patches
    drawn(figure)


def test_a_mapping_from_names_compares_results_and_folders(tmp_path: Path) -> None:
    source = {"ours": {0: measured(1.0)}, "logged": folder_of(tmp_path / "version_0", {"lambda_max": 1.0})}
    (legend,) = plot_history(source).legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "logged"]


def test_more_runs_than_colours_and_dashes_are_counted(tmp_path: Path) -> None:
    found = measured(1.0)
    (legend,) = plot_history({f"run {number}": [found] for number in range(30)}).legends
    assert legend.get_title().get_text() == "21 of 30 runs" and len(legend.get_texts()) == 21


@pytest.mark.parametrize("content", [None, b"", b"\0" * 100, b"foreign"])
def test_a_folder_without_measurements_gives_an_empty_figure_that_says_so(tmp_path: Path, content: Any) -> None:
    if content is not None:
        (tmp_path / "events.out.tfevents.1").write_bytes(content)
    figure = plot_history(tmp_path)
    (sentence,) = figure.texts
    count = "0 files" if content is None else "1 file"
    assert not figure.axes and sentence.get_text().startswith(f"Nothing to draw: {count} of events or tables in")
    drawn(figure)


def test_no_measurements_give_an_empty_figure_that_says_so() -> None:
    assert plot_history([]).texts[0].get_text() == "Nothing to draw: no measurements were given."
    assert dashboard(Log().history()).texts[0].get_text() == "Nothing has been measured yet."


@pytest.mark.parametrize(
    "values",
    [
        {"lambda_max": 9e99, "lambda_max_upper": -9e99, "stability_ratio": -9e99, "stability_threshold": 0.0},
        {"lambda_max": 0.0, "lambda_max_of/$_{$": -1.0, "lambda_max_of/\n\x00" + "x" * 500: 0.0, "lambda_min": 1e-45},
    ],
)
def test_values_that_no_measurement_has_can_be_drawn(values: dict[str, float]) -> None:
    log = Log()
    for step in (-(2**63), 5, 2**63 - 1):
        for name, value in values.items():
            log.add_value(step, name, value)
    drawn(dashboard(log.history("\x00$")))


@pytest.mark.parametrize("source", [5, [5], {0: 5}, [(1.5, None)], {0: None}])
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(TypeError, match=r"source must be a folder of event files, or .*, got .* Write plot_history"):
        plot_history(source)


def test_steps_may_be_numbers_of_numpy() -> None:
    w = torch.ones(2, requires_grad=True)
    found = measure(lambda: (w**4).sum(), [w], sharpness=None)
    figure = plot_history(dict.fromkeys(np.arange(3), found))
    assert [len(line.get_xdata()) for line in figure.axes[0].lines[:1]] == [3]
    plt.close(figure)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source must be an existing folder, got"):
        plot_history(tmp_path / "x")


def test_a_figure_for_a_log_is_not_kept_by_pyplot() -> None:
    dashboard(log_of_all().history())
    assert plt.get_fignums() == []
