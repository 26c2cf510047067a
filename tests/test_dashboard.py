"""The dashboard in a real browser, in the page of runs that the real trainer made."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from started import Started

from aipo_graph.log import read_metrics
from aipo_graph.view.__main__ import make

Row = dict[str, Any]
Open = Callable[..., Page]
Change = Callable[[Callable[[list[Row]], list[Row]]], Path]
DRAWN = "() => [...document.querySelectorAll('.chart canvas')].map((canvas) => canvas.toDataURL())"
LEGENDS = "(all) => all.map((value) => [value.dataset.metric, value.innerText])"
TABLE = "(rows) => rows.map(({cells: [name, ...values]}) => [name.innerText, values.map((value) => value.innerText)])"
PIXELS = """(canvas, name) => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const colour = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  let count = 0;
  for (let i = 0; i < data.length; i += 4) count += data[i] === red && data[i + 1] === green && data[i + 2] === blue;
  return count;
}"""


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The page of run folders, written once."""

    @cache
    def page(*folders: Path) -> Path:
        file = tmp_path_factory.mktemp("page") / "view.html"
        make([str(folder) for folder in folders], file, 100, opens=False)
        return file

    return page


@pytest.fixture
def dashboard(chromium: Browser, page_of: Callable[..., Path]) -> Iterator[Open]:
    """Opens the dashboard of run folders. What the page's console says, and requests to elsewhere, fail the test."""
    said: list[str] = []

    def open_page(*folders: Path, width: int = 1280, theme: str = "light") -> Page:
        file = page_of(*folders)
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)  # type: ignore[arg-type]
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        page.get_by_test_id("tab-dashboard").click()
        return page

    yield open_page
    for context in chromium.contexts:
        context.close()
    assert [text for text in said if not text.startswith("data:,")] == []


@pytest.fixture
def changed(viewed_run: Path, tmp_path: Path) -> Change:
    """A run with other metrics than the trainer's."""

    def change(edit: Callable[[list[Row]], list[Row]]) -> Path:
        folder = tmp_path / f"changed-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.yaml").write_text((viewed_run / "config.yaml").read_text())
        rows = edit(read_metrics(viewed_run / "metrics.jsonl"))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return change


def metrics(run: Path) -> list[Row]:
    return read_metrics(run / "metrics.jsonl")


def titles(page: Page) -> list[str]:
    return page.locator(".chart-panel h3").all_inner_texts()


def legend(page: Page, run: int = 0) -> dict[str, str]:
    """The values that the legends show, by metric."""
    return dict(
        page.locator(f".value[data-run='{run}']").evaluate_all("(all) => all.map((value) => [value.dataset.metric, value.innerText])")
    )


def drawn(page: Page) -> list[str]:
    """What each chart shows, as an image."""
    settle(page)
    return page.evaluate(DRAWN)


def pixels(page: Page, colour: str) -> int:
    """How much of the first chart has the colour of this variable."""
    settle(page)
    return page.locator(".chart canvas").first.evaluate(PIXELS, colour)


def settle(page: Page) -> None:
    """A chart takes its size in one frame and draws in the next."""
    page.locator(".chart canvas").first.wait_for()
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))")


def point(page: Page, step: int, *keys: str) -> None:
    """Moves the cursor by keys, which must bring it to this step."""
    page.locator(".chart").first.focus()
    for key in keys:
        page.keyboard.press(key)
    page.get_by_text(f"Values at step {step:,}", exact=True).wait_for()


def agrees(text: str, value: float | None) -> bool:
    """Whether a text of four digits (three before a power of ten, of the page's four) or of a percentage's tenths is this value's."""
    if text == "–" or value is None:
        return text == "–" and value is None
    number = float(text.strip("%").replace("−", "-").replace(",", ""))
    return number == (pytest.approx(100 * value, abs=0.051) if "%" in text else pytest.approx(value, rel=6e-3 if "e" in text else 1e-3))


def wrong(shown: Mapping[str, str], row: Row) -> dict[str, tuple[str, float | None]]:
    """What does not agree with a line of metrics.jsonl. No trace that ended for a reason: the reason is not logged."""
    return {
        name: (text, row.get(name))
        for name, text in shown.items()
        if not agrees(text, row.get(name, 0 if name.startswith("ended/") else None))
    }


def test_base_against_trained_is_the_headline(dashboard: Open, viewed_run: Path, changed: Change) -> None:
    page = dashboard(viewed_run)
    summary = json.loads((viewed_run / "summary.json").read_text())
    table = page.get_by_test_id("evaluated")
    heads = table.locator("thead th").all_inner_texts()[1:]
    assert heads == [name for name in summary["trained"]["alone"] if re.fullmatch(r"pass@\d+|greedy", name)]
    for row, mode in zip(table.locator("tbody tr").all(), ("alone", "with_agents"), strict=True):
        for name, text in zip(heads, row.locator("td").all_inner_texts(), strict=True):
            assert [float(figure) for figure in text.split(" → ")] == pytest.approx(
                [summary[policy][mode][name] for policy in ("base", "trained")], abs=5e-4
            )


def test_a_tile_says_what_its_curve_shows(dashboard: Open, changed: Change) -> None:
    page = dashboard(changed(lambda rows: [rows[0] | {"step": i + 1, "entropy": i % 2} for i in range(30)]))
    tile = page.locator(".key-figure", has_text="Entropy").locator("strong")
    assert tile.inner_text() == "0.5"  # of the last two: a mean of three steps
    page.get_by_test_id("smoothing").fill("0")
    assert tile.inner_text() == "1"


def test_there_is_a_panel_for_what_was_measured_and_none_for_what_was_not(dashboard: Open, viewed_run: Path, changed: Change) -> None:
    page = dashboard(viewed_run)
    whole = titles(page)
    assert page.locator(".charts h2").all_inner_texts() == ["Reward", "Consults", "Coefficient", "Policy", "Speed & health"]
    assert {
        "Reward", "Reward alone, by kind", "Problems solved", "Consults per trace", "Mean ratio π/μ", "Tokens at the floor",
        "Tokens at the ceiling", "Effective sample size", "Ratio of knowledge's tokens", "Entropy", "Length", "Gradient norm",
        "Learning rate", "Loss", "Clipped policy tokens", "Sampled tokens per second", "Seconds per step", "Mismatch KL", "Lag",
        "Failed and discarded",
    } <= set(whole)  # fmt: skip
    assert {"consults/verify", "floor_hit/knowledge", "seconds/learn", "agent_ratio_below/0.3/knowledge"} <= legend(page).keys()
    assert page.locator(".chart canvas").count() == len(whole)
    page.close()
    lost = ("entropy", "lag", "agent_ratio_below", "consults")
    fewer = changed(lambda rows: [{k: v for k, v in row.items() if k.partition("/")[0] not in lost} for row in rows])
    less = titles(dashboard(fewer))
    gone = {title for title in whole if title not in less}
    assert gone == {"Entropy", "Lag", "Consults per trace"} | {title for title in whole if title.startswith("Ratio of")}


def test_the_legends_show_the_latest_values_and_those_at_the_cursor(dashboard: Open, viewed_run: Path) -> None:
    rows = metrics(viewed_run)
    page = dashboard(viewed_run)
    latest = {name: value for row in rows for name, value in row.items() if value is not None and not name.startswith("ended/")}
    assert wrong(legend(page), {**rows[-1], **latest}) == {}
    for key, row in (("Home", rows[0]), ("ArrowRight", rows[1]), ("Shift+ArrowRight", rows[3]), ("ArrowLeft", rows[2]), ("End", rows[3])):
        point(page, row["step"], key)
        assert wrong(legend(page), row) == {}
    over = page.locator(".chart .u-over").nth(4)
    over.hover(position={"x": 3, "y": 20})
    page.get_by_text("Values at step 1", exact=True).wait_for()
    assert wrong(legend(page), rows[0]) == {}
    lines = page.locator(".u-cursor-x").evaluate_all("(all) => all.map((line) => line.style.transform)")
    assert len(set(lines)) <= 3 < len(lines)  # every chart's cursor: widths differ by a label's


def test_two_runs_are_overlaid(dashboard: Open, viewed_run: Path, other_run: Path) -> None:
    alone = drawn(dashboard(viewed_run))[0]
    page = dashboard(viewed_run, other_run)
    assert page.locator(".run-names li").all_inner_texts() == ["quickstart", "mask"]
    point(page, 1, "Home")
    assert wrong(legend(page), metrics(viewed_run)[0]) == {}
    assert wrong(legend(page, run=1), metrics(other_run)[0]) == {}
    point(page, 4, "End")
    assert set(legend(page, run=1).values()) == {"–"}  # it has three steps
    assert legend(page)["reward/alone"] != "–"
    dashes = page.evaluate("[0, 1].map((run) => curveLook(null, {run, colour: 'red', style: 'line'}).dash.length)")
    assert dashes == [0, 2]
    both = drawn(page)[0]
    page.locator(".chart-legend button").first.click()
    assert len({alone, both, drawn(page)[0]}) == 3


def test_smoothing_is_a_centred_mean_that_keeps_gaps(dashboard: Open, changed: Change) -> None:
    page = dashboard(changed(lambda rows: [{**rows[i % 4], "step": i + 1} for i in range(12)]))
    assert page.evaluate("runningMean([3, 0, 0, null, 6], 3)") == [1.5, 1, 0, None, 6]
    assert page.get_by_text("none", exact=True).is_visible()
    raw, shown = drawn(page), legend(page)
    page.get_by_test_id("smoothing").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("mean of 3 steps", exact=True).wait_for()
    assert drawn(page)[0] != raw[0]
    assert legend(page) == shown


def test_what_lies_on_the_other_axis_is_the_tokens_sampled_so_far(dashboard: Open, viewed_run: Path) -> None:
    first, second, *_ = metrics(viewed_run)
    page = dashboard(viewed_run)
    page.get_by_test_id("axis").select_option("tokens")
    page.locator(".chart").first.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    sampled = page.evaluate("(n) => AMOUNT.format(n)", first["tokens/policy"] + second["tokens/policy"])
    page.get_by_text(f"Values at {sampled} tokens", exact=True).wait_for()
    assert wrong(legend(page), second) == {}


def test_a_run_of_one_step_is_shown(dashboard: Open, changed: Change) -> None:
    folder = changed(lambda rows: rows[:1])
    page = dashboard(folder)
    settle(page)
    assert wrong(legend(page), metrics(folder)[0]) == {}
    assert pixels(page, "--agent") > 5


def test_a_run_without_a_step_says_so(dashboard: Open, changed: Change) -> None:
    dashboard(changed(lambda rows: [])).get_by_text("No step is logged yet.").wait_for()


def test_gaps_and_skipped_steps_are_marked(dashboard: Open, changed: Change) -> None:
    gap = {"step": 2, "skipped": 0.0, "entropy": None, "reward/alone": 0.5}
    page = dashboard(changed(lambda rows: [rows[0], gap, *rows[2:]]))
    point(page, 2, "Home", "ArrowRight")
    assert wrong(legend(page), gap) == {}
    assert legend(page)["entropy"] == "–"
    assert pixels(page, "--bad") == 0
    page = dashboard(changed(lambda rows: [rows[0], {**rows[1], "skipped": 1.0}, *rows[2:]]))
    page.get_by_text("1 skipped step", exact=True).wait_for()
    assert pixels(page, "--bad") > 50


def test_names_from_a_run_are_text(dashboard: Open, changed: Change) -> None:
    hostile = "<img src=x onerror=console.error(1)>"
    page = dashboard(changed(lambda rows: [{**row, f"reward/alone/{hostile}": 0.25} for row in rows]))
    page.get_by_role("button", name=hostile, exact=True).wait_for()
    page.locator(".latest summary").click()
    page.get_by_role("rowheader", name=f"reward/alone/{hostile}", exact=True).wait_for()
    assert page.locator("img").count() == 0


def test_a_drag_zooms_all_charts_until_a_double_click(dashboard: Open, changed: Change) -> None:
    page = dashboard(changed(lambda rows: [{**rows[i % 4], "step": i + 1} for i in range(100)]))
    settle(page)
    box = page.locator(".chart .u-over").nth(1).bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] + 4, box["y"] + 60, steps=3)
    page.mouse.up()
    page.get_by_test_id("unzoom").wait_for()
    point(page, 51, "Home")
    page.locator(".chart .u-over").nth(2).dblclick()
    page.get_by_test_id("unzoom").wait_for(state="detached")
    point(page, 1, "Home")
    page.keyboard.press("+")
    page.get_by_test_id("unzoom").wait_for()
    point(page, 50, "End")
    page.keyboard.press("Escape")
    page.get_by_test_id("unzoom").wait_for(state="detached")


@pytest.fixture
def served(changed: Change) -> Iterator[tuple[Path, str]]:
    """A run of 20 steps that is served live, and its address."""
    folder = changed(lambda rows: [{**rows[i % 4], "step": i + 1} for i in range(20)])
    with Started("aipo_graph.view", [str(folder), "--serve", "--no-open", "--port", "0"], folder) as server:
        yield folder, server.wait_for(r"http://[\d.:]+/")


def test_a_live_run_goes_on_in_place(chromium: Browser, served: tuple[Path, str]) -> None:
    folder, url = served
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    page.goto(url)
    page.get_by_test_id("tab-dashboard").click()
    settle(page)
    point(page, 20, "End")
    page.keyboard.press("+")
    page.get_by_test_id("unzoom").wait_for()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "reward/alone": 0.75, "entropy": 3.5}) + "\n")
    page.locator(".state", has_text="21/").wait_for()
    assert legend(page)["entropy"] != "3.5"  # the cursor stays where it is
    point(page, 11, "Home")
    page.keyboard.press("Escape")
    point(page, 21, "End")
    assert legend(page)["entropy"] == "3.5"
    page.context.close()


def test_the_charts_follow_the_theme(dashboard: Open, viewed_run: Path) -> None:
    page = dashboard(viewed_run)
    light = drawn(page)
    page.get_by_test_id("theme").click()
    dark = drawn(page)
    assert all(before != after for before, after in zip(light, dark, strict=True))
    assert pixels(page, "--agent") > 5
    page.get_by_test_id("theme").click()
    assert drawn(page) == light


def test_four_hundred_pixels_are_one_column_without_scrolling_sideways(dashboard: Open, viewed_run: Path, other_run: Path) -> None:
    page = dashboard(viewed_run, other_run, width=400)
    settle(page)
    page.get_by_role("button", name="How to read: Loss").click()
    page.locator(".latest summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    edges = page.locator(".chart-panel").evaluate_all("(all) => all.map((panel) => [panel.offsetLeft, panel.offsetWidth])")
    assert len({tuple(edge) for edge in edges}) == 1
    assert all(width <= 400 for width in page.locator(".chart .uplot").evaluate_all("(all) => all.map((plot) => plot.scrollWidth)"))


def test_every_panel_explains_itself_by_keyboard(dashboard: Open, viewed_run: Path) -> None:
    page = dashboard(viewed_run)
    button = page.get_by_role("button", name="How to read: Entropy")
    button.focus()
    page.keyboard.press("Enter")
    page.get_by_text("Mean entropy of the policy's tokens").wait_for()
    assert button.get_attribute("aria-expanded") == "true"
    page.keyboard.press("Escape")
    page.get_by_text("Mean entropy of the policy's tokens").wait_for(state="detached")
    assert page.locator(".help").count() == page.locator(".chart-panel").count()


def test_the_table_has_the_latest_value_of_every_metric(dashboard: Open, viewed_run: Path, other_run: Path) -> None:
    page = dashboard(viewed_run, other_run)
    page.locator(".latest summary").click()
    shown = dict(page.locator(".latest tbody tr").evaluate_all(TABLE))
    for place, run in enumerate((viewed_run, other_run)):
        latest = {name: value for row in metrics(run) for name, value in row.items() if value is not None and not name.startswith("ended/")}
        assert latest.keys() - {"step"} <= shown.keys()
        assert wrong({name: shown[name][place] for name in latest if name != "step"}, latest) == {}


@pytest.mark.slow
def test_ten_thousand_steps_are_shown(dashboard: Open, changed: Change) -> None:
    page = dashboard(changed(lambda rows: [{**rows[i % 4], "step": i + 1} for i in range(10_000)]))
    page.get_by_text("mean of 201 steps", exact=True).wait_for()
    point(page, 10_000, "End")
    point(page, 9_999, "ArrowLeft")
