"""The demo's page: the shipped policy behind a real server on loopback, in a real Chromium."""

import asyncio
import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp.test_utils import TestServer
from playwright.sync_api import Browser, Page, expect
from rollout_world import bpe, save_tiny
from started import Started

from aipo_graph import cli
from aipo_graph.demo import settings
from aipo_graph.demo.__main__ import command
from aipo_graph.demo.web import Server
from aipo_graph.engines.local import LocalEngine
from aipo_graph.rollout import Agent
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.tasks.open import open_task

QUESTION = "%6475IEB?"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202etxet\u202c"
Open = Callable[..., Page]
expect.set_options(timeout=20_000)


def hang(started: threading.Event) -> Agent:
    async def never(claim: str) -> str:
        """Does not come back."""
        started.set()
        await asyncio.Event().wait()
        return ""

    return Agent("verify", tools=(never,))


def broken(name: str, message: str) -> Agent:
    async def fail(query: str) -> str:
        """Is down."""
        raise PermissionError(message)

    return Agent(name, tools=(fail,))


def says(text: str) -> Agent:
    async def reply(query: str) -> str:
        """Says the same to everybody."""
        return text

    return Agent("knowledge", tools=(reply,))


def main(*args: str) -> int:
    """The command, in a thread: Playwright's event loop runs in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(cli.main, command, list(args)).result()


@contextmanager
def served(*args: str, agents: Mapping[str, Agent] | None = None) -> Iterator[str]:
    """The page's URL, from a server in a thread of its own."""
    model = args if args and not args[0].startswith("-") else ("operators", *args)
    demo = settings([*model, "--web"])
    ended, started, found = asyncio.Event(), threading.Event(), []

    async def run() -> None:
        rollouts = Rollouts.open(demo, LocalEngine.load(demo, demo.policy.model), open_task(demo))
        rollouts = replace(rollouts, agents={**rollouts.agents, **(agents or {})})
        server = TestServer(Server(demo, rollouts).app())
        await server.start_server()
        found.extend([str(server.make_url("/")), asyncio.get_running_loop()])
        started.set()
        await ended.wait()
        await server.close()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert started.wait(60)
    try:
        yield found[0]
    finally:
        found[1].call_soon_threadsafe(ended.set)
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def hanging() -> Iterator[tuple[str, threading.Event]]:
    """The URL of a page whose agent `verify` does not come back, and the event that it was asked."""
    asked = threading.Event()
    with served(agents={"verify": hang(asked)}) as found:
        yield found, asked


@pytest.fixture
def opened(chromium: Browser) -> Iterator[Open]:
    """Opens a page; in the end none of them may have shown a dialog, asked another server, or written to the console."""
    contexts, wrong = [], []

    def open_page(url: str, *, allow: str = "", **options: Any) -> Page:
        contexts.append(chromium.new_context(**{"reduced_motion": "reduce", **options}))
        page = contexts[-1].new_page()
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("pageerror", lambda error: wrong.append(f"error {error}"))
        page.on("console", lambda line: (allow and allow in line.text) or wrong.append(f"console {line.text}"))
        page.on("request", lambda sent: sent.url.startswith(url.partition("#")[0]) or wrong.append(f"request {sent.url}"))
        page.goto(url)
        expect(page.get_by_test_id("ask")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def ask(page: Page, question: str, **fields: str) -> None:
    page.get_by_test_id("question").fill(question)
    for name, value in fields.items():
        page.get_by_test_id(name).fill(value)
    page.get_by_test_id("question").press("Enter")


def ask_and_hang(page: Page, asked: threading.Event) -> None:
    """Asks a question, and waits until its trace alone has ended and the one with agents waits for an agent that does not come back."""
    asked.clear()
    ask(page, QUESTION, temperature="0")
    assert asked.wait(30)
    expect(page.get_by_test_id("side-alone")).to_have_attribute("data-state", "wrong")


def finished(page: Page) -> None:
    expect(page.locator("[data-testid=result][data-running=false]")).to_be_visible()


def send(url: str, path: str, body: str | None = None, **headers: str) -> tuple[int, str]:
    """The status and the text of an answer. With a body it is a POST as the page makes it, but for the ``headers``."""
    host = urlsplit(url).netloc
    connection = http.client.HTTPConnection(host, timeout=60)
    usual = {"Content-Type": "application/json", "Origin": f"http://{host}"} if body is not None else {}
    given = {**usual, **{name.replace("_", "-"): value for name, value in headers.items()}}
    connection.request("GET" if body is None else "POST", path, body, {name: value for name, value in given.items() if value})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(event.removeprefix("data: ")) for event in text.strip().split("\n\n")]


def history(url: str) -> list[dict[str, Any]]:
    return json.loads(send(url, "/history")[1])


def traces_of(url: str, count: int, place: int = 0) -> list[dict[str, Any]]:
    """The stored traces of a question in the history, once there are so many."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if asked := history(url):
            traces = json.loads(send(url, f"/thread?id={asked[place]['thread']}")[1])["traces"]
            if len(traces) == count:
                return traces
        time.sleep(0.05)
    raise AssertionError(f"not {count} traces")


def test_both_sides_stream_and_the_nodes_light_up(url: str, opened: Open) -> None:
    page = opened(url, reduced_motion="no-preference")
    # Every node that is lit at any time, and how many segments each side showed while it was still running.
    page.evaluate(
        """() => {
          window.seen = { lit: new Set(), growing: new Set() };
          new MutationObserver(() => {
            for (const node of document.querySelectorAll("[data-testid=side-with_agents] .node.active")) seen.lit.add(node.dataset.node);
            const running = document.querySelector("[data-testid=side-with_agents][data-state=running]");
            if (running) seen.growing.add(running.querySelectorAll(".segment").length);
          }).observe(document.body, { subtree: true, childList: true, attributes: true });
        }"""
    )
    ask(page, QUESTION, temperature="0")
    expect(page.get_by_test_id("stop")).to_be_visible()
    finished(page)
    expect(page.get_by_test_id("side-alone")).to_have_attribute("data-state", "wrong")
    helped = page.get_by_test_id("side-with_agents")
    expect(helped).to_have_attribute("data-state", "right")
    assert set(page.evaluate("[...seen.lit]")) == {"policy", "knowledge", "reasoning", "verify"}
    assert len(page.evaluate("[...seen.growing]")) > 3
    expect(helped.locator(".segment.agent", has_text="3B2E1I")).to_have_count(1)
    expect(page.get_by_test_id("said")).to_contain_text("With agents 8545, right")
    # Feedback that the policy wrote itself stands in lines of its own, as an agent's does.
    alone = page.get_by_test_id("side-alone").locator(".turn.policy .turn-text").all_inner_texts()
    assert len(alone) > 5
    assert [line.startswith("<feedback>") for line in alone[:4]] == [False, True, False, True]
    stored = traces_of(url, 2)[0]["segments"][-1]
    assert "".join(alone).replace("\u200b", "") == "".join(stored["tokens"])
    expect(page.get_by_test_id("ask")).to_be_visible()
    page.locator("[data-choice=logprob]").click()
    assert helped.locator(".token.seq-0").count() > 10


def test_four_samples_vote_and_the_right_answer_is_marked(url: str, opened: Open) -> None:
    page = opened(url, viewport={"width": 400, "height": 800})
    ask(page, QUESTION, samples="4")
    finished(page)
    helped = page.get_by_test_id("side-with_agents")
    assert sum(int(text.split()[0]) for text in helped.locator(".vote .count").all_inner_texts()) == 4
    expect(helped.locator(".vote.right .answer")).to_have_text("8545")
    expect(page.get_by_test_id("side-alone").locator(".vote.right")).to_have_count(0)
    expect(helped.get_by_test_id("badge")).to_have_text("vote: ✓ right")
    expect(page.get_by_test_id("side-alone").get_by_test_id("badge")).to_have_text(re.compile("^vote: (✗ wrong|= tied)$"))
    expect(page.get_by_test_id("notation")).to_contain_text("@ from left to right")
    expect(page.get_by_test_id("said")).to_contain_text("With agents 4 of 4 right; the vote goes to 8545")
    expect(page.get_by_test_id("side-alone").locator(".chip")).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth") == 400


def test_the_page_shows_what_the_terminal_shows(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = events(send(url, "/ask", json.dumps({"question": QUESTION, "mode": "alone", "samples": 2, "seed": 7}))[1])
    answers = [event["trace"]["answer"] for event in told if event["event"] == "trace"]
    assert main("operators", QUESTION, "--alone", "--samples", "2", "--seed", "7") == 0
    shown = capsys.readouterr().out
    assert len(answers) == 2
    assert all(f"answer {answer};" in shown for answer in answers)


def test_a_sample_problem_is_held_out_and_of_its_kind(url: str, opened: Open) -> None:
    page = opened(url)
    page.get_by_test_id("kind").select_option("easy")
    page.get_by_test_id("sample").click()
    expect(page.get_by_test_id("question")).not_to_have_value("")
    drawn = page.get_by_test_id("question").input_value()
    demo = settings(["operators"])
    assert drawn in {problem.question for problem in open_task(demo).heldout(256, "easy")}


def test_a_first_visitor_has_an_example_and_the_keyboard(url: str, opened: Open) -> None:
    page = opened(url)
    page.locator("[data-choice=both]").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("[data-choice=alone]")).to_be_focused()
    expect(page.locator("[data-choice=alone]")).to_have_attribute("aria-checked", "true")
    page.keyboard.press("Shift+Tab")  # the group is one stop of the tab key
    expect(page.get_by_test_id("kind")).to_be_focused()
    page.get_by_test_id("example").click()
    finished(page)
    assert page.get_by_test_id("question").input_value() == json.loads(send(url, "/about")[1])["example"]
    expect(page.get_by_test_id("side-alone").locator(".turn.policy").first).to_be_visible()
    expect(page.get_by_test_id("side-with_agents")).to_have_count(0)


def test_stop_ends_the_runs_and_keeps_what_was_made(hanging: tuple[str, threading.Event], opened: Open) -> None:
    url, page = hanging[0], opened(hanging[0])
    ask_and_hang(page, hanging[1])
    # What has ended is kept while the rest still runs.
    assert [trace["status"] for trace in traces_of(url, 1)] == ["done"]
    page.keyboard.press("Escape")
    finished(page)
    expect(page.get_by_test_id("side-with_agents")).to_have_attribute("data-state", "stopped")
    expect(page.get_by_test_id("side-with_agents").locator(".segment.agent").first).to_be_visible()
    done, stopped = traces_of(url, 2)
    assert (done["status"], stopped["status"], stopped["path"][-1]) == ("done", "stopped", "verify")


def test_a_closed_tab_ends_its_runs_alone(hanging: tuple[str, threading.Event], opened: Open) -> None:
    url, page = hanging[0], opened(hanging[0])
    ask_and_hang(page, hanging[1])
    page.close()
    # Another tab is served meanwhile, and afterwards the traces of the first are there.
    other = opened(url)
    other.locator("[data-choice=alone]").click()
    ask(other, "@1234A?")
    finished(other)
    assert [trace["status"] for trace in traces_of(url, 2, place=1)] == ["done", "stopped"]


def test_a_question_is_deleted_while_it_runs(hanging: tuple[str, threading.Event], opened: Open) -> None:
    url, page = hanging[0], opened(hanging[0])
    ask_and_hang(page, hanging[1])
    thread = history(url)[0]["thread"]
    assert send(url, f"/forget?id={thread}", "{}")[0] == 200
    finished(page)
    assert thread not in [asked["thread"] for asked in history(url)]
    assert send(url, f"/thread?id={thread}")[0] == 404


def test_a_second_question_stops_the_first(opened: Open) -> None:
    started = threading.Event()
    with served(agents={"verify": hang(started)}) as url:
        page = opened(url, allow="Failed to load resource")
        ask_and_hang(page, started)
        ask(page, "hello")
        expect(page.get_by_test_id("error")).to_contain_text("does not know")
        expect(page.get_by_test_id("stop")).to_be_visible()  # what is refused stops nothing
        started.clear()
        ask(page, QUESTION, temperature="0", seed="1")
        assert started.wait(30)
        assert [trace["status"] for trace in traces_of(url, 2, place=1)] == ["done", "stopped"]


def test_earlier_questions_come_back(opened: Open) -> None:
    with served() as url:
        send(url, "/ask", json.dumps({"question": QUESTION, "samples": 2}))
        send(url, "/ask", json.dumps({"question": "@1234AB?", "mode": "alone", "temperature": 0}))
        page = opened(url)
        listed = page.get_by_test_id("history").locator(".open")
        expect(listed).to_have_count(2)
        expect(listed.first).to_contain_text("@1234AB?")
        listed.nth(1).click()
        expect(page.get_by_test_id("side-with_agents")).to_have_attribute("data-state", "right")
        expect(page.get_by_test_id("side-with_agents").locator(".segment.agent").first).to_be_visible()
        expect(page.get_by_test_id("samples")).to_have_value("2")
        page.reload()
        expect(page.get_by_test_id("side-with_agents")).to_have_attribute("data-state", "right")
        page.get_by_test_id("history").locator(".forget").nth(1).click()
        expect(listed).to_have_count(1)
        assert [asked["title"] for asked in history(url)] == ["@1234AB?"]


UNASKED = """
from langgraph.graph import END, START, StateGraph
from aipo_graph.rollout import Context, State, agent_node, policy_node

def build():
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", policy_node())
    graph.add_node("knowledge", agent_node("knowledge"))
    graph.add_edge(START, "policy")
    graph.add_edge("policy", "knowledge")
    graph.add_edge("knowledge", END)
    return graph.compile()
"""


def test_hostile_questions_and_replies_are_text(tmp_path: Path, opened: Open) -> None:
    """Nothing of it runs, and all of it is there to be read: while it streams, in the list of questions, after a reload."""
    (tmp_path / "unasked.py").write_text(UNASKED)
    model = save_tiny(tmp_path / "model", bpe())
    args = [model, "--graph", f"{tmp_path / 'unasked.py'}:build", "--rollout.max_tokens", "8", "--config", "configs/quickstart.yaml"]
    with served(*args, agents={"knowledge": says(HOSTILE)}) as url:
        page = opened(url)
        ask(page, HOSTILE)
        finished(page)
        check_hostile(page)
        page.reload()
        check_hostile(page)


def check_hostile(page: Page) -> None:
    written = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    for place in (page.locator(".asked h2"), page.get_by_test_id("history"), page.locator("[data-testid=side-with_agents] .segment.agent")):
        expect(place).to_contain_text(written)
        expect(place).to_contain_text("\\u202etxet")
    assert page.locator("main script, main img, main a").count() == 0


def test_a_helper_that_is_down_is_told_in_its_trace(opened: Open) -> None:
    with served(agents={"knowledge": broken("knowledge", "the rule book is closed")}) as url:
        page = opened(url)
        ask(page, QUESTION, temperature="0")
        finished(page)
        helped = page.get_by_test_id("side-with_agents")
        expect(helped).to_have_attribute("data-state", "failed")
        expect(helped.get_by_test_id("fault")).to_contain_text("the rule book is closed")
        expect(helped.locator(".node.taken[data-node=knowledge]")).to_be_visible()
        expect(helped.locator(".segment.agent", has_text="3B2E1I")).to_have_count(1)
        expect(page.get_by_test_id("side-alone")).to_have_attribute("data-state", "wrong")


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"question": " "}, "question", "the question is empty"),
        ({"question": "hello"}, "question", "the model's tokenizer does not know 'h e l o'"),
        ({"question": "1" * 600}, "question", "the model's context of 512 tokens"),
        ({"question": "\ud800"}, "question", "no JSON: unexpected end of hex escape"),
        ({"question": QUESTION, "samples": 17}, "samples", "must be less than or equal to 16"),
        ({"question": QUESTION, "samples": None}, "samples", "must be a valid integer"),
        ({"question": QUESTION, "temperature": -1}, "temperature", "must be greater than or equal to 0"),
        ({"question": QUESTION, "seed": 2**70}, "seed", "seed = "),
        ({"question": QUESTION, "mode": "neither"}, "mode", "'both', 'alone' or 'with_agents'"),
        ({"question": QUESTION, "model": "x"}, "question", "no setting 'model'; did you mean 'mode'?"),
        ("{", "question", "no JSON"),
        ("[" * 100_000, "question", "no JSON: recursion limit exceeded"),
        ([], "question", "must be a mapping"),
    ],
)
def test_bad_questions_are_refused_in_one_line(url: str, body: Any, field: str, says: str) -> None:
    status, text = send(url, "/ask", body if isinstance(body, str) else json.dumps(body))
    error = json.loads(text)["error"]
    assert status == 400
    assert next((name for name in ("mode", "samples", "temperature", "seed") if error.startswith(f"{name} = ")), "question") == field
    assert says in error
    assert "\n" not in error


def test_errors_are_shown_at_their_field(url: str, opened: Open) -> None:
    page = opened(url, allow="status of 400")
    ask(page, QUESTION, samples="17")
    expect(page.get_by_test_id("error")).to_contain_text("samples = 17: must be less than or equal to 16")
    expect(page.get_by_test_id("samples")).to_have_attribute("aria-invalid", "true")
    ask(page, "", samples="1")
    expect(page.get_by_test_id("question")).to_have_attribute("aria-invalid", "true")
    ask(page, QUESTION)
    finished(page)
    expect(page.get_by_test_id("error")).to_be_empty()


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/about", None, {"Host": "evil.example"}, 403),
        ("/ask", "{}", {"Host": "evil.example:80"}, 403),
        ("/ask", "{}", {"Origin": "http://evil.example"}, 403),
        ("/ask", "{}", {"Origin": ""}, 403),
        ("/stop", "{}", {"Origin": "null"}, 403),
        ("/forget", "{}", {"Origin": "null"}, 403),
        ("/forget", "{}", {"Content_Type": "text/plain"}, 415),
        ("/ask", "x" * 2_000_000, {}, 413),
        ("/thread?id=nosuch", None, {}, 404),
        (f"/thread?id={'0' * 32}", None, {}, 404),
        ("/nosuch", None, {}, 404),
        ("/sample?kind=nosuch", None, {}, 400),
    ],
)
def test_requests_of_others_are_refused(url: str, path: str, body: str | None, headers: dict[str, str], status: int) -> None:
    assert send(url, path, body, **headers)[0] == status


def test_a_policy_stands_in_header_and_page(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", "/")
    answer = connection.getresponse()
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert policy.partition("; frame-ancestors")[0] in answer.read().decode()


def test_the_policy_is_in_force(url: str, opened: Open) -> None:
    page = opened(url, allow="Content Security Policy")
    page.evaluate(
        """() => {
          window.ran = [];
          const script = document.createElement("script");
          script.text = "ran.push('script')";
          const image = document.createElement("img");
          image.setAttribute("onerror", "ran.push('handler')");
          image.src = "/nosuch.png";
          document.body.append(script, image);
          setTimeout("ran.push('eval')");
        }"""
    )
    assert page.evaluate("fetch('https://example.invalid/').then(() => 'sent', (error) => error.name)") == "TypeError"
    page.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert page.evaluate("ran") == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nosuch", "--web"], "no model 'nosuch'"),
        (["operators", "--web", "--samples", "17"], "the page shows at most 16"),
        (["operators", "--web", "--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
        (["operators", "--web", "--host", "ü" * 64], "cannot listen on üü"),
        (["operators", "--web", "--port", "99999"], "port = '99999'"),
    ],
)
def test_what_cannot_be_served_is_one_line(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(*args) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error


def test_a_port_in_use_and_a_damaged_model_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main("operators", "--web", "--port", str(port)) == 2
    (tmp_path / "config.json").write_text("{}")
    assert main(str(tmp_path), "--web", "--port", "0") == 2
    used, damaged = capsys.readouterr().err.strip().splitlines()
    assert f"port {port} (Address already in use)" in used
    assert "no model at" in damaged


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    words = ["operators", "--web", "--port", "0", "--no-open"]
    with Started("aipo_graph.demo", words, tmp_path, {"DISPLAY": "", "WAYLAND_DISPLAY": ""}) as process:
        url = process.wait_for(r"http://127\.0\.0\.1:\d+\S*(?=\s)")
        assert urlsplit(url).port not in (0, None)
        told = events(send(url, "/ask", json.dumps({"question": QUESTION, "temperature": 0}))[1])
        assert [event["event"] for event in told][-1] == "end"
        assert (process.end(signal.SIGINT), process.out.read_text().count("\n"), process.err.read_text()) == (0, 1, "")
