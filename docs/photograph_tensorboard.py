"""Take the pictures of TensorBoard: `python docs/photograph_tensorboard.py LOGDIR [NAME ...]`.

NAME is a picture. "tensorboard_custom_scalars", "tensorboard_images", "tensorboard_histograms" and "tensorboard_text"
are the monitor page's and need the logs of `configs/everything_measured.yaml`. "curvature_tab" is that of
docs/tab.md, and "curvature_tab_top" (default) the README's; both need a folder with the logs of
`configs/sgd_edge_of_stability.yaml`, with Density and Layers measured too, and of `configs/adam_with_curvature.yaml`.
LOGDIR is shown in the pictures. The program needs chromium, its chromedriver and `pip install selenium`.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from tensorboard import program

# The page of each picture, and its height.
PAGES = {
    "tensorboard_custom_scalars": ("custom_scalars", 1600),
    "tensorboard_images": ("images", 690),
    "tensorboard_histograms": ("histograms", 560),
    "tensorboard_text": ("text", 720),
    "curvature_tab": ("newtonopt_curvature", 2226),
    "curvature_tab_top": ("newtonopt_curvature", 1345),
}
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def board(logdir: str) -> str:
    """Start TensorBoard on loopback and return its address. It ends with this process."""
    server = program.TensorBoard()
    server.configure(argv=[None, "--logdir", logdir, "--host", "127.0.0.1", "--port", "0"])
    return server.launch()


@contextmanager
def browser(width: int = 1500, height: int = 1290) -> Iterator[webdriver.Chrome]:
    """A headless Chromium."""
    options = Options()
    for flag in (*_FLAGS, f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def open_page(driver: webdriver.Chrome, address: str, page: str, seconds: float = 10.0) -> None:
    """Load one of TensorBoard's pages unsmoothed, and expand every category: only the first is open at the start."""
    driver.get(f"{address}#{page}&_smoothingWeight=0")
    time.sleep(seconds)  # the page loads its data after it has loaded itself
    driver.execute_script(_OPEN_ALL)
    time.sleep(0.6 * seconds)


def main(logdir: str, names: list[str]) -> None:
    """Save a picture of each page."""
    address = board(logdir)
    for name in names:
        page, height = PAGES[name]
        with browser(height=height) as driver:
            open_page(driver, address, page)
            driver.save_screenshot(str(Path(__file__).parent / "pictures" / f"{name}.png"))


# The page consists of nested shadow roots. Chart scaling leaves out outliers; show them too.
_OPEN_ALL = """
const visit = (root, name, found) => {
  for (const element of root.querySelectorAll('*')) {
    if (element.tagName.toLowerCase() === name) found.push(element);
    if (element.shadowRoot) visit(element.shadowRoot, name, found);
  }
  return found;
};
for (const view of visit(document, 'tf-category-paginated-view', [])) {
  const pane = view.shadowRoot.querySelector('iron-collapse');
  if (pane && !pane.opened) view.shadowRoot.querySelector('button.heading').click();
}
for (const box of visit(document, 'paper-checkbox', [])) {
  if (box.checked && box.textContent.includes('outliers')) box.click();
}
"""


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ["curvature_tab_top"])
