"""The server engine on a real vLLM server: logprobs equal the learner's, new weights reach it, and what does not fit is refused."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_world import CONTEXT, OPERATORS, PROMPT, RANK, adapted, base, exact, gap, per_server, perturbed, proxy, served, settings

from aipo_graph.config import Config
from aipo_graph.engines import open_engine
from aipo_graph.engines.local import LocalEngine
from aipo_graph.engines.server import Client, ServerEngine
from aipo_graph.errors import ConfigError, ContextError, EngineError
from aipo_graph.types import Completion

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
CLOSE = 1e-3


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@contextlib.asynccontextmanager
async def opened(url: str, **sections: Any) -> AsyncIterator[ServerEngine]:
    config = settings(url, **{"rollout": {"max_tokens": 64}, **sections})
    engine = await open_engine(config, OPERATORS)
    assert isinstance(engine, ServerEngine)
    try:
        yield engine
    finally:
        await engine.close()


async def test_ids_and_logprobs_are_those_of_the_policy(vllm_server: str) -> None:
    local, model = LocalEngine.load(settings(run={"device": "cpu"}), OPERATORS), base()
    async with opened(vllm_server) as engine:
        assert (engine.eos_ids, engine.takes, engine.in_flight, engine.max_context) == (local.eos_ids, "weights", True, CONTEXT)
        for temperature in (1.0, 2.0, 0.5, 0.0):
            completion = await engine.generate(PROMPT, seed=7, max_tokens=40, temperature=temperature)
            ids = [*PROMPT, *completion.token_ids]
            assert gap(completion.logprobs, exact(model, ids, temperature or 1.0)[len(PROMPT) - 1 :]) < CLOSE
            assert gap(await engine.logprobs(ids), exact(model, ids)) < CLOSE
            assert gap(await engine.logprobs(ids), await local.logprobs(ids)) < CLOSE
        assert completion.token_ids == (await local.generate(PROMPT, seed=0, max_tokens=40, temperature=0.0)).token_ids
        assert (completion.version, completion.updates) == (0, ())


async def test_seeds_repeat_in_any_company(vllm_server: str) -> None:
    async with opened(vllm_server) as engine:
        alone = [await engine.generate(PROMPT, seed=seed, max_tokens=30, temperature=2.0) for seed in (1, 2, 2**63 - 1)]
        crowd = await asyncio.gather(
            *(engine.generate(PROMPT, seed=seed, max_tokens=30, temperature=2.0) for seed in (1, 2, 2**63 - 1, *range(3, 40)))
        )
    assert [completion.token_ids for completion in crowd[:3]] == [completion.token_ids for completion in alone]
    assert len({completion.token_ids for completion in crowd}) > 30


async def test_more_prompt_tokens_at_once_than_a_step_takes(vllm_server: str) -> None:
    async with opened(vllm_server) as engine:
        crowd = await asyncio.gather(*(engine.generate((5 + n % 30, *PROMPT * 30), seed=n, max_tokens=3) for n in range(60)))
    assert all(completion.token_ids for completion in crowd)


async def test_stops(vllm_server: str) -> None:
    local = LocalEngine.load(settings(), OPERATORS)
    async with opened(vllm_server) as engine:
        plain = await engine.generate(PROMPT, seed=7, max_tokens=370)
        assert plain.stop == "stop"
        assert plain.token_ids[-1] in engine.eos_ids
        third, text = plain.token_ids[2], local._stops(())._decode(plain.token_ids[:5])
        assert plain.token_ids[:2].count(third) == 0
        by_id = await engine.generate(PROMPT, seed=7, max_tokens=370, stop=((third,),))
        by_text = await engine.generate(PROMPT, seed=7, max_tokens=370, stop=(text,))
        assert (by_id.token_ids, by_id.stop) == (plain.token_ids[:3], "stop")
        assert (by_text.token_ids, by_text.stop) == (plain.token_ids[:5], "stop")
        cut = await engine.generate(PROMPT, seed=7, max_tokens=4)
        assert (cut.token_ids, cut.stop) == (plain.token_ids[:4], "length")
        last = await engine.generate(PROMPT, seed=7, max_tokens=len(plain.token_ids))
        assert last.stop == "stop"
        long = await engine.generate(PROMPT * 42, seed=0, max_tokens=50, temperature=2.0)
        assert len(PROMPT * 42) + len(long.token_ids) <= CONTEXT


@pytest.mark.parametrize(("prompt", "options", "error", "message"), [
    ((), {}, EngineError, "empty"),
    ((5,) * CONTEXT, {}, ContextError, str(CONTEXT)),
    ((4096,), {}, EngineError, "own tokenizer"),
    (PROMPT, {"max_tokens": 0}, EngineError, "max_tokens"),
    (PROMPT, {"temperature": 3.0}, EngineError, "temperature"),
    (PROMPT, {"stop": ("",)}, EngineError, "empty"),
    (PROMPT, {"stop": ((5, 6),)}, EngineError, r"sequence \(5, 6\)"),
])  # fmt: skip
async def test_bad_requests_are_refused_in_one_line(
    vllm_server: str, prompt: tuple[int, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    async with opened(vllm_server) as engine:
        with pytest.raises(error, match=message) as caught:
            await engine.generate(prompt, **{"seed": 0, "max_tokens": 5, **options})
    assert "\n" not in str(caught.value)


async def test_loaded_weights_are_sampled_from(vllm_server: str) -> None:
    ids = [*PROMPT, *PROMPT, *PROMPT]
    async with opened(vllm_server) as engine:
        before = await engine.logprobs(ids)
        for version, seed in ((1, 5), (2, 6)):
            model = perturbed(seed)
            await engine.load_weights(model.named_parameters(), version)
            after = await engine.logprobs(ids)
            assert gap(after, exact(model, ids)) < CLOSE
            assert gap(after, before) > 0.1
            completion = await engine.generate(PROMPT, seed=3, max_tokens=30)
            assert completion.version == engine.version == version
            assert gap(completion.logprobs, exact(model, [*PROMPT, *completion.token_ids])[len(PROMPT) - 1 :]) < CLOSE
            before = after
        folder = engine._files.folder
        assert [path.name.rpartition("-")[2] for path in folder.iterdir()] == ["2"]
    assert not folder.exists()
    async with opened(vllm_server) as engine:  # the next run starts from its own policy, not from what the last one left
        assert gap(await engine.logprobs(ids), exact(base(), ids)) < CLOSE


async def test_a_request_that_spans_an_update_carries_both_versions(vllm_server: str) -> None:
    """Requests without a pause, and updates until one of them has met one: each token has the logprob of the weights that it names."""
    models, prefix = [perturbed(5), perturbed(6)], len(PROMPT) - 1
    async with opened(vllm_server) as engine:
        await engine.load_weights(models[1].named_parameters(), 1)
        completions: list[Completion] = []
        met = asyncio.Event()

        async def sampling(number: int) -> None:
            while not met.is_set():
                seed = 10_000 * number + len(completions)
                completions.append(await engine.generate(PROMPT, seed=seed, max_tokens=370, temperature=2.0))

        requests = [asyncio.create_task(sampling(number)) for number in range(30)]
        for version in range(2, 22):
            await asyncio.sleep(0.1)
            await engine.load_weights(models[version % 2].named_parameters(), version)
            if any(completion.updates for completion in completions):
                break
        met.set()
        await asyncio.gather(*requests)
    spanning = [completion for completion in completions if completion.updates]
    assert spanning
    for completion in spanning:
        spans = [(0, completion.version), *completion.updates, (len(completion.token_ids), -1)]
        ids = [*PROMPT, *completion.token_ids]
        for (start, version), (end, following) in pairwise(spans):
            assert start < end
            assert version != following
            right = exact(models[version % 2], ids, 2.0)[prefix:]  # no token of the old weights' cache
            assert gap(completion.logprobs[start:end], right[start:end]) < CLOSE


async def test_an_adapter_is_sampled_from_and_requests_keep_theirs(vllm_server: str) -> None:
    (first, first_tensors), (second, second_tensors) = adapted(1), adapted(2)
    ids, prefix = [*PROMPT, *PROMPT], len(PROMPT) - 1
    async with opened(vllm_server, policy={"lora_rank": RANK}) as engine:
        assert (engine.takes, engine.in_flight) == ("adapter", True)
        assert gap(await engine.logprobs(ids), exact(base(), ids)) < CLOSE
        await engine.load_weights(first_tensors, 1)
        assert gap(await engine.logprobs(ids), exact(first, ids)) < CLOSE
        assert gap(exact(first, ids), exact(base(), ids)) > 0.1
        requests = [asyncio.create_task(engine.generate(PROMPT, seed=seed, max_tokens=300, temperature=2.0)) for seed in range(30)]
        while not any(request.done() for request in requests):
            await asyncio.sleep(0.005)
        await engine.load_weights(second_tensors, 2)
        assert gap(await engine.logprobs(ids), exact(second, ids)) < CLOSE
        for completion in await asyncio.gather(*requests):
            assert (completion.version, completion.updates) == (1, ())
            assert gap(completion.logprobs, exact(first, [*PROMPT, *completion.token_ids], 2.0)[prefix:]) < CLOSE
        await engine.load_weights(second_tensors, 2)  # a run that goes on loads its version again
        after = await engine.generate(PROMPT, seed=1, max_tokens=20)
        assert after.version == 2
        assert gap(after.logprobs, exact(second, [*PROMPT, *after.token_ids])[prefix:]) < CLOSE
        for model, tensors in ((first, first_tensors), (second, second_tensors)):  # and one that went back makes other weights of it
            await engine.load_weights(tensors, 3)
            assert gap(await engine.logprobs(ids), exact(model, ids)) < CLOSE
            again = await engine.generate(PROMPT * 34, seed=1, max_tokens=5)  # blocks of its cache are full
            assert gap(again.logprobs, exact(model, [*PROMPT * 34, *again.token_ids])[34 * len(PROMPT) - 1 :]) < CLOSE
        [left] = engine._files.folder.iterdir()
        assert f"{left.name}.".partition("-")[2].startswith("3.")


async def test_weights_that_a_lora_run_evaluated_do_not_pass_for_the_servers_own(vllm_server: str, tmp_path: Path) -> None:
    ids, trained = [*PROMPT, *PROMPT], tmp_path / "trained"
    shutil.copytree(OPERATORS, trained)
    perturbed(5).save_pretrained(trained)
    lora = {"policy": {"lora_rank": RANK}, "rollout": {"max_tokens": 64}}
    async with Client(vllm_server, 60) as other:
        await other.call("POST", "/update_weight_version", {"new_version": "default"})  # as a server that was just started
    engine = await open_engine(settings(vllm_server, **lora), str(trained))
    assert gap(await engine.logprobs(ids), exact(perturbed(5), ids)) < CLOSE
    await engine.close()
    async with opened(vllm_server, **lora) as engine:
        assert gap(await engine.logprobs(ids), exact(base(), ids)) < CLOSE


async def test_weights_that_never_arrived_or_were_replaced_show(vllm_server: str) -> None:
    ids, model = [*PROMPT, *PROMPT], perturbed(5)
    async with opened(vllm_server) as engine, Client(vllm_server, 60) as other:
        await engine.load_weights(model.named_parameters(), 1)
        await other.call("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": OPERATORS}})
        await other.call("POST", "/reset_prefix_cache")
        assert gap(await engine.logprobs(ids), exact(model, ids)) > 0.1
        await other.call("POST", "/update_weight_version", {"new_version": "other-9"})
        with pytest.raises(EngineError, match="other-9.*its own server"):
            await engine.generate(PROMPT, seed=0, max_tokens=3)


@pytest.fixture
def other_shape(tmp_path: Path) -> str:
    """A directory like the policy's, of a model with one layer more."""
    shutil.copytree(OPERATORS, tmp_path / "deep")
    file = tmp_path / "deep" / "config.json"
    found = json.loads(file.read_text())
    file.write_text(json.dumps(found | {"num_hidden_layers": found["num_hidden_layers"] + 1, "layer_types": None}))
    return str(tmp_path / "deep")


@pytest.fixture
def other_words(tmp_path: Path) -> str:
    """A directory like the policy's, whose tokenizer has two tokens swapped."""
    shutil.copytree(OPERATORS, tmp_path / "words")
    file = tmp_path / "words" / "tokenizer.json"
    found = json.loads(file.read_text())
    words = found["model"]["vocab"]
    words["1"], words["2"] = words["2"], words["1"]
    file.write_text(json.dumps(found))
    return str(tmp_path / "words")


async def refused(config: Config, path: str = OPERATORS) -> str:
    with pytest.raises((ConfigError, EngineError)) as caught:
        await open_engine(config, path)
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value}"


async def test_a_server_that_does_not_fit_is_refused(vllm_server: str, other_shape: str, other_words: str) -> None:
    fit: dict[str, Any] = {"rollout": {"max_tokens": 64}}
    assert "Unanswered: the vLLM server http://127.0.0.1:9 cannot be reached" in await refused(settings("http://127.0.0.1:9", **fit))
    said = await refused(settings(vllm_server, **fit), other_shape)
    assert "num_hidden_layers" in said
    assert f"start it with --model {other_shape}" in said
    assert "another tokenizer" in await refused(settings(vllm_server, **fit), other_words)
    assert "--dtype bfloat16" in await refused(settings(vllm_server, policy={"dtype": "bfloat16"}, **fit))
    assert "--max-lora-rank 32" in await refused(settings(vllm_server, policy={"lora_rank": 32}, **fit))
    assert "--max-model-len 500" in await refused(settings(vllm_server, engine={"max_context": 500}, **fit))
    assert "rollout.max_tokens is 384" in await refused(settings(vllm_server, rollout={"max_tokens": 384}))
    assert "temperature is 3.0" in await refused(settings(vllm_server, rollout={"max_tokens": 64, "temperature": 3.0}))


def raw_logprobs(path: str, answer: Any) -> None:
    if path == "/server_info":
        answer["vllm_config"]["model_config"]["logprobs_mode"] = "raw_logprobs"


def splits_prompts(path: str, answer: Any) -> None:
    if path == "/server_info":
        answer["vllm_config"]["scheduler_config"]["enable_chunked_prefill"] = True


def no_lora(path: str, answer: Any) -> None:
    if path == "/server_info":
        answer["vllm_config"]["lora_config"] = None


def no_updating(path: str, answer: Any) -> None:
    if path == "/server_info":
        answer["vllm_env"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = False


@pytest.mark.parametrize(("options", "sections", "message"), [
    ({"hide": ("/version",)}, {}, "no vLLM server: engine.urls must name vLLM servers, without /v1"),
    ({"hide": ("/server_info",)}, {}, "VLLM_SERVER_DEV_MODE=1"),
    ({"edit": raw_logprobs}, {}, "--logprobs-mode processed_logprobs"),
    ({"edit": splits_prompts}, {}, "--no-enable-chunked-prefill --max-num-batched-tokens 4096"),
    ({"edit": no_lora}, {"policy": {"lora_rank": 4}}, "--enable-lora --max-lora-rank 8"),
    ({"edit": no_updating}, {"policy": {"lora_rank": 4}}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ({"hide": ("/inference/v1/generate",)}, {}, "--enable-scale-out"),
])  # fmt: skip
async def test_a_server_with_other_settings_is_refused(
    vllm_server: str, options: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    async with proxy(vllm_server, **options) as (url, _):
        assert message in await refused(settings(url, **{"rollout": {"max_tokens": 64}, **sections}))


async def test_a_lost_request_is_sampled_again(vllm_server: str) -> None:
    async with proxy(vllm_server, faults=("503", "reset")) as (url, seen), opened(url) as engine:
        found = await engine.generate(PROMPT, seed=7, max_tokens=20)
        assert len(seen) == 3
        assert found == await engine.generate(PROMPT, seed=7, max_tokens=20)
    async with proxy(vllm_server, faults=("500", "429", "503", "503")) as (url, seen), opened(url) as engine:
        with pytest.raises(EngineError, match="503: overloaded"):
            await engine.generate(PROMPT, seed=7, max_tokens=20)
        assert len(seen) == 3
    async with proxy(vllm_server, faults=("400",)) as (url, seen), opened(url) as engine:
        with pytest.raises(EngineError, match="400"):
            await engine.generate(PROMPT, seed=7, max_tokens=20)
        assert len(seen) == 1


async def test_runs_stay_on_one_server_and_are_spread(vllm_server: str) -> None:
    async with proxy(vllm_server) as (left, seen_left), proxy(vllm_server) as (right, seen_right):
        config = settings(left, engine={"urls": [left, right]}, rollout={"max_tokens": 64})
        engine = await open_engine(config, OPERATORS)

        async def one(number: int) -> list[Completion]:
            with engine.run(f"run-{number}"):
                return [await engine.generate((*PROMPT, 5 + turn), seed=1000 * number + turn, max_tokens=8) for turn in range(4)]

        await asyncio.gather(*(one(number) for number in range(20)))
        places: dict[int, list[str]] = {}
        for name, seen in (("left", seen_left), ("right", seen_right)):
            for body in seen:
                places.setdefault(body["sampling_params"]["seed"] // 1000, []).append(name)
        counts = per_server(list(places.values()))
        assert sum(counts.values()) == 20  # each run on one server only
        assert abs(counts["left"] - counts["right"]) <= 4
        await engine.load_weights(perturbed(5).named_parameters(), 1)
        await engine.logprobs(PROMPT)
        await engine.close()


async def test_servers_that_disagree_are_named(vllm_server: str) -> None:
    def shifted(path: str, answer: Any) -> None:
        for choice in answer.get("choices", ()) if path == "/v1/completions" else ():
            for entry in choice["logprobs"]["top_logprobs"]:
                entry.update({token: logprob - 0.2 for token, logprob in entry.items()})

    async with proxy(vllm_server) as (left, _), proxy(vllm_server, edit=shifted) as (right, _):
        config = settings(left, engine={"urls": [left, right]}, rollout={"max_tokens": 64})
        engine = await open_engine(config, OPERATORS)
        with pytest.raises(EngineError, match=f"{left} and {right} differ by 0.2"):
            await engine.logprobs(PROMPT)
        await engine.close()


async def test_a_refused_key_is_named() -> None:
    from aiohttp import web

    async def locked(request: web.Request) -> web.Response:
        return web.json_response({"error": "Unauthorized"}, status=200 if request.path == "/version" else 401)

    async with served(locked) as url:
        assert "VLLM_API_KEY" in await refused(settings(url))
