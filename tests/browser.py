"""A real browser: Debian's Chromium, driven by playwright's Python package."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: Where screenshots go; without it, into the test's own directory.
SCREENSHOTS = "RAYWB_SCREENSHOTS"


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window; a test without one fails in CI and skips elsewhere."""
    path = shutil.which("chromium")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("there is no /usr/bin/chromium: apt-get install chromium")
        pytest.skip("there is no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root it has no sandbox; what it opens here is ours.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Tab:
    """A tab that keeps what went wrong in it, and every address that it asked for.

    Attributes:
        page: playwright's page.
        errors: messages of its console, and exceptions that nobody caught.
        requests: addresses of all requests, those that were refused among them.
    """

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url = url
        self.context = browser.new_context(**{"viewport": {"width": 1360, "height": 900}} | options)
        self.page = self.context.new_page()
        # The process that reads history gives way to everything else on the machine.
        self.page.set_default_timeout(30_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def show(self, route: str = "") -> Any:
        """Open a view by its address, and wait until the page has drawn it."""
        self.page.goto(f"{self.url}#/{route}")
        view = route.split("?")[0] or "overview"
        self.page.wait_for_selector(f"main[data-view={view}]")
        return self.page

    @property
    def foreign_requests(self) -> list[str]:
        """What was asked of others than the page's own server."""
        return [url for url in self.requests if not url.startswith((self.url, "data:", "blob:"))]

    def close(self) -> None:
        self.context.close()


@contextlib.contextmanager
def served(directory: Path) -> Iterator[str]:
    """`raywb ui` on a directory, as a user runs it; yields the page's address."""
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        [sys.executable, "-m", "raywb", "ui", str(directory), "--port", "0", "--no-open"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.strip().startswith("http://"):
                yield line.strip()
                break
        else:
            pytest.fail(f"raywb ui said no address: {said}")
    finally:
        process.terminate()
        assert process.wait(20) == 0
