"""Headless Chromium through the HTTP interface of chromedriver (W3C WebDriver): no package."""

import base64
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    BROWSER is None or DRIVER is None,
    reason="NO CHROMIUM: the report is not tested; apt-get install -y chromium chromium-driver",
)
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--force-device-scale-factor=1",
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Chromium:
    """A browser window; use as a context manager.

    Args:
        width: of the window, pixels.
        height: of the window, pixels.
        dark: whether the page is told that the user likes dark colours.
    """

    def __init__(self, width: int, height: int, *, dark: bool = False) -> None:
        self.size, self.dark = (width, height), dark
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.profile = tempfile.mkdtemp()

    def __enter__(self) -> "Chromium":
        self.driver = subprocess.Popen(
            [str(DRIVER), f"--port={self.port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self.profile},
        )
        for _ in range(100):
            try:
                if self._call("GET", "/status")["ready"]:
                    break
            except OSError:
                time.sleep(0.1)
        options = {
            "binary": BROWSER,
            "args": [*_FLAGS, f"--user-data-dir={self.profile}/profile"],
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        answer = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{answer['sessionId']}"
        # The window of headless Chromium cannot be narrower than 500: emulate the screen.
        width, height = self.size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.command("Emulation.setEmulatedMedia", {"features": [scheme, still]})
        self._call("POST", f"{self.session}/url", {"url": "about:blank"})
        self.requests()  # those of the browser's own start page are of no interest
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._call("DELETE", self.session)
        finally:
            self.driver.terminate()
            self.driver.wait(20)
            shutil.rmtree(self.profile, ignore_errors=True)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data,
            {"Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())["value"]

    def command(self, name: str, parameters: dict[str, Any]) -> Any:
        """A command of the Chrome DevTools protocol."""
        body = {"cmd": name, "params": parameters}
        return self._call("POST", f"{self.session}/goog/cdp/execute", body)

    def open(self, path: Path) -> None:
        """Load a file and wait until it is loaded."""
        self._call("POST", f"{self.session}/url", {"url": path.resolve().as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body returns in the page."""
        body = {"script": script, "args": list(arguments)}
        return self._call("POST", f"{self.session}/execute/sync", body)

    def find(self, selector: str) -> str:
        """An element by CSS selector."""
        body = {"using": "css selector", "value": selector}
        return self._call("POST", f"{self.session}/element", body)[_ELEMENT]

    def click(self, selector: str) -> None:
        """Click an element as a user does: it must be visible and not covered."""
        self._call("POST", f"{self.session}/element/{self.find(selector)}/click")

    def type(self, selector: str, keys: str) -> None:
        """Type keys into an element."""
        body = {"text": keys}
        self._call("POST", f"{self.session}/element/{self.find(selector)}/value", body)

    def press(self, key: str) -> None:
        """Press a key wherever the focus is."""
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        source = {"type": "key", "id": "keyboard", "actions": actions}
        self._call("POST", f"{self.session}/actions", {"actions": [source]})

    def text(self, selector: str) -> str:
        """The text of an element."""
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def screenshot(self, path: Path) -> None:
        """Save what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", f"{self.session}/screenshot")))

    def console(self) -> list[str]:
        """Messages of the console so far."""
        entries = self._call("POST", f"{self.session}/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries]

    def requests(self) -> list[str]:
        """Addresses that the page asked for so far."""
        entries = self._call("POST", f"{self.session}/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
