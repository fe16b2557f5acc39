"""A real TensorBoard in a real browser shows the charts with their data."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lightning_problems import Classifier, both_loggers, loader, quiet_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from newtonopt.callbacks import Budget, CurvatureMonitor, StepMonitor
from newtonopt.curvature import Density, Layers, Trace

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


def shown(driver: Any, program: ModuleType, address: str, wanted: set[str], seconds: float = 120.0) -> dict[str, Any]:
    """The cards by title, once all that are wanted have data."""
    program.open_page(driver, address, "custom_scalars", seconds=5.0)
    deadline = time.monotonic() + seconds
    while True:
        cards = {title: (points, wrong) for title, points, wrong in driver.execute_script(CARDS)}
        if all(cards.get(title, ([],))[0] for title in wanted) or time.monotonic() > deadline:
            return cards
        time.sleep(1.0)


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
    logged = {tag.removeprefix("curvature/"): value for tag, value in trainer.callback_metrics.items()}
    values = found[3]["values"]
    assert all(logged[name].item() == pytest.approx(value, rel=1e-6) for name, value in values.items())
    assert {"lambda_max", "lambda_max_lower", "lambda_max_upper", "certified", "products"} <= values.keys()
    assert [record["certified"] for record in found.values()] == [True, False, True]
    assert all(record["certified"] == (record["values"]["certified"] == 1.0) for record in found.values())
    assert any("largest eigenvalue" in word for word in found[3]["words"])
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
    assert records(folder)[3].keys() == {"version", "values", "words", "certified"}


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore")
def test_the_page_shows_every_chart_with_its_data(tmp_path: Path) -> None:
    pytest.importorskip("selenium")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and its chromedriver are not installed")
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
        "Largest eigenvalue and its interval": [4],
        "Smallest eigenvalue and its interval": [4],
        "Eigenvalues": [4, 4, 4],
        "Sharpness": [4],
        "Trace": [4],
        "Damping": [3],
        "Actual over predicted decrease": [3],
        "Conjugate gradient iterations": [3],
    }
    program = photography()
    with program.browser() as driver:
        cards = shown(driver, program, program.board(str(tmp_path / "tb")), set(lines))
    for title, points in lines.items():
        assert cards[title] == (points, False), title
