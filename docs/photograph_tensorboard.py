"""Take the README's picture of TensorBoard: `python docs/photograph_tensorboard.py LOGDIR` after `make demo`.

Needs chromium, its chromedriver and `pip install selenium`.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from tensorboard import program


def main(logdir: str, picture: Path, page: str = "custom_scalars") -> None:
    """Start TensorBoard on loopback, open one of its pages in a headless browser, and save what it shows."""
    board = program.TensorBoard()
    board.configure(argv=[None, "--logdir", logdir, "--host", "127.0.0.1", "--port", "0"])
    address = board.launch()
    options = Options()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,1290", "--hide-scrollbars"):
        options.add_argument(flag)
    for flag in ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.get(f"{address}#{page}")
        time.sleep(10)  # the page loads its data after itself
        # Expand every category: only the first is open at the start.
        browser.execute_script(_OPEN_ALL)
        time.sleep(6)
        browser.save_screenshot(str(picture))
    finally:
        browser.quit()


# The page is built of nested shadow roots. Points that chart scaling leaves out as outliers are shown too.
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
    main(sys.argv[1], Path(__file__).parent / "pictures" / "tensorboard.png")
