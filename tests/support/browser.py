"""A real browser for tests of Airflow's UI."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright


@contextlib.contextmanager
def start_browser() -> Iterator[Browser]:
    """Run Chromium, without a window and with a profile of its own, for as long as the block lasts.

    Where it is not installed the test is skipped, but in CI that is a failure.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        why = "Chromium is not installed (on Debian: apt-get install chromium)."
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    with sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, who runs tests in most containers.
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        started = playwright.chromium.launch(executable_path=chromium, args=options)
        yield started
        started.close()
