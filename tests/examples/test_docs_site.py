"""The documentation as a site: it builds without a broken link, and wide tables scroll where there is little room."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chromium import chromium

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
browser = pytest.fixture(chromium, scope="module")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason='needs `pip install -e ".[docs]"`')
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def pages(site: Path) -> list[str]:
    return sorted(str(page.parent.relative_to(site)) for page in site.rglob("index.html"))


def test_no_page_is_wider_than_the_window_and_wide_tables_scroll(browser: Any, site: Path, address: str) -> None:
    context = browser.new_context(viewport={"width": 400, "height": 900})
    page, wide = context.new_page(), 0
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for name in pages(site):
        page.goto(f"{address}/{name}/")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
        page.wait_for_function(
            "[...document.querySelectorAll('article table')].every(t => t.closest('.md-typeset__table'))"
        )
        for room, needed, scrolls in page.evaluate(
            "[...document.querySelectorAll('article .md-typeset__scrollwrap')].map("
            "w => [w.clientWidth, w.scrollWidth, getComputedStyle(w).overflowX])"
        ):
            wide += needed > room
            assert scrolls == "auto", name
    assert wide > 5, "the tables of the evidence are"
    assert {url.split("/")[2] for url in asked} == {address.split("/")[2]}, "nothing is asked of anybody else"
    context.close()


def test_the_first_page_shows_a_result(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/")
    assert page.locator("article table td", has_text="1.9 %").count() == 1
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.locator("article img").count() >= 1
    page.close()
