"""The documentation site: it builds without a warning, is whole, and asks nothing of the network."""

import html
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from aipo_graph.config import Config

pytestmark = pytest.mark.slow
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data", "link": "href"}
"""What a browser fetches by itself: tags and the attribute that names it."""
NOT_FETCHED = {"canonical", "next", "prev"}


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


class Fetched(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("rel") not in NOT_FETCHED:
            self.found += [given.get(LOADS.get(tag, "")) or "", *re.findall(r"url\(([^)]*)\)", given.get("style") or "")]


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        assert len(parser.found) > 5
        assert [name for name in parser.found if re.match(r"(?:\w+:)?//", name)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:\w+:)?//", style.read_text(encoding="utf-8")), style


def test_every_setting_is_on_the_settings_page(site: Path) -> None:
    page = (site / "reference/settings.html").read_text(encoding="utf-8")
    for name, field in Config.model_fields.items():
        for key, one in field.annotation.model_fields.items():  # type: ignore[union-attr]
            assert f"id='{name}.{key}'" in page or f'id="{name}.{key}"' in page, f"{name}.{key}"
            assert html.escape(" ".join(one.description.split())[:12], quote=False) in page, f"{name}.{key}"
    assert "One of <code>constant</code>, <code>cosine</code>" in page


def test_formulas_are_typeset(site: Path) -> None:
    page = (site / "loss.html").read_text(encoding="utf-8")
    article = page[page.index("<article") : page.index("</article>")]
    assert article.count("<math") > 40
    assert "arithmatex" not in article
    assert not re.search(r"\\[a-z]+|\$", re.sub(r"<[^>]+>", "", article)), "LaTeX that was not understood"


def test_pages_open_from_the_disk_without_a_request_or_an_error(site: Path, chromium: Browser) -> None:
    requests, faults = [], []
    page = chromium.new_page(viewport={"width": 400, "height": 800})
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    for name in ("index", "concepts", "loss", "metrics", "reference/settings"):
        page.goto((site / f"{name}.html").as_uri())
        assert page.locator("h1").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
    page.goto((site / "index.html").as_uri())
    page.locator("label[for=__search]:visible").first.click()
    page.locator("[data-md-component=search-query]").press_sequentially("coefficient")
    page.locator(".md-search-result__item").first.wait_for()
    page.close()
    assert [url for url in requests if not url.startswith(("file:", "blob:", "data:"))] == []
    assert faults == []
