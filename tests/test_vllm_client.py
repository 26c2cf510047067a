"""What the server engine does that needs no vLLM: its errors, and the files that it hands over."""

import pickle
from pathlib import Path

import pytest
import torch
from aiohttp import web
from vllm_world import OPERATORS, served, settings

from aipo_graph.engines import open_engine
from aipo_graph.engines.chat import _sampler
from aipo_graph.engines.facts import Facts
from aipo_graph.engines.server import Refused
from aipo_graph.engines.vllm_api import WeightFiles, sweep
from aipo_graph.errors import ConfigError, EngineError


def test_a_refusal_reaches_the_parent_of_an_evaluation_worker() -> None:
    found = pickle.loads(pickle.dumps(Refused("no key", 401)))
    assert (type(found), str(found), found.status) == (Refused, "no key", 401)


@pytest.mark.parametrize("answer", ["<html>", {"server": "another"}])
async def test_a_server_of_another_kind_is_refused(answer: str | dict[str, str]) -> None:
    async def any_path(request: web.Request) -> web.Response:
        return web.Response(text=answer) if isinstance(answer, str) else web.json_response(answer)

    async with served(any_path) as url:
        with pytest.raises(ConfigError, match=f"{url} is no vLLM server"):
            await open_engine(settings(url, rollout={"max_tokens": 64}), OPERATORS)


async def test_a_request_that_the_server_aborts_is_one_line() -> None:
    async def aborted(request: web.Request) -> web.Response:
        return web.json_response({"choices": [{"token_ids": None, "logprobs": None, "finish_reason": "abort"}]})

    async with served(aborted) as url:
        sample = _sampler(url, "policy", Facts.read(settings(url), OPERATORS), 30)
        with pytest.raises(EngineError, match="vLLM ended a request with 'abort' after 0 tokens"):
            await sample([1, 2], seed=0, max_tokens=4)


def test_what_a_killed_run_left_is_swept_away(tmp_path: Path) -> None:
    config = settings(run={"device": "cpu", "dir": str(tmp_path), "name": "mine"})
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.yaml").touch()
    killed = WeightFiles(config, Facts.read(config, OPERATORS))
    assert killed.write("a-1", [("w", torch.zeros(2))]).is_relative_to(run)
    sweep(run)
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
