"""Small PNGs of what TensorBoard shows of a run, taken in a headless Chromium.

    python examples/screenshots.py runs/demo pictures/

Needs TensorBoard, Pillow, selenium, and Chromium with its driver (on Debian: chromium and chromium-driver).
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

FILLED = {
    "timeseries": "metrics-card-groups card-view",
    "scalars": "vz-line-chart2 path.line",
    "images": "tf-image-loader img",
    "audio": "tf-audio-loader audio",
    "graphs": "tf-graph-scene g.node",
    "distributions": "vz-distribution-chart path.area",
    "histograms": "vz-histogram-timeseries path.outline",
    "text": "tf-text-loader tf-markdown-view",
    "projector": "vz-projector span.numDataPoints",
}
"""Tabs of the page, and a host and an element within it that is there only once the tab has something to show."""

FIND = """
    const [host, within] = arguments;
    const find = (root, selector, found) => {
        for (const element of root.querySelectorAll('*')) {
            if (element.matches(selector)) found.push(element);
            if (element.shadowRoot) find(element.shadowRoot, selector, found);
        }
        return found;
    };
    const hosts = find(document, host, []);
    return within ? hosts.map(h => find(h.shadowRoot || h, within, [])) : hosts;
"""


def missing() -> str | None:
    """What keeps the pages from being looked at here; None if nothing does."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"there is no {program} here: apt-get install chromium chromium-driver"
    try:
        import selenium  # noqa: F401
        import tensorboard  # noqa: F401
    except ImportError as error:
        return f"{error}: pip install selenium tensorboard"
    return None


class Pages:
    """TensorBoard's server on a folder, and a browser to look at it.

    Arguments:
        folder: the log directory.
        size: width and height of the window, in pixels.
    """

    def __init__(self, folder: str | Path, size: tuple[int, int] = (1100, 700)) -> None:
        self.folder = folder
        self.size = size

    def __enter__(self) -> Pages:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(self.folder)]
        self.log = tempfile.TemporaryFile("w+")
        self.server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", "0"], stderr=self.log)
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.driver: Any = None
        try:
            self.url = self.wait(self._address, 60)
            options = webdriver.ChromeOptions()
            options.binary_location = str(shutil.which("chromium"))
            for flag in (*FLAGS, f"--user-data-dir={self.profile.name}", "--window-size={},{}".format(*self.size)):
                options.add_argument(flag)
            self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.driver is not None:
            self.driver.quit()
        self.server.terminate()
        self.server.wait()
        self.log.close()
        self.profile.cleanup()

    def _address(self) -> str | None:
        if self.server.poll() is not None:
            raise RuntimeError("TensorBoard ended at once: " + self._told())
        found = re.search(r"http://[\d.:]+/", self._told())
        return found and found[0]

    def _told(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def wait(self, condition: Any, seconds: float = 30) -> Any:
        """What `condition()` returns once that is true.

        Raises:
            TimeoutError: it is not within that time.
        """
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds} s")
            time.sleep(0.1)
        return found

    def open(self, tab: str) -> None:
        """Go to a tab and wait until it has something to show."""
        self.driver.switch_to.default_content()
        self.driver.get("about:blank")  # a change of the fragment alone would not load the page
        self.driver.get(f"{self.url}#{tab}")
        host, element = FILLED[tab].split(" ")
        try:
            for _ in range(2 if tab == "projector" else 0):  # it lives in a frame in a frame
                self.driver.switch_to.frame(self.wait(lambda: self.find("iframe"))[0])
            self.wait(lambda: any(each and each[0].text != "0" for each in self.find(host, element)))  # "0" points yet
        except TimeoutError:
            raise TimeoutError(f"the tab {tab!r} of {self.url} shows nothing ({FILLED[tab]})") from None
        if tab == "timeseries":  # cards are drawn when they come into view: leave the scalars' only
            next(button for button in self.find("button.filter-view-button") if button.text == "Scalars").click()

    def find(self, host: str, within: str = "") -> list[Any]:
        """The elements that match `host`, across shadow roots; with `within`, for each a list of those within it."""
        found: list[Any] = self.driver.execute_script(FIND, host, within)
        return found

    def open_graph(self) -> None:
        """Open the model's box in the graph, and show all of it."""
        from selenium.webdriver import ActionChains

        def opened() -> bool:
            nodes = {node.get_attribute("data-name"): node for node in self.find("g.node")}
            if any("/" in name for name in nodes):
                return True
            box = next(node for name, node in nodes.items() if not name.startswith(("input", "output")))
            ActionChains(self.driver).double_click(box).perform()
            time.sleep(1)  # while the page still moves things about, a click may miss
            return False

        self.wait(opened)
        next(button for button in self.find("paper-button") if button.text.strip() == "Fit to screen").click()

    def picture(self, path: Path, settle: float = 1.0, limit: int = 100_000) -> None:
        """Save what the window shows as a PNG of less than `limit` bytes: with fewer colours where need be."""
        time.sleep(settle)  # animations
        shot = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        for colors in (256, 128, 64, 32, 16):
            shot.quantize(colors).save(path, optimize=True)
            if path.stat().st_size < limit:
                return
        raise ValueError(f"{path} is {path.stat().st_size} bytes even with 16 colours; take a smaller window")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("logdir")
    parser.add_argument("pictures", type=Path, help="folder for the PNGs")
    parser.add_argument("--tabs", nargs="+", choices=FILLED, default=list(FILLED))
    options = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    options.pictures.mkdir(parents=True, exist_ok=True)
    with Pages(options.logdir) as pages:
        for tab in options.tabs:
            try:
                pages.open(tab)
            except TimeoutError as error:
                print(error, file=sys.stderr)
                continue
            if tab == "graphs":
                pages.open_graph()
            pages.picture(options.pictures / f"{tab}.png")
            print(options.pictures / f"{tab}.png")


if __name__ == "__main__":
    main()
