"""Makes the screenshots in docs/img: `make screenshots RUN=runs/quickstart MODEL=runs/quickstart/policy
ARGS="--other runs/masked --chat runs/expert"`.

Drives the real pages of a run and of a model in the machine's Chromium. Look at what it made before you commit it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

IMG = Path(__file__).parent / "img"
SCALE = 1.5
LARGEST = 400_000
TELLING = """async () => {
  const {runs} = await openSource().index();
  const all = runs.flatMap(entriesOf);
  const asked = (one) => one.kind === "hard" && one.run === 0;
  const early = runs[0].steps / 4;
  const helped = all.filter((one) => asked(one) && one.withAgents && one.reward === 1 && Object.keys(one.consults).length > 1)
    .sort((one, two) => Math.abs(one.step - early) - Math.abs(two.step - early))[0];
  return {helped: helped.key, step: helped.step};
}"""
"""A trace that was helped early on. Problems that need the helper are of the kind "hard" in the quick start's task."""

QUESTION = """async (key) => {
  const entry = entriesOf((await openSource().index()).runs[0], 0).find((one) => one.key === key);
  return (await openSource().page(0, entry.page)).problems[entry.problem].question;
}"""


def shoot(page: Page, name: str) -> None:
    """A PNG of 256 colours, which the pages' plain areas do not show."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # charts draw, lines fade in
    file = IMG / f"{name}.png"
    page.screenshot(path=file)
    with Image.open(file) as picture:
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
    size = file.stat().st_size
    print(f"{file}: {size // 1000} kB")
    if size > LARGEST:
        sys.exit(f"error: {file} has {size} bytes, more than {LARGEST}; make its window smaller")


@contextmanager
def opened(browser: Browser, url: str, width: int = 1280, height: int = 860, theme: str = "light") -> Iterator[Page]:
    page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=SCALE)
    page.emulate_media(color_scheme="dark" if theme == "dark" else "light")
    page.goto(url)
    yield page
    page.context.close()


def viewer(browser: Browser, one: str, two: str) -> str:
    """The trace viewer and the dashboard; returns a question of the run."""
    with opened(browser, two) as page:
        page.get_by_test_id("trace").wait_for()
        found = page.evaluate(TELLING)
    helped = f"#tab=traces&step={found['step']}&trace={found['helped']}"
    with opened(browser, f"{one}{helped}") as page:
        page.get_by_test_id("tokens").wait_for()
        shoot(page, "viewer")
        question: str = page.evaluate(QUESTION, found["helped"])
    with opened(browser, f"{one}{helped}&colour=coefficient", theme="dark") as page:
        page.get_by_test_id("tokens").wait_for()
        shoot(page, "viewer-dark")
    with opened(browser, f"{one}{helped}&view=group") as page:
        page.get_by_test_id("group").wait_for()
        shoot(page, "viewer-group")
    with opened(browser, f"{two}#tab=traces&view=compare") as page:
        page.get_by_test_id("tokens").last.wait_for()
        shoot(page, "viewer-compare")
    with opened(browser, f"{one}#trace={found['helped']}", width=390) as page:
        page.get_by_test_id("tokens").wait_for()
        page.locator(".row.chosen").click()
        shoot(page, "viewer-400")
    with opened(browser, f"{two}#tab=dashboard", height=1240) as page:
        page.locator(".chart canvas").last.wait_for()
        shoot(page, "dashboard")
    return question


def demo(browser: Browser, url: str, question: str) -> None:
    with opened(browser, url) as page:
        page.get_by_test_id("question").fill(question)
        page.get_by_test_id("samples").fill("4")
        page.get_by_test_id("ask").click()
        page.get_by_test_id("stop").wait_for()
        page.get_by_test_id("ask").wait_for(timeout=120_000)
        shoot(page, "demo")


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of the demo page."""
    words = [sys.executable, "-m", "aipo_graph.demo", model, "--web", "--no-open", "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert server.stdout
        found = next(filter(None, (re.search(r"http://\S+", line) for line in server.stdout)), None)
        if found is None:
            sys.exit("error: the demo did not start")
        yield found[0]
    finally:
        server.terminate()
        server.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_argument("model", help="the demo's model: a folder, or operators")
    parser.add_argument("--other", help="a second run, for the dashboard and the comparison")
    parser.add_argument("--chat", help="a run of a graph of messages with a helper")
    given = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell"))), None)
    if chromium is None:
        sys.exit("error: no Chromium; install it: make browser")
    with TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        for file, runs in (("one.html", [given.run]), ("two.html", [given.run, *filter(None, [given.other])])):
            subprocess.run([sys.executable, "-m", "aipo_graph.view", *runs, "--no-open", "--out", str(folder / file)], check=True)
        browser = playwright.chromium.launch(executable_path=chromium, chromium_sandbox=os.geteuid() != 0)
        if given.chat:
            subprocess.run(
                [sys.executable, "-m", "aipo_graph.view", given.chat, "--no-open", "--out", str(folder / "chat.html")], check=True
            )
            with opened(browser, f"{(folder / 'chat.html').as_uri()}#graph=left") as page:
                page.get_by_test_id("tokens").wait_for()
                shoot(page, "viewer-chat")
        question = viewer(browser, (folder / "one.html").as_uri(), (folder / "two.html").as_uri())
        with served(given.model) as url:
            demo(browser, url, question)
        browser.close()


if __name__ == "__main__":
    main()
