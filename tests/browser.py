"""A headless Chromium for tests: pages as a person sees them, their words, and pictures of them.

Driven over its own DevTools protocol, so that nothing is needed but the browser and ``websocket-client``.
"""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ARTEFACTS = Path(__file__).resolve().parents[1] / "build" / "screenshots"
"""Where pictures of pages are left to be looked at; git ignores it."""

NAMES = ("chromium", "chromium-browser", "google-chrome")
START_SECONDS, PAGE_SECONDS = 60, 40

# All text that is drawn, also that of web components, which innerText leaves out.
_WORDS = """(() => {
  const walk = node => {
    if (node.nodeType === Node.TEXT_NODE) return [node.textContent];
    if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.nodeName)) return [];
    const inside = [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes];
    return inside.flatMap(walk);
  };
  return walk(document.body).join(" ").replace(/\\s+/g, " ");
})()"""


def find_chromium() -> str:
    """Its path; a test is skipped, by that name, where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("needs chromium (Debian, Ubuntu: apt-get install chromium)")
    return found


class Browser:
    """One page of a running Chromium.

    Attributes:
        errors: what the page complained of on its console, since the last ``open``.
        asked: addresses that it asked for, since the last ``open``.
    """

    def __init__(self, address: str):
        import websocket

        self._socket = websocket.create_connection(address, timeout=PAGE_SECONDS, suppress_origin=True)
        self._numbers = itertools.count(1)
        self.errors: list[str] = []
        self.asked: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._do(f"{domain}.enable")

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Go to a page of that many CSS pixels across."""
        self.errors, self.asked = [], []
        self._do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._do("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def ask(self, expression: str):
        """The value of a JavaScript expression."""
        answer = self._do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def words(self) -> str:
        """All text of the page."""
        return self.ask(_WORDS)

    def wait(self, expression: str, seconds: float = PAGE_SECONDS) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.ask(expression):
            assert time.monotonic() < end, f"in vain for {expression}; the page says {self.words()[:2000]}"
            time.sleep(0.1)

    def wait_for_words(self, *words: str) -> None:
        for word in words:
            self.wait(f"{_WORDS}.includes({json.dumps(word)})")

    def picture(self, name: str, whole: bool = False) -> Path:
        """A picture of what is seen, or of the whole page, as PNG among the artefacts."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        content = self._do("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path = ARTEFACTS / f"{name}.png"
        path.write_bytes(base64.b64decode(content["data"]))
        print(f"looked at: {path}")
        return path

    def print_to_pdf(self, name: str) -> Path:
        """The page printed on A4, as PDF among the artefacts."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        content = self._do("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        path = ARTEFACTS / f"{name}.pdf"
        path.write_bytes(base64.b64decode(content["data"]))
        print(f"printed: {path}")
        return path

    def close(self) -> None:
        self._socket.close()

    def _do(self, method: str, **parameters) -> dict:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict) -> None:
        about = message.get("params", {})
        if message["method"] == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        elif message["method"] == "Log.entryAdded" and about["entry"]["level"] == "error":
            self.errors.append(about["entry"]["text"])
        elif message["method"] == "Runtime.exceptionThrown":
            self.errors.append(about["exceptionDetails"].get("exception", {}).get("description", "exception"))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium with an empty page and a profile of its own."""
    command = [find_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--no-first-run", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [*command, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            page = Browser(_page_address(Path(profile) / "DevToolsActivePort", process))
            try:
                yield page
            finally:
                page.close()
        finally:
            process.terminate()
            process.wait(START_SECONDS)


def _page_address(port_file: Path, process: subprocess.Popen) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, "chromium did not start"
        with contextlib.suppress(OSError, IndexError):
            port = int(port_file.read_text().splitlines()[0])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.05)
    raise AssertionError("chromium did not open its port")


@contextlib.contextmanager
def tensorboard(folder: Path, log: Path) -> Iterator[str]:
    """The real TensorBoard on a folder; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--host", "127.0.0.1"]
    with open(log, "w") as output:
        process = subprocess.Popen([*command, "--load_fast=false"], stdout=output, stderr=output)
    try:
        end = time.monotonic() + START_SECONDS
        while "http://" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        address = "http://" + log.read_text().partition("http://")[2].split()[0]
        yield address
    finally:
        process.terminate()
        process.wait(START_SECONDS)
