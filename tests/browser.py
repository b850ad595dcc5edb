"""A real browser, Debian's Chromium, for tests that look at pages as readers do."""

import base64
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

REQUIRED = "KD_LIGHTNING_BROWSER_REQUIRED"
"""Environment variable with which a missing browser is a failure: `.ci/run` installs one."""
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_QUIET = (
    *("headless", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars", "force-color-profile=srgb"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
)


def require_browser() -> None:
    """Skip a test where something is missing, or let it fail where a browser is required."""
    if any(map(shutil.which, _NAMES)) and shutil.which("chromedriver") and find_spec("selenium"):
        return
    reason = "no browser; install Debian's packages chromium and chromium-driver, and selenium (the extra `test`)"
    if os.environ.get(REQUIRED):
        pytest.fail(reason)
    pytest.skip(reason)


class Browser:
    """One process of a browser, whose window is set for each page.

    Args:
        profile: An empty folder for its files.
    """

    def __init__(self, profile: Path) -> None:
        from selenium.webdriver import Chrome, ChromeOptions, ChromeService

        options = ChromeOptions()
        options.binary_location = str(next(filter(None, map(shutil.which, _NAMES))))
        alone = ["no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
        for argument in (*_QUIET, *alone, f"user-data-dir={profile}"):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = Chrome(options, ChromeService(shutil.which("chromedriver")))

    def close(self) -> None:
        self.driver.quit()

    def set(self, *, width: int = 1280, height: int = 900, dark: bool = False, media: str = "") -> None:
        """Set the window, the scheme of colours, and screen or print."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})

    def before_pages(self, script: str) -> None:
        """Run JavaScript before that of each page."""
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})

    def open(self, address: str, **window: Any) -> None:
        """Open a page and forget the messages and requests of earlier ones."""
        self.set(**window)
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(address)

    def ask(self, script: str, *arguments: Any) -> Any:
        """Return what the body of a function in JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def messages(self) -> list[str]:
        """Return what the page has written to the console, errors included, since it was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for since it was opened, its own included."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def picture(self, place: dict[str, float] | None = None) -> bytes:
        """Return a PNG of the window, or of a place in the page."""
        clip = {} if place is None else {"captureBeyondViewport": True, "clip": {**place, "scale": 1}}
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", clip)["data"])

    def pdf(self) -> bytes:
        """Return the page as it is printed on A4, without backgrounds, as browsers print by default."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True, "printBackground": False}
        return base64.b64decode(self.driver.execute_cdp_cmd("Page.printToPDF", paper)["data"])
