"""Faults of a language-model helper, short: a real HTTP server, LangChain's real client, the quick start's policy and graph.

`python benchmarks/faults.py` is the full size.
"""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.demo import __main__ as demo
from aipo_graph.errors import ConfigError
from aipo_graph.evaluate import main as evaluate
from aipo_graph.load import load


@pytest.fixture
def faults(root: Path) -> Any:
    names = ("HOSTILE", "Provider", "hostile", "opened", "outage", "rule", "settings", "shaky", "traces_of")
    return SimpleNamespace(**{name: load(f"{root}/benchmarks/faults.py:{name}") for name in names})


@pytest.mark.slow
async def test_thirty_per_cent_faults(faults: Any) -> None:
    """At least 96 % of consults answered, and no trace scored otherwise because of transport."""
    found = await faults.shaky(faults.settings(agents={"timeout": 6.0}), 48, lost=0.02, backoff=0.01)
    assert found["requests gone wrong"] >= 0.25 * found["requests"] > 30
    assert found["consults"] >= 100
    assert found["answered"] >= 0.96
    assert found["traces without an answer"] > 0  # else the next line says nothing
    assert found["of them with a score"] == found["scored otherwise than without faults"] == 0


async def test_a_helper_that_is_down_for_a_while(faults: Any) -> None:
    found = await faults.outage(faults.settings(), 8, limit=30.0, backoff=0.01, pause=0.2)
    assert found["degraded meanwhile"] == 8
    assert found["of them with a score"] == found["trained tokens of degraded traces"] == 0
    assert found["answered after"] == found["answered before"] > 0
    assert found["lost after"] == 0


async def test_hostile_replies(faults: Any) -> None:
    """Answers planted in feedback reward nobody who has none of their own, and nothing poses as a tag."""
    found = await faults.hostile(faults.settings(), 4 * len(faults.HOSTILE))
    assert found["hostile replies"] >= found["traces"] == found["traces without an answer of their own"]
    assert found["replies that state the answer"] >= found["traces"] / 2
    for label in ("of them rewarded", "policy tokens kept out of the loss", "replies with control text", "replies too long"):
        assert found[label] == 0
    assert found["of them in the loss"] == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("401 Incorrect API key", "Incorrect API key; set the provider's API key in the environment"),
        ("402 insufficient credit", "the account behind the key is used up"),
        ("403 no access", "the key may not use this model: name another in agents.models.knowledge"),
        ("404 no such model", "no such model; the provider has no such model or address: correct agents.models.knowledge"),
        ("405 method not allowed", "no such model or address: correct agents.models.knowledge"),
        ("400 the model helper does not exist", "no such model or address: correct agents.models.knowledge"),
        (
            '400 "auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
            "start vLLM with --enable-auto-tool",
        ),
        ("429 insufficient_quota", "the account behind the key is used up"),
    ],
)
async def test_what_no_request_can_mend_ends_the_run_at_the_first(faults: Any, fault: str, message: str) -> None:
    provider = faults.Provider(faults.rule, lambda consult, attempt: fault)
    async with provider.serving():
        rollouts = await faults.opened(faults.settings(), provider)
        with pytest.raises(ConfigError, match=rf"agent 'knowledge': .*{message}") as caught:
            await faults.traces_of(rollouts, 1)
    assert provider.attempts.total() == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("command", "words", "fault", "message"),
    [
        (evaluate, ["--samples", "1", "--problems", "2", "--workers", "1"], "401 Incorrect API key", "set the provider's API key"),
        (demo.command, ["@6475IEB?"], "404 no such model", "correct agents.models.knowledge"),
    ],
    ids=["evaluate", "demo"],
)
async def test_the_other_commands_end_with_one_line_too(
    command: Callable[[list[str]], None],
    words: list[str],
    fault: str,
    message: str,
    faults: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    provider = faults.Provider(faults.rule, lambda consult, attempt: fault)
    use = json.dumps({**Config().agents.use, "knowledge": ""})
    words = ["operators", *words, "--agents.use", use, "--agents.models", '{"knowledge": "openai:helper"}']
    async with provider.serving():
        for name, value in provider.environment().items():
            monkeypatch.setenv(name, value)
        assert await asyncio.to_thread(cli.main, command, words) == 2
    said = capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: agent 'knowledge': ")]
    assert message in line
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("400 maximum context length is 10 tokens", "too long for the model: shorten the agent's prompt file"),
        ("403 your input was flagged by moderation", "the provider filters this content"),
        ("400 content filter", "the provider filters this content: name another model in agents.models.knowledge"),
        ("finish content_filter", "the provider's content filter left no answer; name another model in agents.models"),
    ],
)
async def test_what_a_provider_refuses_is_not_asked_again(faults: Any, fault: str, message: str) -> None:
    provider = faults.Provider(faults.rule, lambda consult, attempt: fault)
    async with provider.serving():
        rollouts = await faults.opened(faults.settings(), provider)
        (trace,) = await faults.traces_of(rollouts, 1)
    assert provider.attempts.total() == 1
    assert (trace.status, trace.trained, trace.scores) == ("failed", False, {})
    assert trace.error.startswith("AgentError: agent 'knowledge': ")
    assert message in trace.error
    assert "\n" not in trace.error


@pytest.mark.parametrize("fault", ["html", "json", "429", "503"])
async def test_what_may_pass_is_asked_again(faults: Any, fault: str) -> None:
    """A page of a proxy reaches us as a ValueError of LangChain's client."""
    provider = faults.Provider(faults.rule, lambda consult, attempt: fault if attempt < 3 else "")
    async with provider.serving():
        rollouts = await faults.opened(faults.settings(), provider, backoff=0.001)
        (trace,) = await faults.traces_of(rollouts, 1)
    assert trace.trained
    assert set(provider.attempts.values()) == {3}
    assert {body["model"] for body in provider.bodies} == {"helper"}
