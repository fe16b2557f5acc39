"""A real TensorBoard in a real browser shows the charts with their data."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_problems import Classifier, both_loggers, loader, quiet_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from newtonopt.callbacks import Budget, CurvatureMonitor, StepMonitor
from newtonopt.callbacks.tensorboard import _state
from newtonopt.curvature import Density, Layers, Preconditioned, Trace, measure
from newtonopt.curvature.measurements.course import Course
from newtonopt.curvature.measurements.measurement import Losses

# For each card of the custom-scalars page its title, how many points each of its lines has, and what is wrong with it.
CARDS = """
const visit = (root, found) => {
  for (const element of root.querySelectorAll('*')) {
    if (/^tf-custom-scalar-(margin|multi-line)-chart-card$/.test(element.tagName.toLowerCase())) found.push(element);
    if (element.shadowRoot) visit(element.shadowRoot, found);
  }
  return found;
};
return visit(document, []).map(card => [
  card._titleDisplayString,
  Object.values(card._nameToDataSeries || {}).map(line => line.getData().length),
  Boolean(card._stepsMismatch) || (card._missingTags || []).length > 0,
]);
"""


def photography() -> ModuleType:
    """The program that takes the pictures in docs."""
    path = Path(__file__).parents[2] / "docs" / "photograph_tensorboard.py"
    spec = importlib.util.spec_from_file_location("photograph_tensorboard", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(
    driver: Any, program: ModuleType, address: str, wanted: Iterable[str], seconds: float = 120.0
) -> list[tuple[str, list[int], bool]]:
    """The cards in their order, once all that are wanted have data."""
    program.open_page(driver, address, "custom_scalars", seconds=5.0)
    deadline = time.monotonic() + seconds
    while True:
        cards = [(title, points, wrong) for title, points, wrong in driver.execute_script(CARDS)]
        if set(wanted) <= {title for title, points, _ in cards if points} or time.monotonic() > deadline:
            return cards
        time.sleep(1.0)


def need_a_browser() -> None:
    pytest.importorskip("selenium")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and its chromedriver are not installed")


def records(folder: Path) -> dict[int, Any]:
    """The records for the Curvature tab in a run's event files, by step."""
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    assert accumulator.SummaryMetadata("curvature/record").plugin_data.plugin_name == "newtonopt_curvature"
    return {
        event.step: json.loads(event.tensor_proto.string_val[0]) for event in accumulator.Tensors("curvature/record")
    }


def test_each_measurement_is_one_record_with_the_values_that_were_logged(tmp_path: Path) -> None:
    monitor = CurvatureMonitor(
        every_n_train_steps=1, measurements=[Density(), Layers()], budget=Budget(certify_every=2)
    )
    trainer = quiet_trainer(max_epochs=1, callbacks=[monitor], logger=both_loggers(tmp_path))
    trainer.fit(Classifier("Adam"), loader())
    (folder,) = {path.parent for path in (tmp_path / "tb").rglob("*tfevents*")}
    found = records(folder)
    assert list(found) == [1, 2, 3]
    logged = {tag.partition("/")[2]: value for tag, value in trainer.callback_metrics.items()}
    values = found[3]["values"]
    assert all(logged[name].item() == pytest.approx(value, rel=1e-6) for name, value in values.items())
    assert {"lambda_max", "lambda_max_lower", "lambda_max_upper", "certified", "products"} <= values.keys()
    assert [record["certified"] for record in found.values()] == [True, False, True]
    assert all(record["certified"] == (record["values"]["certified"] == 1.0) for record in found.values())
    assert any("largest eigenvalue" in word for word in found[3]["words"])
    assert [record["state"] for record in found.values()] == ["below"] * 3
    assert found[3]["remark"] == "Measured on the loss of `training_step` in train mode, in float32."
    edges, heights = found[3]["density"]["edges"], found[3]["density"]["heights"]
    assert len(edges) == len(heights) + 1
    assert edges == sorted(edges)
    assert found[3]["layers"] == {
        name.removeprefix("lambda_max_of/"): value
        for name, value in values.items()
        if name.startswith("lambda_max_of/")
    }
    assert found[3]["layers"]


def test_without_density_and_layers_the_record_has_none(tmp_path: Path) -> None:
    monitor = CurvatureMonitor(every_n_train_steps=3, text=False)
    quiet_trainer(max_epochs=1, callbacks=[monitor], logger=both_loggers(tmp_path)).fit(Classifier("Adam"), loader())
    (folder,) = {path.parent for path in (tmp_path / "tb").rglob("*tfevents*")}
    assert records(folder)[3].keys() == {"version", "values", "words", "certified", "state", "remark"}


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore")
def test_the_page_shows_every_chart_with_its_data(tmp_path: Path) -> None:
    need_a_browser()
    monitor = CurvatureMonitor(
        every_n_train_steps=1,
        at_start=True,
        bottom=2,
        measurements=[Density(), Trace()],
        budget=Budget(max_products=40),
    )
    trainer = quiet_trainer(max_epochs=1, callbacks=[monitor, StepMonitor()], logger=both_loggers(tmp_path))
    trainer.fit(Classifier("HessianFree"), loader())
    lines = {
        "Largest eigenvalues": [4, 4, 4],
        "Largest eigenvalue and its interval": [4],
        "Smallest eigenvalue and its interval": [4],
        "Sharpness": [1],  # at the start, where eigenvalues are certified
        "Trace": [4],
        "Damping, radius or sigma": [3],
        "Actual over predicted decrease": [3, 3],
        "Iterations of the inner solver": [3],
    }
    program = photography()
    with program.browser() as driver:
        cards = shown(driver, program, program.board(str(tmp_path / "tb")), lines)
    assert {title: points for title, points, _ in cards if title in lines} == lines
    assert all(points and not wrong for _, points, wrong in cards)


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore")
def test_four_different_runs_share_their_charts_and_none_is_empty(tmp_path: Path) -> None:
    need_a_browser()
    further = [Trace(), Density(), Layers()]
    runs = {
        "adam": [CurvatureMonitor(every_n_train_steps=1, measurements=[Preconditioned()])],
        "hessian_free": [StepMonitor(), CurvatureMonitor(every_n_train_steps=2, bottom=2)],
        "sgd": [CurvatureMonitor(every_n_train_steps=1, at_start=True)],
        "sgd_more": [CurvatureMonitor(every_n_train_steps=1, top=1, sharpness=None, measurements=further)],
    }
    optimizers = {"adam": "Adam", "hessian_free": "HessianFree", "sgd": "SGD", "sgd_more": "SGD"}
    for name, callbacks in runs.items():
        logger = TensorBoardLogger(tmp_path, name=name, version="")
        quiet_trainer(max_epochs=1, callbacks=callbacks, logger=logger).fit(Classifier(optimizers[name]), loader())
    first = ["Largest eigenvalues", "Stability ratio: above 1 steps overshoot", "Sharpness"]
    first += ["Smallest eigenvalue and its interval"]  # TensorBoard puts a category's margin charts last
    last = ["Damping, radius or sigma", "Actual over predicted decrease", "Iterations of the inner solver"]
    program = photography()
    with program.browser(height=3000) as driver:
        cards = shown(driver, program, program.board(str(tmp_path)), [*first, "Trace", *last])
    titles = [title for title, _, _ in cards]
    assert [title for title in titles if title in first] == first and titles[-3:] == last
    assert len(titles) == len(set(titles))
    assert all(points and not wrong for _, points, wrong in cards)
    lines = {title: len(points) for title, points, _ in cards}
    assert [lines[title] for title in first] == [10, 3, 3, 4]


@pytest.mark.parametrize(("loss", "state"), [(1.0, "below"), (2.0, "risen"), (math.inf, "diverged")])
def test_a_state_below_the_edge_gives_way_to_a_risen_loss(loss: float, state: str) -> None:
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = measure(lambda: w.square().sum(), [w], torch.optim.SGD([w], lr=0.1), sharpness=None)
    assert _state(replace(found, losses=Losses(1.0, 1.0, loss))) == state


@pytest.mark.parametrize(
    ("losses", "lr", "state"),
    [
        ([2.3] * 5 + [1.0] * 20 + [2.3] * 50, 0.1, "lost"),
        ([2.3] * 5 + [1.0] * 20 + [2.3] * 50, 3.0, "lost"),
        ([2.3] * 5 + [40.0] * 5 + [1.0] * 20, 0.1, "spiked"),
        ([2.3] * 5 + [40.0] * 5 + [1.0] * 20, 3.0, "beyond"),
        ([2.3] * 60, 0.1, "stuck"),
        ([2.3] * 60, 1.0, "edge"),
    ],
)
def test_a_state_below_the_edge_gives_way_to_trouble_with_the_loss(losses: list[float], lr: float, state: str) -> None:
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = measure(lambda: w.square().sum(), [w], torch.optim.SGD([w], lr=lr), sharpness=None)
    assert _state(replace(found, course=Course().then(losses))) == state
