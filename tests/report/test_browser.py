"""The page in a real browser: it renders without a word on the console, and is as wide as the window."""

from __future__ import annotations

import json

import pytest
from chromium import chromium
from made_run import diagnosis, made_run, under_attack, with_curves

from nspo_lightning.report import read_run, write_comparison, write_report

pytestmark = pytest.mark.slow
browser = pytest.fixture(chromium, scope="module")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    one = with_curves(made_run(folder / "one"))
    (one / "diagnosis.json").write_text(json.dumps(diagnosis()))
    runs = [read_run(one), read_run(made_run(folder / "a-run-with-a-rather-long-name", unsafe=0.3))]
    attacked = read_run(under_attack(made_run(folder / "attacked")))
    return [write_report(runs[0])[0], write_comparison([*runs, attacked], folder)[0], write_report(attacked)[0]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_renders(browser, pages, scheme, width):
    for file in pages:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(file.as_uri())
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert page.title() != "taken", "a script in an answer has run"
        assert page.evaluate("document.images.length") == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        smallest = (
            "Math.min(...[...document.querySelectorAll('.chart text')].map(t => t.getBoundingClientRect().height))"
        )
        assert page.evaluate(smallest) >= 9.5, "letters of the charts, in pixels"
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) < 200) == (scheme == "dark")
        context.close()


def test_filters_and_more(browser, pages):
    page = browser.new_page()
    page.goto(pages[0].as_uri())
    assert page.locator(".exchange:visible").count() == 12
    page.click(".more")
    assert page.locator(".exchange:visible").count() == 18
    page.select_option("[data-filter=kind]", "look-alike")
    assert page.locator(".exchange:visible").count() == 6
    page.select_option("[data-filter=kind]", "")
    page.fill("[data-filter=words]", "mill 3")
    assert page.locator(".exchange:visible").count() == 1
    page.close()
