"""Drives a headless Chromium through its debugging pipe, without a driver program or a package."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
# The browser reads its commands from descriptor 3 and answers on 4.
START = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execvp(a[3], a[3:])"
KEYS = {"Enter": 13, "Escape": 27}


def program() -> str | None:
    """The browser: MLLAMA_GRAPH_BROWSER, or the first of NAMES on the path; None where there is none."""
    return os.environ.get("MLLAMA_GRAPH_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser. `faults`: errors of scripts, and of requests that were blocked or failed."""

    def __init__(self, reader: Any, writer: Any):
        self._reader, self._writer, self._next, self._session = reader, writer, 0, None
        self.faults: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> Any:
        """Call a method of the DevTools protocol."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": parameters}
        self._writer.write(json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode())
        self._writer.write(b"\0")
        self._writer.flush()
        while True:
            found = self._read()
            if found.get("id") == self._next:
                assert "error" not in found, found
                return found["result"]

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._reader.read(1)) != b"\0":
            assert byte, "the browser has ended"
            data += byte
        found = json.loads(data)
        if found.get("method") == "Runtime.exceptionThrown":
            self.faults.append(found["params"]["exceptionDetails"]["exception"].get("description", "exception"))
        if found.get("method") == "Log.entryAdded":
            self.faults.append(found["params"]["entry"]["text"])
        return found

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited."""
        found = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, url: str) -> None:
        """Load a page."""
        self("Page.navigate", url=url)
        self.wait("document.readyState == 'complete'")

    def wait(self, condition: str, seconds: float = 20.0) -> None:
        """Wait until an expression of the page is true."""
        until = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < until, f"{condition} is not so: {self.run('document.body.innerText')}"
            time.sleep(0.01)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False) -> None:
        """Press a key."""
        code = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 if shift else 0}
        self("Input.dispatchKeyEvent", type="keyDown", **code, **({"text": "\r"} if key == "Enter" else {}))
        self("Input.dispatchKeyEvent", type="keyUp", **code)

    def choose(self, selector: str, *paths: Path) -> None:
        """Choose files for a file input."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """Set the page's size in pixels, and its colours."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        look = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self("Emulation.setEmulatedMedia", features=look)

    def picture(self) -> bytes:
        """A PNG of the page."""
        return base64.b64decode(self("Page.captureScreenshot")["data"])


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A new browser with its files in the folder `profile`."""
    (near, to_write), (from_read, far) = os.pipe(), os.pipe()
    # Above 3 and 4, which START overwrites.
    to_read, from_write = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (near, far))
    found = program()
    assert found
    given = [found, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    given += ["--remote-debugging-pipe", "--disable-background-networking", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(to_read), str(from_write), *given],
        pass_fds=[to_read, from_write],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (near, far, to_read, from_write):
        os.close(end)
    with os.fdopen(from_read, "rb") as reader, os.fdopen(to_write, "wb") as writer:
        try:
            yield Browser(reader, writer)
        finally:
            process.kill()
            process.wait()
