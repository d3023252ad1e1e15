"""Headless Chromium by its W3C WebDriver, both of the distribution: no library and no browser build to keep in step."""

import base64
import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx

from testbed import PROJECT
from testbed.shell import provide, unpack

FONTS = PROJECT / ".cache/fonts"

ENTER, TAB = "\ue007", "\ue004"  # as WebDriver writes them

ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",  # which root cannot have
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


class Browser:
    """A session of a browser; `devtools` reaches what WebDriver has no word for."""

    def __init__(self, http: httpx.Client, host: str) -> None:
        self._http = http
        only = f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {host}"
        options = {"binary": "/usr/bin/chromium", "args": [*ARGUMENTS, only]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": logs}
        self._session = ""
        self._session = f"/session/{self._post('/session', capabilities={'alwaysMatch': wanted})['sessionId']}"

    def _post(self, path: str, **parameters: Any) -> Any:
        answer = self._http.post(self._session + path, json=parameters)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def close(self) -> None:
        """End the browser."""
        self._http.delete(self._session)

    def visit(self, url: str) -> None:
        """Load a page."""
        self._post("/url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a script returns, which is the body of a function."""
        return self._post("/execute/sync", script=script, args=list(arguments))

    def run_async(self, script: str, *arguments: Any) -> Any:
        """Return what a script gives the function that is its last argument."""
        return self._post("/execute/async", script=script, args=list(arguments))

    def devtools(self, command: str, **parameters: Any) -> Any:
        """Give a command of the DevTools protocol."""
        return self._post("/goog/cdp/execute", cmd=command, params=parameters)

    def press(self, key: str) -> None:
        """Press and release a key."""
        strokes = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": strokes}])

    def look(self, width: int, height: int, scheme: str = "light", scale: float = 1, mobile: bool = False) -> None:
        """Be a screen of this size (in CSS pixels), in a light or a dark scheme."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def prefer(self, languages: str) -> None:
        """Prefer these languages from the next page on, as `zh-CN,en`."""
        agent = self.run("return navigator.userAgent")
        self.devtools("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=languages)

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=self._clip())
        return base64.b64decode(shot["data"])

    def _clip(self) -> dict[str, float]:
        size = self.devtools("Page.getLayoutMetrics")["cssContentSize"]
        return {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}

    def complaints(self) -> list[str]:
        """What the browser's console has got since this was asked last."""
        return [line["message"] for line in self._post("/se/log", type="browser")]

    def requested(self) -> list[str]:
        """URLs of all requests since this was asked last."""
        entries = [json.loads(line["message"])["message"] for line in self._post("/se/log", type="performance")]
        return [one["params"]["request"]["url"] for one in entries if one["method"] == "Network.requestWillBeSent"]

    def wait(self, script: str, seconds: float = 5, *arguments: Any) -> float:
        """Return once a script returns something true, with the seconds that took."""
        began = time.monotonic()
        while not self.run(script, *arguments):
            assert time.monotonic() - began < seconds, f"not within {seconds} s: {script}"
            time.sleep(0.02)
        return time.monotonic() - began


@contextlib.contextmanager
def chromium(host: str = "127.0.0.1") -> Iterator[Browser]:
    """A browser for the length of a block, which reaches one host and has a font for Chinese."""
    provide({"chromium": "chromium", "chromedriver": "chromium-driver"})
    unpack(FONTS, "fonts-wqy-microhei")
    environment = {**os.environ, "XDG_DATA_HOME": f"{FONTS}/usr/share"}
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as driver:
        try:
            assert driver.stdout
            port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as http:
                browser = Browser(http, host)
                try:
                    yield browser
                finally:
                    browser.close()
        finally:
            driver.terminate()
