"""TensorBoard finds the tab, and the tab shows in a real browser what event files hold."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.base_plugin import TBContext
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from newtonopt.curvature import add_to_tensorboard, measure
from newtonopt_tensorboard.plugin import NAME, CurvatureLoader, CurvatureTab

HOSTILE = "<img src=x onerror=\"document.title='bad'\"><script>document.title='bad'</script>"


def record(step: int, **changes: Any) -> bytes:
    """A record as the monitor writes it."""
    largest = 2.0 + 0.1 * step
    values = {
        "lambda_max": largest,
        "lambda_max_lower": 0.99 * largest,
        "lambda_max_upper": 1.01 * largest,
        "lambda_2": 0.9 * largest,
        "lambda_min": -0.1,
        "stability_threshold": 3.0,
        "stability_ratio": largest / 3.0,
        "sharpness": 0.01,
        "seconds": 0.5,
    }
    whole = {"version": 1, "values": values, "words": ["The largest eigenvalue is stable."], "certified": step % 2 == 0}
    return json.dumps({**whole, **changes}).encode()


def add(writer: SummaryWriter, step: int, raw: bytes, tag: str = "curvature/record", **tensor: Any) -> None:
    """Write a record, or something else in its place."""
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=NAME), data_class=DATA_CLASS_TENSOR)
    made = TensorProto(**{"dtype": "DT_STRING", "string_val": [raw], "tensor_shape": TensorShapeProto(), **tensor})
    assert writer.file_writer is not None
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, tensor=made, metadata=metadata)]), step)


def run(folder: Path, records: int = 3, **changes: Any) -> SummaryWriter:
    """Write a run, and return its writer, flushed."""
    writer = SummaryWriter(str(folder))
    for step in range(records):
        add(writer, step, record(step, **changes))
        writer.add_scalar("train_loss", 1.0 / (step + 1), step)
        writer.add_scalar("accuracy", 0.5, step)
    writer.flush()
    return writer


def plain_loop(folder: Path) -> None:
    """Measure and train in a plain loop, without Lightning."""
    w = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = w[0] ** 2 + 3 * w[1] ** 2
        loss.backward()
        return loss

    with SummaryWriter(str(folder)) as writer:
        for step in range(3):
            add_to_tensorboard(writer, measure(closure, [w], optimizer), step)
            optimizer.step(closure)


class Served:
    """The plugin's routes over a folder, as TensorBoard's own loader reads it."""

    def __init__(self, folder: Path) -> None:
        self.files = EventMultiplexer(tensor_size_guidance={NAME: 100})
        self.files.AddRunsFromDirectory(str(folder))
        self.files.Reload()
        self.tab = CurvatureTab(TBContext(data_provider=MultiplexerDataProvider(self.files, str(folder))))

    def get(self, path: str, **headers: str) -> Any:
        route, _, query = path.partition("?")
        return Client(self.tab.get_plugin_apps()[route]).get(f"/?{query}", headers=headers)


def test_the_loader_imports_neither_this_library_nor_torch() -> None:
    names = ("newtonopt", "torch", "lightning", "matplotlib", "scipy", "pandas")
    program = (
        f"import sys\nfor name in {names}:\n    sys.modules[name] = None\n"
        "from newtonopt_tensorboard.plugin import CurvatureLoader\nCurvatureLoader()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_loader_keeps_ten_thousand_records_unless_told_otherwise() -> None:
    flags = argparse.Namespace(samples_per_plugin={"images": 3})
    CurvatureLoader().fix_flags(flags)
    assert flags.samples_per_plugin == {"images": 3, NAME: 10_000}
    flags = argparse.Namespace(samples_per_plugin={NAME: 5})
    CurvatureLoader().fix_flags(flags)
    assert flags.samples_per_plugin == {NAME: 5}


def test_runs_and_data(tmp_path: Path) -> None:
    run(tmp_path / "a").close()
    writer = run(tmp_path / "b", records=0)
    writer.add_scalar("newton/damping", 0.1, 1)
    writer.add_scalar("val_loss", float("nan"), 1)
    writer.close()
    with SummaryWriter(str(tmp_path / "c")) as foreign:
        foreign.add_scalar("train_loss", 1.0, 1)
    served = Served(tmp_path)
    assert served.tab.is_active()
    assert served.get("/runs").json == {"runs": [{"run": "a", "prefixes": ["curvature"]}, {"run": "b", "prefixes": []}]}
    found = served.get("/data?run=a&run=b").json["runs"]
    monitor = found["a"]["monitors"]["curvature"]
    assert monitor["steps"] == [0, 1, 2]
    assert monitor["values"]["lambda_max"] == pytest.approx([2.0, 2.1, 2.2])
    assert monitor["certified"] == [True, False, True]
    assert found["a"]["scalars"].keys() == {"train_loss"}
    assert found["b"]["scalars"]["newton/damping"]["values"] == pytest.approx([0.1])
    assert found["b"]["scalars"]["val_loss"]["values"] == ["NaN"]
    assert served.get("/data?run=c&run=nowhere").json == {"runs": {}}


def test_a_plain_loop_has_the_tab(tmp_path: Path) -> None:
    plain_loop(tmp_path / "a")
    served = Served(tmp_path)
    assert served.tab.is_active()
    monitor = served.get("/data?run=a").json["runs"]["a"]["monitors"]["curvature"]
    assert (monitor["steps"], monitor["certified"], monitor["unread"]) == ([0, 1, 2], [True] * 3, 0)
    assert monitor["values"]["lambda_max"] == pytest.approx([6.0] * 3, rel=1e-3)
    assert monitor["state"] == "below"


def test_each_monitor_of_a_run_is_told_apart_by_its_prefix(tmp_path: Path) -> None:
    with run(tmp_path / "a", records=1) as writer:
        add(writer, 0, record(0), tag="generator/curvature/record")
    served = Served(tmp_path)
    assert served.get("/runs").json["runs"][0]["prefixes"] == ["curvature", "generator/curvature"]
    assert served.get("/data?run=a").json["runs"]["a"]["monitors"].keys() == {"curvature", "generator/curvature"}


def test_what_the_page_has_is_not_sent_again_until_it_grows(tmp_path: Path) -> None:
    writer = run(tmp_path / "a")
    served = Served(tmp_path)
    for path in ("/runs", "/data?run=a"):
        mark = served.get(path).headers["ETag"]
        unchanged = served.get(path, **{"If-None-Match": mark})
        assert (unchanged.status_code, unchanged.data) == (304, b"")
        # TensorBoard warns where these two are missing.
        assert unchanged.headers["X-Content-Type-Options"] == "nosniff"
        assert unchanged.content_type == "application/json"
    add(writer, 7, record(7))
    writer.close()
    served.files.Reload()
    answer = served.get("/data?run=a", **{"If-None-Match": mark})
    assert answer.status_code == 200
    assert answer.json["runs"]["a"]["monitors"]["curvature"]["steps"] == [0, 1, 2, 7]


def test_nothing_is_written(tmp_path: Path) -> None:
    run(tmp_path / "a").close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    served = Served(tmp_path)
    for path in ("/runs", "/data?run=a", "/index.js", "/style.css"):
        assert served.get(path).status_code == 200
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_files_of_the_page(tmp_path: Path) -> None:
    served = Served(tmp_path)
    assert served.get("/index.js").content_type == "text/javascript; charset=utf-8"
    assert served.get("/style.css").content_type == "text/css; charset=utf-8"
    assert served.tab.frontend_metadata().tab_name == "Curvature"


def test_an_empty_folder_has_no_runs_and_no_tab(tmp_path: Path) -> None:
    served = Served(tmp_path)
    assert not served.tab.is_active()
    assert served.get("/runs").json == {"runs": []}


def spoil(folder: Path) -> None:
    """Write records that are none, among good ones."""
    with run(folder) as writer:
        add(writer, 10, b"nonsense")
        add(writer, 11, record(11, version=99))
        add(writer, 12, b"x" * (2 << 20))
        add(writer, 13, b"", dtype="DT_FLOAT", string_val=[], float_val=[1.0, 2.0], tensor_shape=shape(2))
        add(writer, 14, b"", string_val=[b"a", b"b"], tensor_shape=shape(2))
    truncated = next(folder.iterdir())
    truncated.write_bytes(truncated.read_bytes()[:-3])


def shape(size: int) -> TensorShapeProto:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size)])


def test_malformed_records_are_left_out_with_a_reason(tmp_path: Path) -> None:
    spoil(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "events.out.tfevents.0.x").write_bytes(b"garbage" * 100)
    monitor = Served(tmp_path).get("/data?run=a&run=b").json["runs"]["a"]["monitors"]["curvature"]
    assert monitor["steps"] == [0, 1, 2]
    assert monitor["unread"] == 4  # the last of five was cut off with the end of the file
    assert monitor["why"]


def test_a_tensor_that_cannot_be_decoded_leaves_a_sentence(tmp_path: Path) -> None:
    run(tmp_path / "a").close()
    with SummaryWriter(str(tmp_path / "b")) as writer:
        add(writer, 0, b"", dtype="DT_INVALID")
    found = Served(tmp_path).get("/data?run=a&run=b").json["runs"]
    assert found["a"]["monitors"]["curvature"]["steps"] == [0, 1, 2]
    assert found["b"]["errors"] == ["The records curvature/record cannot be read: TypeError."]


def test_a_server_without_data_answers_with_a_sentence() -> None:
    tab = CurvatureTab(TBContext())
    assert not tab.is_active()
    for route in ("/runs", "/data"):
        answer = Client(tab.get_plugin_apps()[route]).get("/")
        assert answer.status_code == 200
        assert answer.json is not None
        assert answer.json["error"].startswith("TensorBoard could not read the data")


# In a browser.


def photography() -> ModuleType:
    """The program that takes the pictures in docs."""
    path = Path(__file__).parents[3] / "docs" / "photograph_tensorboard.py"
    spec = importlib.util.spec_from_file_location("photograph_tensorboard", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("selenium")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and its chromedriver are not installed")
    with photography().browser() as driver:
        yield driver


FRAME = """
const find = root => {
  for (const element of root.querySelectorAll('*')) {
    if (element.tagName === 'IFRAME') return element;
    const inside = element.shadowRoot && find(element.shadowRoot);
    if (inside) return inside;
  }
  return null;
};
return find(document);
"""
SHOWN = """
const texts = chosen => [...document.querySelectorAll(chosen)].map(element => element.textContent);
return {
  charts: Object.fromEntries(
    [...document.querySelectorAll('figure')].map(({dataset}) => [dataset.chart, JSON.parse(dataset.points)])
  ),
  runs: texts('.runs span'),
  cards: texts('.card'),
  notes: texts('.note'),
  empty: [...document.querySelectorAll('.empty')].filter(e => !e.hidden).map(e => e.textContent),
  drawn: document.documentElement.dataset.drawn !== undefined,
};
"""
# How many pixels of a chart have any colour: an axis alone has few.
PAINTED = """
const canvas = document.querySelector(`[data-chart="${arguments[0]}"] .plot canvas`);
const bytes = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
const colours = k => [bytes[k], bytes[k + 1], bytes[k + 2]];
const colourful = k => Math.max(...colours(k)) - Math.min(...colours(k)) > 60;
let count = 0;
for (let k = 0; k < bytes.length; k += 4) count += bytes[k + 3] > 0 && colourful(k);
return count;
"""

BADGES = "return [...document.querySelectorAll('.card .pill')].map(e => [e.className, e.textContent])"
ALARMS = "return [...document.querySelectorAll('.card .alarm')].map(e => e.textContent)"
HEADER = 'return document.querySelector(`[data-chart="${arguments[0]}"] .readout`).textContent'
SWATCHES = """
return Object.fromEntries([...document.querySelectorAll('.runs label')].map(
  label => [label.textContent, getComputedStyle(label).getPropertyValue('--swatch')]
));
"""
BOXES = """
return [...document.querySelectorAll('.card')].map(card => {
  const {top, left, right} = card.getBoundingClientRect();
  return [top, left, right];
});
"""
NUMBERS = """
const texts = div => [div.querySelector('dt'), div.querySelector('dd').firstChild, div.querySelector('small')];
return [...document.querySelectorAll('.numbers div')].map(div => texts(div).map(e => e ? e.textContent : '').join('|'));
"""
# How many pixels have any colour in the middle of a chart, from left to right.
IN_THE_MIDDLE = """
const canvas = document.querySelector(`[data-chart="${arguments[0]}"] .plot canvas`);
const bytes = canvas.getContext('2d').getImageData(canvas.width / 2, 0, 40, canvas.height).data;
let count = 0;
for (let k = 0; k < bytes.length; k += 4) {
  const colours = [bytes[k], bytes[k + 1], bytes[k + 2]];
  count += bytes[k + 3] > 0 && Math.max(...colours) - Math.min(...colours) > 60;
}
return count;
"""
# The text of the box beside the pointer in the middle of a chart.
POINTED = """
const plot = document.querySelector(`[data-chart="${arguments[0]}"] .plot`);
const {left, top, width, height} = plot.getBoundingClientRect();
const place = {clientX: left + width / 2, clientY: top + height / 2};
plot.dispatchEvent(new PointerEvent('pointermove', {...place, bubbles: true}));
return [...document.querySelectorAll('.tip tr')].map(row => [...row.children].map(cell => cell.textContent).join('|'));
"""
# From which to which share of a chart's height its coloured lines reach, in the left half.
REACHED = """
const canvas = document.querySelector(`[data-chart="${arguments[0]}"] .plot canvas`);
const [width, height] = [Math.round(canvas.width * 0.4), canvas.height];
const bytes = canvas.getContext('2d').getImageData(canvas.width * 0.1, 0, width, height).data;
const rows = [];
for (let k = 0; k < bytes.length; k += 4) {
  const colours = [bytes[k], bytes[k + 1], bytes[k + 2]];
  if (bytes[k + 3] > 0 && Math.max(...colours) - Math.min(...colours) > 60) rows.push(k / 4 / width / height);
}
return rows.length ? Math.max(...rows) - Math.min(...rows) : 0;
"""
# By how many pixels the coloured line rises in the last fifth of a chart.
RISE = """
const canvas = document.querySelector(`[data-chart="${arguments[0]}"] .plot canvas`);
const width = Math.round(canvas.width / 5);
const bytes = canvas.getContext('2d').getImageData(canvas.width - width, 0, width, canvas.height).data;
const rows = new Set();
for (let k = 0; k < bytes.length; k += 4) {
  const colours = [bytes[k], bytes[k + 1], bytes[k + 2]];
  if (bytes[k + 3] > 0 && Math.max(...colours) - Math.min(...colours) > 60) rows.add(Math.floor(k / 4 / width));
}
return Math.max(...rows) - Math.min(...rows);
"""


def numbers(driver: Any) -> list[str]:
    """The numbers on all cards: label, number and remark, with bars between them."""
    found: list[str] = driver.execute_script(NUMBERS)
    return found


def open_tab(driver: Any, folder: Path, ready: Callable[[Any], bool]) -> Any:
    """Open the tab in TensorBoard over a folder, and return what it shows as soon as that is as wanted."""
    # Imported here: both warn of what they bring along.
    from tensorboard import program
    from tensorboard.plugins.core.core_plugin import CorePluginLoader

    server = program.TensorBoard(plugins=[CorePluginLoader(), CurvatureLoader()])
    server.configure(
        argv=[None, "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0", "--reload_interval", "1"]
    )
    driver.get("about:blank")
    driver.get(f"{server.launch()}#{NAME}")
    return wait(driver, ready)


def wait(driver: Any, ready: Callable[[Any], bool], seconds: float = 90.0) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        driver.switch_to.default_content()
        frame = driver.execute_script(FRAME)
        shown = None
        if frame is not None:
            driver.switch_to.frame(frame)
            shown = driver.execute_script(SHOWN)
        if (shown is not None and ready(shown)) or time.monotonic() > deadline:
            return shown
        time.sleep(0.3)


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore")
class TestTab:
    """The tab in headless Chromium, in TensorBoard's own page."""

    def test_one_run(self, browser: Any, tmp_path: Path) -> None:
        layers = {"encoder": 2.0, "head": 1.0}
        density = {"edges": [-1.0, 0.0, 1.0], "heights": [0.3, 1.0]}
        run(tmp_path / "a", layers=layers, density=density).close()
        shown = open_tab(browser, tmp_path, lambda s: s["drawn"] and len(s["charts"]) == 8)
        assert shown["charts"] == {
            "eigenvalues": [3, 3, 3],
            "loss": [3],
            "ratio": [3],
            "smallest": [3],
            "sharpness": [3],
            "density a\x1fcurvature": [3],
            "layers a\x1fcurvature": [3],
            "seconds": [3],
        }
        assert shown["notes"] == []
        assert "The largest eigenvalue is stable." in shown["cards"][0]
        for chart in ("eigenvalues", "loss", "smallest", "density a\x1fcurvature", "layers a\x1fcurvature"):
            wait(browser, lambda _, chart=chart: browser.execute_script(PAINTED, chart) > 300)
            assert browser.execute_script(PAINTED, chart) > 300, chart

    def test_a_plain_loop(self, browser: Any, tmp_path: Path) -> None:
        plain_loop(tmp_path / "a")
        shown = open_tab(browser, tmp_path, lambda s: s["drawn"] and "eigenvalues" in s["charts"])
        assert set(shown["charts"]["eigenvalues"]) == {3}
        assert "In short: below the edge of stability" in shown["cards"][0]
        assert shown["notes"] == []

    def test_four_runs_share_charts_and_can_be_chosen(self, browser: Any, tmp_path: Path) -> None:
        for name in "abcd":
            run(tmp_path / name).close()
        shown = open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 4)
        assert shown["runs"] == list("abcd")
        assert shown["charts"]["sharpness"] == [3, 3, 3, 3]
        browser.find_element("css selector", ".runs input").click()
        assert len(wait(browser, lambda s: len(s["cards"]) == 3)["cards"]) == 3
        browser.switch_to.default_content()
        assert "runs=" in browser.current_url
        browser.refresh()
        again = wait(browser, lambda s: len(s["cards"]) == 3)
        assert again["charts"]["sharpness"] == [3, 3, 3]
        assert again["runs"] == list("abcd")

    def test_a_run_that_grows(self, browser: Any, tmp_path: Path) -> None:
        writer = run(tmp_path / "a", records=1)
        shown = open_tab(browser, tmp_path, lambda s: s["charts"].get("sharpness") == [1])
        assert shown["charts"]["sharpness"] == [1]
        for step in (1, 2):
            add(writer, step, record(step))
        writer.flush()
        grown = wait(browser, lambda s: s["charts"].get("sharpness") == [3])
        assert grown["charts"]["sharpness"] == [3]
        writer.close()

    def test_an_empty_folder(self, browser: Any, tmp_path: Path) -> None:
        shown = open_tab(browser, tmp_path, lambda s: bool(s["empty"]))
        assert "CurvatureMonitor" in shown["empty"][0]
        assert shown["charts"] == {}

    def test_hostile_names_stay_text(self, browser: Any, tmp_path: Path) -> None:
        values = {
            "lambda_max": 1.0,
            "stability_ratio": 0.5,
            HOSTILE: 2.0,
            "__proto__": 1.0,
            "constructor": 2.0,
            "": 3.0,
            "NaN": "NaN",
        }
        layers = {HOSTILE: 1.0, "__proto__": 2.0}
        with run(tmp_path / "<b>a", values=values, words=[HOSTILE], layers=layers) as writer:
            writer.add_scalar(f"loss{HOSTILE}", 1.0, 1)
            add(writer, 1, record(1), tag=f"{HOSTILE}/record")
        run(tmp_path / "b").close()
        shown = open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 3)
        assert shown["notes"] == []
        assert any(HOSTILE in card for card in shown["cards"])
        assert any(HOSTILE in name for name in shown["runs"])
        assert f"value {HOSTILE}" in shown["charts"]
        assert browser.execute_script("return document.querySelectorAll('.page :is(script, img, b)').length") == 0
        assert browser.execute_script("return document.title") == "Curvature"

    def test_malformed_records_leave_charts_and_a_sentence(self, browser: Any, tmp_path: Path) -> None:
        spoil(tmp_path / "a")
        shown = open_tab(browser, tmp_path, lambda s: bool(s["notes"]))
        assert shown["charts"]["sharpness"] == [3]
        assert "a: 4 records could not be read" in shown["notes"][0]

    def test_dark_mode_zoom_and_keys(self, browser: Any, tmp_path: Path) -> None:
        run(tmp_path / "a", records=20).close()
        open_tab(browser, tmp_path, lambda s: s["charts"].get("sharpness") == [20])
        for dark in (True, False):
            browser.execute_script(f"parent.document.body.classList.toggle('dark-mode', {str(dark).lower()})")
            time.sleep(0.5)
            classes = browser.execute_script("return document.documentElement.className")
            assert ("dark" in classes.split()) is dark
        chart = browser.find_element("css selector", "[data-chart=sharpness]")
        for key in ("\ue014", "\ue014", "+"):  # to the right twice, and nearer
            chart.send_keys(key)
        heard = browser.execute_script("return document.querySelector('.heard').textContent")
        assert heard.startswith("step 1: sharpness 0.01")
        assert "zoom=" in browser.execute_script("return parent.location.hash")
        chart.send_keys("0")
        assert "zoom=" not in browser.execute_script("return parent.location.hash")

    def test_a_run_that_failed_has_a_card_and_one_that_diverged_a_red_badge(self, browser: Any, tmp_path: Path) -> None:
        failed, diverged = "The loss is not finite at step 10.", "In short: diverged: the loss is 16 times its lowest."
        with SummaryWriter(str(tmp_path / "a")) as writer:
            add(writer, 10, record(10, values={}, words=[failed], certified=None, state="failed", remark=""))
        words = [diverged, "Go back to an earlier checkpoint.", "Measured with 7 products."]
        run(tmp_path / "b", words=words, state="diverged", remark="Measured on the training loss.").close()
        shown = open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 2)
        assert failed in shown["cards"][0]
        assert "step 10" in shown["cards"][0]
        assert browser.execute_script(ALARMS) == [failed, f"{diverged} Go back to an earlier checkpoint."]
        assert "Measured on the training loss." in shown["cards"][1]
        assert browser.execute_script(BADGES) == [["pill danger", "failed"], ["pill danger", "diverged"]]

    def test_a_failure_after_good_measurements_keeps_their_numbers_and_says_their_step(
        self, browser: Any, tmp_path: Path
    ) -> None:
        with run(tmp_path / "a") as writer:
            add(writer, 7, record(7, values={}, words=["Not finite."], state="failed"))
        shown = open_tab(browser, tmp_path, lambda s: s["charts"].get("sharpness") == [4])
        (sharpness,) = [text for text in numbers(browser) if text.startswith("sharpness")]
        assert sharpness == "sharpness|0.01|step 2"
        assert browser.execute_script(BADGES) == [["pill danger", "failed"]]
        wait(browser, lambda _: "step 2" in browser.execute_script(HEADER, "sharpness"))
        assert "step 2" in browser.execute_script(HEADER, "sharpness")
        assert shown["notes"] == []

    def test_eigenvalues_have_gaps_where_values_measured_now_and_then_are_joined(
        self, browser: Any, tmp_path: Path
    ) -> None:
        with SummaryWriter(str(tmp_path / "a")) as writer:
            for step in range(6):
                more = {"lambda_min": -1.0, "sharpness": 2.0} if step in (0, 1, 4, 5) else {}
                add(writer, step, record(step, values={"lambda_max": 2.0, **more}))
        open_tab(browser, tmp_path, lambda s: s["charts"].get("sharpness") == [6])
        wait(browser, lambda _: browser.execute_script(IN_THE_MIDDLE, "sharpness") > 0)
        assert browser.execute_script(IN_THE_MIDDLE, "sharpness") > 0
        assert browser.execute_script(IN_THE_MIDDLE, "smallest") == 0

    def test_runs_keep_their_colours_when_one_is_added(self, browser: Any, tmp_path: Path) -> None:
        for name in ("sgd", "lbfgs"):
            run(tmp_path / name).close()
        open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 2)
        before = browser.execute_script(SWATCHES)
        run(tmp_path / "adam").close()
        wait(browser, lambda s: len(s["cards"]) == 3)
        after = browser.execute_script(SWATCHES)
        assert len(set(after.values())) == 3
        assert before.items() < after.items()
        browser.refresh()
        wait(browser, lambda s: len(s["cards"]) == 3)
        assert browser.execute_script(SWATCHES) == after

    def test_cards_wrap_in_a_narrow_window(self, browser: Any, tmp_path: Path) -> None:
        for name in "abcd":
            run(tmp_path / name).close()
        size = browser.get_window_size()
        browser.set_window_size(800, 1000)
        try:
            open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 4)
            boxes = browser.execute_script(BOXES)
        finally:
            browser.set_window_size(size["width"], size["height"])
        assert len({top for top, _, _ in boxes}) >= 2
        assert all(left >= 0 and right <= 800 for _, left, right in boxes)

    def test_a_card_shows_the_eigenvalue_that_the_threshold_is_for_and_the_last_steps(
        self, browser: Any, tmp_path: Path
    ) -> None:
        values = {
            "lambda_max": 1.647,
            "preconditioned_lambda_max": 251.3,
            "preconditioned_lambda_max_lower": 251.31,
            "preconditioned_lambda_max_upper": 251.34,
            "stability_threshold": 12666.0,
            "stability_ratio": 251.3 / 12666.0,
        }
        with run(tmp_path / "a", values=values) as writer:
            for tag, value in {"newton/ratio": 0.5, "newton/accepted": 1.0, "newton/damping": 1e-3}.items():
                writer.add_scalar(tag, value, 2)
            margins = {"step_margin": 0.25, "overshot_steps": 0.05, "uphill_steps": 0.1, "highest_step_margin": 8.55}
            for name, value in margins.items():
                writer.add_scalar(f"curvature/{name}", value, 1)
        shown = open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 1)
        assert "preconditioned eigenvalue|251.3|251.31 … 251.34" in numbers(browser)
        sentence = "Last Newton step (step 2): accepted, actual over predicted decrease 0.5, damping 0.001."
        assert sentence in shown["cards"][0]
        assert "Step margin 0.25 at step 1" in shown["cards"][0]
        sentence = "5 % of the measured steps overshot, 10 % went uphill; the highest margin was 8.55."
        assert sentence in shown["cards"][0]

    def test_eigenvalues_that_span_decades_are_on_a_logarithmic_scale(self, browser: Any, tmp_path: Path) -> None:
        with SummaryWriter(str(tmp_path / "a")) as writer:
            for step, largest in enumerate((2.5e6, 2.0, 3.0, 4e3)):
                add(writer, step, record(step, values={"lambda_max": largest, "lambda_2": -1.0}))
        open_tab(browser, tmp_path, lambda s: "eigenvalues" in s["charts"])
        wait(browser, lambda _: browser.execute_script(PAINTED, "eigenvalues") > 300)
        # The line from 3 to 4000 at the right rises: on a linear scale both ends would lie on the axis.
        assert browser.execute_script(RISE, "eigenvalues") > 40

    @pytest.mark.parametrize("absurd", [4e3, 1e30])
    def test_one_absurd_run_does_not_flatten_the_others(self, browser: Any, tmp_path: Path, absurd: float) -> None:
        for name, size in (("a", 1.0), ("b", 3.0), ("c", 2.0), ("d", absurd)):
            with SummaryWriter(str(tmp_path / name)) as writer:
                for step in range(10):
                    smallest = -size if step > 5 or size < absurd else -1.0
                    add(writer, step, record(step, values={"lambda_min": smallest, "sharpness": 1.0 - smallest}))
        open_tab(browser, tmp_path, lambda s: s["charts"].get("smallest") == [10] * 4)
        for chart in ("smallest", "sharpness"):
            wait(browser, lambda _, chart=chart: browser.execute_script(REACHED, chart) > 0.07)
            assert browser.execute_script(REACHED, chart) > 0.07, chart

    def test_the_box_beside_the_pointer_has_the_next_eigenvalues_of_each_run(
        self, browser: Any, tmp_path: Path
    ) -> None:
        for name in "ab":
            run(tmp_path / name).close()
        open_tab(browser, tmp_path, lambda s: s["charts"].get("eigenvalues") == [3] * 6)
        wait(browser, lambda _: bool(browser.execute_script(POINTED, "eigenvalues")))
        assert browser.execute_script(POINTED, "eigenvalues") == [f"{name}|2.1|λ₂ 1.89, threshold 3" for name in "ab"]

    def test_numbers_have_one_form(self, browser: Any, tmp_path: Path) -> None:
        values = {"lambda_max": 38123.4, "stability_ratio": "NaN", "sharpness": 1.25e-7, "lambda_min": -6260.4}
        run(tmp_path / "a", values=values, words=["It is -38\u00a0100 within 1.2\u00d710⁻⁷."]).close()
        shown = open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 1)
        assert numbers(browser) == [
            "largest eigenvalue|38\u00a0120|",
            "ratio to threshold|NaN|",
            "smallest eigenvalue|\u22126260|",
            "sharpness|1.25\u00d710⁻⁷|",
        ]
        assert "It is \u221238\u00a0100 within 1.2\u00d710⁻⁷." in shown["cards"][0]
        assert browser.execute_script(BADGES) == []

    def test_each_monitor_has_the_step_margin_of_its_prefix(self, browser: Any, tmp_path: Path) -> None:
        with run(tmp_path / "a") as writer:
            add(writer, 0, record(0), tag="gen/curvature/record")
            for tag, value in {"curvature": 0.25, "gen/curvature": 0.5, "other": 0.75}.items():
                writer.add_scalar(f"{tag}/step_margin", value, 1)
        shown = open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 2)
        first, second = shown["cards"]
        assert "Step margin 0.25" in first and "Step margin 0.75" in first and "Step margin 0.5 " not in first
        assert "Step margin 0.5 at" in second and "0.25" not in second

    def test_a_loss_that_has_risen_is_not_called_stable(self, browser: Any, tmp_path: Path) -> None:
        run(tmp_path / "a", state="risen").close()
        open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 1)
        assert browser.execute_script(BADGES) == [["pill warn", "loss has risen"]]

    def test_a_run_that_was_unstable_says_so_beside_its_highest_ratio(self, browser: Any, tmp_path: Path) -> None:
        with run(tmp_path / "a", records=0) as writer:
            for step, ratio in enumerate((0.5, 8.5, 0.003)):
                add(writer, step, record(step, values={"lambda_max": 1.0, "stability_ratio": ratio}, state="unstable"))
        open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 1)
        assert browser.execute_script(BADGES) == [["pill warn", "was unstable"]]
        assert "highest ratio|8.5|step 1" in numbers(browser)

    def test_trouble_and_what_to_do_about_it_stay_in_sight_beside_many_runs(self, browser: Any, tmp_path: Path) -> None:
        words = [
            "In short: something is wrong.",
            "Start again.",
            "The largest eigenvalue is 3.",
            "Nothing is certified: no.",
        ]
        for name, state in {"a": "lost", "b": "spiked", "c": "stuck", "d": "beyond", "e": "below"}.items():
            with run(tmp_path / name, words=words, state=state) as writer:
                writer.add_scalar("train_loss", 0.5, 100)
        open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 5)
        assert browser.execute_script(BADGES) == [
            ["pill danger", "loss is back up"],
            ["pill warn", "loss has spiked"],
            ["pill warn", "loss has not fallen"],
            ["pill danger", "beyond the edge"],
            ["pill good", "stable"],
        ]
        texts = "return [...document.querySelectorAll('.card')].map((card) => card.innerText)"
        cards = browser.execute_script(texts)
        assert ["Start again." in card for card in cards] == [True, True, True, True, False]
        assert all("last measured at step 2 of 100" in card for card in cards)

    def test_the_eigenvalue_that_the_threshold_is_for_comes_first(self, browser: Any, tmp_path: Path) -> None:
        values = {"lambda_max": 500.0, "preconditioned_lambda_max": 30.0, "stability_threshold": 38.0}
        run(tmp_path / "adam", values={**values, "stability_ratio": 30.0 / 38.0}).close()
        open_tab(browser, tmp_path, lambda s: len(s["cards"]) == 1)
        charts = "return [...document.querySelectorAll('figure')].map((figure) => figure.dataset.chart)"
        assert browser.execute_script(charts)[:2] == ["preconditioned", "eigenvalues"]
