"""The viewer's page in a real browser, on runs that the real trainer made."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, expect
from rich.console import Console
from started import Started

from aipo_graph.config import Config
from aipo_graph.draw import picture
from aipo_graph.log import LoggedGroup, RunLog, read_traces
from aipo_graph.rollout.collect import open_graph
from aipo_graph.types import Problem, Segment, Trace, TraceGroup
from aipo_graph.view.__main__ import make

Open = Callable[..., Page]
SWITCHES = ("source", "logprob", "ratio", "coefficient", "advantage")


def written(out: Path, *folders: Path) -> Path:
    """The page of runs, written as the command does."""
    make([str(folder) for folder in folders], out, 2000, opens=False)
    return out


@pytest.fixture(scope="module")
def page_of_run(viewed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("page") / "view.html", viewed_run)


@pytest.fixture(scope="module")
def page_of_two(viewed_run: Path, other_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("page") / "view.html", viewed_run, other_run)


@pytest.fixture(scope="module")
def logged(viewed_run: Path) -> list[LoggedGroup]:
    return read_traces(viewed_run / "traces.jsonl")[0]


@pytest.fixture
def look(chromium: Browser) -> Iterator[Open]:
    """Opens a page; at the end of the test nothing may have been logged as an error, asked of a network or shown as a dialog."""
    contexts: list[BrowserContext] = []
    faults: list[str] = []

    def refuse(dialog: Dialog) -> None:
        faults.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def opened(file: Path, fragment: str = "", *, width: int = 1400, dark: bool = False) -> Page:
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", refuse)
        page.on("request", lambda request: faults.append(request.url) if request.url.partition("#")[0] != file.as_uri() else None)
        page.goto(f"{file.as_uri()}#{fragment}")
        return page

    opened.faults = faults  # type: ignore[attr-defined]
    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def changed(run: Path, folder: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Path:
    """A copy of a run with other lines in its traces.jsonl."""
    copytree(run, folder, ignore=ignore_patterns("checkpoints", "tensorboard", "evaluation"))
    lines = [json.loads(line) for line in (run / "traces.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "traces.jsonl").write_text("".join(json.dumps(line) + "\n" for line in change(lines)), encoding="utf-8")
    return folder


def shown(page: Page) -> int:
    """How many traces the list says are left."""
    return int(re.match(r"[\d,]+", page.get_by_test_id("count").inner_text())[0].replace(",", ""))  # type: ignore[index]


def traces_of(logged: list[LoggedGroup]) -> list[tuple[int, Trace]]:
    return [(line.step, trace) for line in logged for trace in line.group.traces]


# --- opening


def test_it_opens_from_a_file_with_the_runs_name_and_state_and_its_first_trace(
    look: Open, page_of_run: Path, logged: list[LoggedGroup]
) -> None:
    page = look(page_of_run)
    expect(page.locator("h1")).to_contain_text("quickstart")
    expect(page.locator("h1")).to_contain_text("finished 4/4 steps")
    trace = page.get_by_test_id("trace")
    expect(trace.locator("h2")).to_have_text(logged[0].group.problem.question)
    expect(trace.locator(".facts")).to_contain_text(logged[0].group.problem.question)
    expect(trace.locator(".facts")).to_contain_text(logged[0].group.problem.answer)
    expect(trace.locator(".facts")).to_contain_text(str(logged[0].group.traces[0].seed))
    text = "".join(segment.text for segment in logged[0].group.traces[0].segments)
    assert "".join(trace.locator(".token").all_text_contents()) == text
    assert page.get_by_test_id("notes").count() == 0


def test_the_list_draws_only_the_rows_in_sight(look: Open, page_of_run: Path, logged: list[LoggedGroup]) -> None:
    page = look(page_of_run)
    expect(page.get_by_test_id("trace-row").first).to_be_visible()
    total = len(traces_of(logged))
    assert shown(page) == total > page.get_by_test_id("trace-row").count()
    page.locator(".list").evaluate("list => { list.scrollTop = list.scrollHeight; }")
    expect(page.locator(f'.row[aria-posinset="{total}"]')).to_be_visible()


def test_a_run_without_traces_says_so(look: Open, viewed_run: Path, tmp_path: Path) -> None:
    run = changed(viewed_run, tmp_path / "run", lambda lines: [])
    expect(look(written(tmp_path / "view.html", run)).get_by_test_id("empty")).to_contain_text("No traces yet")


def test_lines_that_could_not_be_read_are_told_in_a_banner(look: Open, viewed_run: Path, tmp_path: Path) -> None:
    run = changed(viewed_run, tmp_path / "run", lambda lines: lines[:2])
    with (run / "traces.jsonl").open("a") as file:
        file.write('{"step": 2, "group": {"prob\n')
    page = look(written(tmp_path / "view.html", run))
    expect(page.get_by_test_id("notes")).to_contain_text("traces.jsonl")
    expect(page.get_by_test_id("notes")).to_contain_text("line 3")


# --- filters

FILTERED: Mapping[str, tuple[dict[str, str], Callable[[int, Trace], bool]]] = {
    "solved": ({"filter-reward": "solved"}, lambda step, trace: trace.reward >= 1),
    "not solved": ({"filter-reward": "unsolved"}, lambda step, trace: trace.reward <= 0),
    "partly": ({"filter-reward": "partly"}, lambda step, trace: 0 < trace.reward < 1),
    "with agents": ({"filter-help": "with"}, lambda step, trace: trace.with_agents),
    "alone": ({"filter-help": "alone"}, lambda step, trace: not trace.with_agents),
    "done": ({"filter-status": "done"}, lambda step, trace: trace.status == "done"),
    "knowledge": ({"filter-agent": "=knowledge"}, lambda step, trace: "knowledge" in trace.path),
    "nobody": ({"filter-agent": "none"}, lambda step, trace: set(trace.path) == {"policy"}),
    "steps 2 to 3": ({"step-from": "2", "step-to": "3"}, lambda step, trace: 2 <= step <= 3),
    "solved with agents at step 1": (
        {"filter-reward": "solved", "filter-help": "with", "step-to": "1"},
        lambda step, trace: trace.reward >= 1 and trace.with_agents and step == 1,
    ),
}


def test_each_filter_leaves_what_the_file_says(look: Open, page_of_run: Path, logged: list[LoggedGroup]) -> None:
    page = look(page_of_run)
    count = page.get_by_test_id("count")
    for name, (chosen, keeps) in FILTERED.items():
        for testid, value in chosen.items():
            control = page.get_by_test_id(testid)
            if testid.startswith("filter"):
                control.select_option(value)
            else:
                control.fill(value)
                control.press("Enter")
        left = sum(keeps(step, trace) for step, trace in traces_of(logged))
        expect(count, name).to_have_text(re.compile(rf"^{left} of"))
        page.get_by_test_id("clear").click()
        expect(count, f"{name}, cleared").to_have_text(re.compile(rf"^{len(traces_of(logged))} of"))


def test_search_by_problem_measures_its_filtering(look: Open, page_of_run: Path, logged: list[LoggedGroup]) -> None:
    page = look(page_of_run)
    question = logged[-1].group.problem.question
    page.get_by_test_id("filter-text").fill(question.lower())
    expect(page.locator(".row-name").first).to_have_text(question)
    page.evaluate("performance.clearMeasures('filter')")
    wanted = logged[-1].group.problem.id
    page.get_by_test_id("filter-text").fill(wanted.upper())
    left = sum(wanted in line.group.problem.id for line in logged for _ in line.group.traces)
    expect(page.get_by_test_id("count")).to_have_text(re.compile(rf"^{left} of"))
    assert page.evaluate("performance.getEntriesByName('filter').length") == 1
    page.get_by_test_id("filter-text").fill("no such problem")
    expect(page.locator(".list-empty")).to_be_visible()


# --- one trace

NUMBERS = {"log p, learner": "logprobs", "ratio": "ratios", "coefficient": "coefficients", "advantage": "advantages"}


def first_token(trace: Trace, source: str) -> tuple[int, int]:
    """Of the last segment of a source: its place, and that of its first token in the trace."""
    place = max(index for index, segment in enumerate(trace.segments) if segment.source == source)
    return place, sum(len(segment.token_ids) for segment in trace.segments[:place])


def number(text: str) -> float | None:
    return None if text == "–" else float(text.replace("−", "-"))


def tooltip(page: Page) -> dict[str, str]:
    box = page.get_by_test_id("tooltip")
    return dict(zip(box.locator("dt").all_text_contents(), box.locator("dd").all_text_contents(), strict=True))


@pytest.mark.parametrize("source", ["policy", "agent"])
def test_a_tokens_numbers_are_those_of_the_file(look: Open, page_of_run: Path, logged: list[LoggedGroup], source: str) -> None:
    group, member, learned = next(
        (g, m, learned)
        for g, line in enumerate(logged)
        for m, learned in enumerate(line.learned)
        if learned and line.group.traces[m].with_agents and any(learned.advantages)
    )
    trace = logged[group].group.traces[member]
    place, start = first_token(trace, source)
    page = look(page_of_run, f"trace=0.{group}.{member}")
    page.locator(f'.token[data-segment="{place}"]').first.hover()
    told = tooltip(page)
    for name, column in NUMBERS.items():
        value = getattr(learned, column)[start]
        assert number(told[name]) == (None if value is None else pytest.approx(value, rel=6e-3)), name
    behaviour = trace.segments[place].logprobs
    assert number(told["log p, sampler"]) == (None if behaviour is None else pytest.approx(behaviour[0], rel=6e-3))
    assert told["version"] == (str(trace.segments[place].version) if source == "policy" else "–")
    page.keyboard.press("Escape")


def test_the_switch_colours_policy_and_agent_tokens_and_leaves_context_plain(
    look: Open, page_of_run: Path, logged: list[LoggedGroup]
) -> None:
    group, member = next((g, m) for g, line in enumerate(logged) for m, t in enumerate(line.group.traces) if t.with_agents and t.reward)
    trace = logged[group].group.traces[member]
    page = look(page_of_run, f"trace=0.{group}.{member}")
    expect(page.get_by_test_id("trace")).to_be_visible()
    colours: dict[str, set[tuple[str, ...]]] = {source: set() for source in ("policy", "agent", "context")}
    for switch in SWITCHES:
        page.locator(f'[data-choice="{switch}"]').click()
        expect(page.locator(f'[data-choice="{switch}"]')).to_have_attribute("aria-checked", "true")
        for source in colours:
            place, _ = first_token(trace, source)
            tokens = page.locator(f'.token[data-segment="{place}"]')
            colours[source].add(tuple(tokens.evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")))
        assert page.get_by_test_id("legend").inner_text().strip()
    assert len(colours["policy"]) >= 3
    assert len(colours["agent"]) >= 3
    assert {colour for row in colours["context"] for colour in row} == {"rgba(0, 0, 0, 0)"}


def test_tokens_that_nothing_is_learned_from_look_and_are_told_so(
    look: Open, page_of_two: Path, other_run: Path, logged: list[LoggedGroup]
) -> None:
    masked = read_traces(other_run / "traces.jsonl")[0]
    places = ((g, m, t, line.learned[m]) for g, line in enumerate(masked) for m, t in enumerate(line.group.traces))
    group, member, trace = next((g, m, t) for g, m, t, learned in places if learned and t.with_agents and any(learned.advantages))
    page = look(page_of_two, f"run=1&trace=1.{group}.{member}&colour=coefficient")
    for source, hatched in (("agent", True), ("policy", False), ("context", False)):
        token = page.locator(f'.token[data-segment="{first_token(trace, source)[0]}"]').first
        assert ("gradient" in token.evaluate("token => getComputedStyle(token).backgroundImage")) == hatched, source
    assert page.get_by_test_id("no-colours").count() == 0
    lines = ((g, m, learned) for g, line in enumerate(logged) for m, learned in enumerate(line.learned))
    group, member = next((g, m) for g, m, learned in lines if learned and 0 in learned.advantages)
    page.evaluate("key => { location.hash = `trace=${key}&colour=coefficient`; }", f"0.{group}.{member}")
    expect(page.get_by_test_id("no-colours")).to_contain_text("advantage of this trace is 0")


def test_the_graph_counts_the_visits_of_the_path_and_steps_through_it(look: Open, page_of_run: Path, logged: list[LoggedGroup]) -> None:
    group, member = next((g, m) for g, line in enumerate(logged) for m, t in enumerate(line.group.traces) if len(t.path) > 3)
    path = logged[group].group.traces[member].path
    page = look(page_of_run, f"trace=0.{group}.{member}")
    graph = page.get_by_test_id("graph")
    for name in set(path):
        expect(graph.locator(f'[data-node="{name}"] .visits')).to_have_text(f"×{path.count(name)}")
    assert graph.locator('.edge.taken[data-source="__start__"]').count() == graph.locator('.edge.taken[data-target="__end__"]').count() == 1
    page.get_by_test_id("path-step").fill("1")
    expect(graph.locator(".node.active")).to_have_attribute("data-node", path[1])
    expect(page.locator(".turn.lit .turn-name")).to_have_text(path[1])
    assert graph.locator('.edge.taken[data-target="__end__"]').count() == 0
    page.locator('[data-choice="left"]').click()
    everyone = sum(trace.path.count(path[1]) for _, trace in traces_of(logged))
    expect(graph.locator(f'[data-node="{path[1]}"] .visits')).to_have_text(f"×{everyone}")
    graph.locator(f'[data-node="{path[1]}"]').hover()
    expect(page.locator(".turn.lit")).to_have_count(path.count(path[1]))


def test_a_failure_is_found_by_its_chip_and_told_with_its_reason(look: Open, viewed_run: Path, tmp_path: Path) -> None:
    def fail(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        lines[3]["group"]["traces"][1] |= {"status": "failed", "error": "AgentError: knowledge gave no answer after 3 attempts"}
        lines[3]["learned"][1] = None
        return lines

    page = look(written(tmp_path / "view.html", changed(viewed_run, tmp_path / "run", fail)))
    page.get_by_test_id("filter-failures").click()
    expect(page.get_by_test_id("count")).to_have_text(re.compile(r"^1 of"))
    expect(page.get_by_test_id("trace-row")).to_contain_text("AgentError: knowledge")
    expect(page.get_by_test_id("reason")).to_have_text("AgentError: knowledge gave no answer after 3 attempts")
    assert page.get_by_test_id("graph").locator('.edge.taken[data-target="__end__"]').count() == 0


# --- groups and comparisons


def test_the_group_view_shows_the_siblings(look: Open, page_of_run: Path, logged: list[LoggedGroup]) -> None:
    page = look(page_of_run, "trace=0.2.1")
    page.get_by_role("radio", name="Group", exact=True).click()
    cards = page.get_by_test_id("trace-card")
    traces = logged[2].group.traces
    expect(cards).to_have_count(len(traces))
    for index, trace in enumerate(traces):
        expect(cards.nth(index)).to_contain_text("with agents" if trace.with_agents else "alone")
        assert "".join(cards.nth(index).locator(".token").all_text_contents()) == "".join(s.text for s in trace.segments)
    visits = sum(trace.path.count("policy") for trace in traces)
    expect(page.get_by_test_id("graph").locator('[data-node="policy"] .visits')).to_have_text(f"×{visits}")
    cards.nth(3).get_by_role("button", name="#4").click()
    expect(page.get_by_test_id("trace")).to_have_attribute("data-key", "0.2.3")


def test_a_problem_is_compared_at_two_steps(look: Open, viewed_run: Path, tmp_path: Path) -> None:
    def again(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*lines, {**lines[0], "step": 9}]

    page = look(written(tmp_path / "view.html", changed(viewed_run, tmp_path / "run", again)), "trace=0.0.1")
    page.get_by_test_id("pin").click()
    expect(page.get_by_test_id("compare-a")).to_contain_text("step 1")
    expect(page.get_by_test_id("compare-b").locator(".trace-card")).to_contain_text("step 9")
    assert page.get_by_test_id("compare-problem").locator("option").count() == 1
    page.get_by_role("combobox", name="trace B").select_option("0.0.3")
    expect(page.get_by_test_id("compare-b").locator(".trace-card")).to_have_attribute("data-key", "0.0.3")


def test_a_problem_is_compared_in_two_runs(look: Open, page_of_two: Path, logged: list[LoggedGroup]) -> None:
    page = look(page_of_two, "view=compare&a=0.1.0&b=1.1.2")
    expect(page.get_by_test_id("compare-a").locator(".trace-card")).to_have_attribute("data-key", "0.1.0")
    expect(page.get_by_test_id("compare-b").locator(".trace-card")).to_have_attribute("data-key", "1.1.2")
    assert page.get_by_test_id("different-questions").count() == 0
    wanted = logged[5].group.problem.id
    page.get_by_test_id("compare-problem").select_option(wanted)
    expect(page.get_by_test_id("compare-a").locator(".trace-card")).to_have_attribute("data-key", re.compile(r"^0\.5\."))
    expect(page.get_by_test_id("compare-b").locator(".trace-card")).to_have_attribute("data-key", re.compile(r"^1\.5\."))
    page.get_by_test_id("tab-settings").click()
    expect(page.get_by_test_id("settings").locator("tr.differs", has_text="mask").first).to_be_visible()
    expect(page.get_by_test_id("settings").locator("tr.differs th", has_text=re.compile("^agent$"))).to_be_visible()


def test_two_runs_open_on_a_pair_that_ended_differently(look: Open, viewed_run: Path, tmp_path: Path) -> None:
    def worse(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """All alone traces fail in both runs, but for one."""
        for line in lines:
            for one in line["group"]["traces"]:
                one["scores"]["reward"] *= one["with_agents"]
        return lines

    def better(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        alone = next(i for i, one in enumerate(lines[3]["group"]["traces"]) if not one["with_agents"])
        worse(lines)[3]["group"]["traces"][alone]["scores"]["reward"] = 1.0
        return lines

    one, two = changed(viewed_run, tmp_path / "one", better), changed(viewed_run, tmp_path / "two", worse)
    page = look(written(tmp_path / "view.html", one, two))
    page.get_by_role("radio", name="Compare", exact=True).click()
    first, second = (page.get_by_test_id(f"compare-{side}").locator(".trace-card") for side in "ab")
    expect(first).to_have_attribute("data-key", re.compile(r"^0\.3\."))
    expect(second).to_have_attribute("data-key", re.compile(r"^1\.3\."))
    expect(first.locator(".mark")).to_have_class("mark solved")
    expect(second.locator(".mark")).to_have_class("mark unsolved")


def test_where_nothing_can_be_compared_it_says_so(look: Open, page_of_run: Path) -> None:
    page = look(page_of_run, "view=compare")
    expect(page.get_by_test_id("nothing-shared")).to_be_visible()
    expect(page.get_by_test_id("trace-card")).to_have_count(2)


# --- chats


ASKED = "<|im_start|>system\nUse the tool.<|im_end|>\n<|im_start|>user\n6*7?<|im_end|>\n<|im_start|>assistant\n"
CALLED = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call><|im_end|>'
TOLD = "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_is_shown_by_message_and_says_nothing_of_agents(look: Open, tmp_path: Path) -> None:
    parts = (("context", "model", ASKED), ("policy", "model", CALLED), ("context", "calculator", TOLD), ("policy", "model", "42<|im_end|>"))
    segments = tuple(Segment(source, author, (1,), text, (-0.5,) if source == "policy" else None) for source, author, text in parts)
    trace = Trace("p", 1, True, segments, ("model", "tools", "model"), "done", {"reward": 1.0})
    metrics = {"reward": 1.0, "reward/with_agents": 1.0, "leaks": 0.0, "violations": 0.0, "entropy": 0.1, "length/with_agents": 9.0}
    sections = {"run": {"dir": str(tmp_path), "name": "chat", "trackers": []}, "agents": {"use": {}}}
    with RunLog(Config.model_validate(sections), Console(quiet=True)) as log:
        log.write("graph.json", picture(open_graph("examples/calculator/graph.py:build").get_graph(), frozenset()))
        log.step(1, metrics, [TraceGroup(Problem("p", "6*7?", "42"), (trace, trace))], [(None, None)])
    page = look(written(tmp_path / "view.html", tmp_path / "chat"))
    page.get_by_test_id("tokens").wait_for()
    assert page.locator(".turn-name").all_inner_texts() == ["system", "user", "model", "calculator", "model"]
    kinds = [str(names).split()[1] for names in page.locator(".turn").evaluate_all("turns => turns.map(one => one.className)")]
    assert kinds == ["context", "context", "policy", "tool", "policy"]
    assert "".join(page.locator(".token").all_text_contents()).replace("↵", "") == ASKED + CALLED + TOLD + "42<|im_end|>"
    expect(page.locator('[data-node="tools"]')).to_have_class("node tool taken")
    for tab in ("traces", "dashboard"):
        page.get_by_test_id(f"tab-{tab}").click()
        for help_ in page.locator(".help").all():
            help_.click()
        said = page.locator("#panel").inner_text().lower().replace("agent</", "")
        assert "consult" not in said
        assert "agents" not in said


def test_on_a_phone_the_trace_comes_first_after_a_tap(look: Open, page_of_run: Path, logged: list[LoggedGroup]) -> None:
    page = look(page_of_run, width=390)
    page.get_by_test_id("trace-row").nth(2).click()
    expect(page.get_by_test_id("trace")).to_have_attribute("data-key", "0.0.2")
    box = page.get_by_test_id("tokens").bounding_box()
    assert box is not None
    assert 0 < box["y"] < 450
    assert box["y"] < page.get_by_test_id("graph").bounding_box()["y"]  # type: ignore[index]


# --- keyboard and address


def test_the_keyboard_does_it_all(look: Open, page_of_run: Path) -> None:
    page = look(page_of_run)
    trace = page.get_by_test_id("trace")
    expect(trace).to_have_attribute("data-key", "0.0.0")
    for keys, key in (("jj", "0.0.2"), ("k", "0.0.1")):
        for pressed in keys:
            page.keyboard.press(pressed)
        expect(trace).to_have_attribute("data-key", key)
    page.keyboard.press("ArrowDown")
    expect(trace).to_have_attribute("data-key", "0.0.2")
    page.keyboard.press("c")
    expect(page.locator('[data-choice="logprob"]')).to_have_attribute("aria-checked", "true")
    page.keyboard.press("g")
    expect(page.get_by_test_id("trace-card")).to_have_count(4)
    page.keyboard.press("g")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("next, previous trace")
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(trace).to_have_attribute("data-key", "0.0.2")
    page.keyboard.press("/")
    page.keyboard.type("train-1")
    expect(page.get_by_test_id("filter-text")).to_have_value("train-1")
    page.keyboard.press("Escape")
    page.get_by_test_id("clear").press("Enter")
    expect(page.locator(".list")).to_be_focused()
    page.get_by_role("radio", name="log p").press("ArrowRight")
    expect(page.get_by_role("radio", name="ratio")).to_be_focused()
    expect(page.get_by_role("radio", name="ratio")).to_be_checked()
    page.get_by_test_id("tokens").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token:focus")).to_have_attribute("data-index", "1")
    expect(page.get_by_test_id("tooltip")).to_be_visible()
    expect(page.locator(".token:focus")).to_have_attribute("aria-describedby", "token-numbers")
    page.get_by_test_id("tab-traces").press("ArrowRight")
    expect(page.get_by_test_id("tab-dashboard")).to_be_focused()
    expect(page.get_by_test_id("dashboard")).to_be_visible()


def test_a_link_brings_all_of_it_back(look: Open, page_of_run: Path) -> None:
    page = look(page_of_run)
    page.get_by_test_id("filter-help").select_option("with")
    page.get_by_test_id("step-from").fill("2")
    page.get_by_test_id("step-from").press("Enter")
    page.locator('[data-choice="ratio"]').click()
    page.get_by_test_id("trace-row").nth(2).click()
    page.get_by_role("radio", name="Group", exact=True).click()
    page.wait_for_function("location.hash.includes('group') && location.hash.includes('ratio')")
    fragment, count = page.url.partition("#")[2], page.get_by_test_id("count").inner_text()
    heading = page.get_by_test_id("group").locator("h2").inner_text()
    again = look(page_of_run, fragment)
    expect(again.get_by_test_id("group").locator("h2")).to_have_text(heading)
    expect(again.get_by_test_id("count")).to_have_text(count)
    expect(again.locator('[data-choice="ratio"]')).to_have_attribute("aria-checked", "true")
    page.go_back()
    expect(page.get_by_test_id("trace")).to_be_visible()


def test_steps_the_wrong_way_round_and_a_nonsensical_link_do_no_harm(look: Open, page_of_run: Path) -> None:
    page = look(page_of_run)
    whole = page.get_by_test_id("count").inner_text()
    for testid, value, shows in (("step-from", "3", ["3", "4"]), ("step-to", "2", ["2", "2"]), ("step-to", "999", ["2", "4"])):
        page.get_by_test_id(testid).fill(value)
        page.get_by_test_id(testid).press("Enter")
        expect(page.get_by_test_id("step-from")).to_have_value(shows[0])
        expect(page.get_by_test_id("step-to")).to_have_value(shows[1])
    nonsense = "view=constructor&colour=__proto__&graph=toString&order=valueOf&run=-1&from=x&to=1e9&trace=__proto__"
    page.evaluate("fragment => { location.hash = fragment; }", nonsense)
    expect(page.get_by_test_id("count")).to_have_text(whole)
    expect(page.get_by_test_id("trace")).to_be_visible()
    checked = page.get_by_role("radio", checked=True)
    assert checked.all_inner_texts() == ["Trace", "source", "this trace"]


# --- how it looks

CONTRAST = """(elements) => {
  const parse = (css) => (css.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const css = parse(getComputedStyle(at).backgroundColor);
      if (css.length === 3 || css[3] === 1) return css;
    }
    return [255, 255, 255];
  };
  return elements.filter((element) => element.checkVisibility() && !element.disabled).map((element) => {
    const [one, two] = [light(parse(getComputedStyle(element).color)), light(ground(element))].sort((a, b) => b - a);
    return [element.className + " " + element.textContent.slice(0, 30), (one + 0.05) / (two + 0.05)];
  });
}"""
TEXTS = (
    "h1, h2, .tag, .row-name, .row-more, .row-more span, .row-numbers div, .facts dt, .facts dd, .token, .turn-name, .swatch, .muted, "
    ".switch button, .tabs button, .button, .choice span, .state, .count, .card-facts dt, .card-facts dd, .mark, "
    ".sections th, .sections td, .unseen"
)
SIGHTS = {
    "": "trace",
    "colour=logprob": "trace",
    "colour=ratio": "trace",
    "view=group&colour=advantage": "group",
    "view=compare&colour=coefficient": "compare-b",
    "tab=settings": "settings",
    "tab=dashboard": "dashboard",
}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_is_readable_and_nothing_is_wider_than_a_phone(look: Open, page_of_run: Path, dark: bool) -> None:
    page = look(page_of_run, width=400, dark=dark)
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    for fragment, sight in SIGHTS.items():
        page.evaluate("fragment => { location.hash = fragment; }", fragment)
        expect(page.get_by_test_id(sight).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, fragment
        found = page.locator(TEXTS).evaluate_all(CONTRAST)
        assert len(found) > 5
        assert [(fragment, text, round(ratio, 2)) for text, ratio in found if ratio < 4.5] == []


def test_the_theme_can_be_chosen(look: Open, page_of_run: Path) -> None:
    page = look(page_of_run, dark=True)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_test_id("theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


# --- hostile texts

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)><svg/onload=alert(3)>",
    "</script><script>window.ran = 1</script><!--",
    '"><a href="javascript:alert(4)">click</a><style>*{display:none}</style>',
    "\u202egnirts desrever\u202c \u2066isolated\u2069 \u200e\u200f\u061c",
    "null \x00 bell \x07 escape \x1b[31m delete \x7f c1 \x9b",
    "zero\u200bwidth\ufeff joined\u200d hidden\u00ad tag\U000e0041",
    "e" + "\u0301" * 40,
    "x" * 1_000_000,
    "&lt;b&gt; &amp; ${1+1} {{7*7}} __proto__ constructor",
)


def hostile(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    evil = "".join(HOSTILE[:3])
    problem = lines[0]["group"]["problem"]
    problem |= {"id": f"p{evil}", "question": evil + HOSTILE[3], "answer": evil, "kind": evil}
    for trace in lines[0]["group"]["traces"]:
        trace |= {"problem_id": problem["id"], "scores": {**trace["scores"], evil: 1.0}}
    first = lines[0]["group"]["traces"][0]
    first |= {"status": "failed", "error": evil}
    policy = [segment for segment in first["segments"] if segment["source"] != "context"]
    for segment, text in zip(policy, HOSTILE, strict=False):
        segment["text"] = text
    assert len(policy) >= len(HOSTILE)
    policy[1]["author"] = policy[1]["thread"] = evil
    return lines


@pytest.mark.slow
def test_hostile_texts_are_shown_as_text(look: Open, viewed_run: Path, tmp_path: Path) -> None:
    page = look(written(tmp_path / "view.html", changed(viewed_run, tmp_path / "run", hostile)))
    expect(page.get_by_test_id("trace")).to_be_visible()
    segments = page.locator(".segment.policy, .segment.agent")
    shown_texts = segments.all_text_contents()
    for hostile_text in (*HOSTILE[:3], HOSTILE[8]):
        assert any(hostile_text in text for text in shown_texts), hostile_text
    text = "".join(shown_texts)
    for escape in (r"\u202e", r"\u2066", r"\u200f", r"\x00", r"\x1b", r"\x9b", r"\u200b", r"\ufeff", r"\U000e0041"):
        assert escape in text, escape
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00]", page.locator("body").inner_text())
    more = page.get_by_role("button", name="show all 1,000,000 characters")
    assert len(text) < 20_000
    more.click()
    expect(page.get_by_role("button", name="show less")).to_be_visible()
    assert page.locator(".tokens").evaluate("tokens => tokens.textContent.includes('x'.repeat(1_000_000))")
    page.get_by_role("button", name="show less").click()
    page.locator(".token").nth(2).hover()
    for fragment in ("view=group", "view=compare", "tab=settings", "tab=dashboard", "graph=left"):
        page.evaluate("fragment => { location.hash = fragment; }", fragment)
        page.wait_for_timeout(150)
    assert page.evaluate("[window.ran, document.querySelectorAll('#app img, #app a, #app style, #app script').length]") == [None, 0]


def test_the_policy_refuses_scripts_and_requests_that_are_not_the_pages_own(look: Open, page_of_run: Path) -> None:
    page = look(page_of_run)
    expect(page.get_by_test_id("trace")).to_be_visible()
    refused = page.evaluate(
        """async () => {
          const refused = [];
          document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
          const script = document.createElement("script");
          script.textContent = "window.ran = 1";
          document.body.append(script);
          const box = document.createElement("div");
          box.setAttribute("onclick", "window.ran = 1");
          document.body.append(box);
          box.click();
          box.setAttribute("style", "color: red");
          await fetch("https://example.org/").catch(() => undefined);
          await new Promise((done) => setTimeout(done, 100));
          return [window.ran ?? null, refused];
        }"""
    )
    assert refused[0] is None
    assert {"script-src-elem", "script-src-attr", "style-src-attr", "connect-src"} <= set(refused[1])
    look.faults.clear()  # type: ignore[attr-defined]  # the browser logs each refusal


# --- live


@pytest.mark.slow
def test_a_live_run_is_followed_without_losing_the_place(chromium: Browser, viewed_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "graph.json"):
        copy(viewed_run / name, run / name)
    lines = (viewed_run / "traces.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "traces.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    errors: list[str] = []
    with Started("aipo_graph.view", [str(run), "--serve", "--no-open", "--port", "0"], run) as server:
        url = server.wait_for(r"http://[\d.:]+/")
        page = chromium.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"{url}#trace=0.1.2&colour=ratio")
        expect(page.get_by_test_id("count")).to_contain_text("of 16 traces")
        with (run / "traces.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(lines[4:8]))
        expect(page.get_by_test_id("count")).to_contain_text("of 32 traces", timeout=15000)
        expect(page.get_by_test_id("trace")).to_have_attribute("data-key", "0.1.2")
        page.get_by_test_id("follow").click()
        expect(page.get_by_test_id("trace")).to_have_attribute("data-key", "0.7.0")
        with (run / "traces.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(lines[8:12]))
        expect(page.get_by_test_id("trace")).to_have_attribute("data-key", "0.11.0", timeout=15000)
        assert errors == []
    expect(page.locator("h1")).to_contain_text("connection lost", timeout=15000)
    page.close()
