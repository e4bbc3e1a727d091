"""A headless Chromium, as Debian has it; nothing is downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tests.support.servers import NotInstalledError

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

__all__ = ["PACKAGES", "is_installed", "open_browser"]

#: Debian's packages; without a font its pictures have boxes for letters.
PACKAGES = ("chromium", "chromium-driver", "fonts-dejavu-core")

_BROWSER, _DRIVER = "chromium", "chromedriver"


def is_installed() -> bool:
    """Return whether the browser and what drives it are on this machine."""
    return shutil.which(_BROWSER) is not None and shutil.which(_DRIVER) is not None


@contextmanager
def open_browser(*, width: int = 1280, height: int = 900) -> Iterator[Chrome]:
    """Yield a browser with a profile of its own.

    Raises:
        NotInstalledError: There is none on this machine.
    """
    # `make test` asks at each start whether there is one.
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    browser, driver = shutil.which(_BROWSER), shutil.which(_DRIVER)
    if browser is None or driver is None:
        raise NotInstalledError(f"`{_BROWSER}` or `{_DRIVER}` was not found")
    with TemporaryDirectory(prefix="chromium-") as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        for argument in (
            *("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"),
            # It may connect to the tested Flower alone.
            *("disable-quic", "no-first-run", "disable-background-networking", "disable-component-update"),
            *("disable-sync", "disable-default-apps", "disable-extensions", "no-proxy-server"),
            *(f"window-size={width},{height}", f"user-data-dir={Path(profile) / 'profile'}"),
        ):
            options.add_argument(f"--{argument}")
        chromium = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield chromium
        finally:
            chromium.quit()
