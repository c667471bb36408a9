import importlib.util
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def browser() -> Callable[[Path, int], Any]:
    """Opens a page in headless Chromium at a width, and checks what every report page has to keep: it fits, figures
    are drawn, nothing is logged and nothing is asked of the network, it prints."""
    if importlib.util.find_spec("selenium") is None:
        pytest.skip("selenium is not installed")
    if shutil.which("chromedriver") is None:
        pytest.skip("Chromium's chromedriver is not installed")

    @contextmanager
    def opened(page: Path, width: int, figures: int = 1) -> Iterator[Any]:
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        options = Options()
        for argument in (
            "headless=new",
            "no-sandbox",
            "disable-gpu",
            "no-first-run",
            "disable-background-networking",
            "disable-component-update",
            "disable-sync",
        ):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            driver.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
            )
            driver.get(page.as_uri())
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            drawn = driver.execute_script(
                "return [...document.querySelectorAll('figure svg')].map(s => s.clientHeight)"
            )
            assert len(drawn) >= figures and min(drawn) > 100
            yield driver
            assert not driver.get_log("browser")  # no error, no refused request
            requests = [
                entry
                for entry in driver.get_log("performance")
                if 'Network.requestWillBeSent"' in entry["message"]
            ]
            assert all('"url":"http' not in entry["message"] for entry in requests)
            printed = driver.execute_cdp_cmd("Page.printToPDF", {})
            assert len(printed["data"]) > 10_000
        finally:
            driver.quit()

    return opened
