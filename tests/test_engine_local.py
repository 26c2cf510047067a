"""The embedded engine on real tiny models: exact logprobs, seeds, stops, fixed batches, and what happens when things go wrong."""

import asyncio
import contextvars
import operator
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Annotated, Any, TypedDict

import pytest
import torch
from langgraph.graph import END, START, StateGraph
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from aipo_graph.config import Config, Engine, Policy
from aipo_graph.engines.decoder import draw
from aipo_graph.engines.local import LocalEngine
from aipo_graph.errors import ConfigError, EngineError
from aipo_graph.types import Completion

VOCAB = 48
CONTEXT = 128
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT
)
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "mistral": MistralConfig(**SMALL, num_key_value_heads=1, sliding_window=8),
    "gemma3": Gemma3TextConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny(name: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(CONFIGS[name]) if name == "gemma3" else AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter in model.parameters():  # far from uniform, so that a wrong mask or position shows
        parameter.data *= 4 if parameter.dim() > 1 else 1
    return model


def spell(token_ids: Sequence[int]) -> str:
    return "".join(chr(65 + token) for token in token_ids)


def engine_of(model: Any, **options: Any) -> LocalEngine:
    return LocalEngine(model, options.pop("eos_ids", ()), options.pop("decode", spell), max_context=CONTEXT, **options)


def prompts(count: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def inputs_of(model: Any) -> list[tuple[int, int]]:
    """Rows and tokens of each forward with the engine's cache, from now on."""
    found: list[tuple[int, int]] = []

    def note(model: Any, args: Any, given: dict[str, Any]) -> None:
        if "past_key_values" in given:
            found.append(tuple(given["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return found


def prefilled(fed: list[tuple[int, int]]) -> int:
    return sum(rows * tokens for rows, tokens in fed if tokens > 1)


@torch.no_grad()
def plain_logprobs(model: Any, prompt: Sequence[int], completion: Completion, temperature: float = 1.0) -> torch.Tensor:
    row = torch.tensor([*prompt, *completion.token_ids])
    logprobs = (model(row[None], use_cache=False).logits[0].float() / temperature).log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(1, row[len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_batch", [5, 64])
async def test_logprobs_equal_a_plain_forward_for_rows_that_join_at_different_times(name: str, max_batch: int) -> None:
    model = tiny(name)
    engine = engine_of(model, max_batch=max_batch)

    async def ask(index: int, prompt: list[int]) -> None:
        for _ in range(index % 4 * 25):
            await asyncio.sleep(0)
        temperature = (1.0, 0.6)[index % 2]
        completion = await engine.generate(prompt, seed=index, max_tokens=1 + 7 * index % 30, temperature=temperature)
        assert len(completion.token_ids) == 1 + 7 * index % 30
        assert completion.stop == "length"
        expected = plain_logprobs(model, prompt, completion, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=1e-5)

    await asyncio.gather(*(ask(index, prompt) for index, prompt in enumerate(prompts(24))))


async def test_a_run_that_asks_again_with_a_reply_keeps_its_cache_and_its_logprobs() -> None:
    model = tiny()
    engine = engine_of(model, max_batch=6)
    fed, lengths = inputs_of(model), []

    async def converse(index: int, tokens: list[int]) -> None:
        with engine.run(str(index)):
            for turn in range(4):
                completion = await engine.generate(tokens, seed=10 * index + turn, max_tokens=2 + (index + turn) % 5)
                expected = plain_logprobs(model, tokens, completion)
                torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=2e-5, rtol=1e-5)
                tokens = [*tokens, *completion.token_ids, turn, index]
                lengths.append(len(tokens))

    await asyncio.gather(*(converse(index, prompt) for index, prompt in enumerate(prompts(6))))
    alone = prefilled(fed)
    assert alone < sum(lengths) / 2
    await asyncio.gather(*(converse(index, prompt) for index, prompt in enumerate(prompts(12))))  # more runs than slots
    assert prefilled(fed) > 2 * alone


async def test_tokens_depend_on_prompt_and_seed_only() -> None:
    engine = engine_of(tiny())
    asked = list(enumerate(prompts(20)))

    async def ask(seed: int, prompt: list[int]) -> tuple[int, ...]:
        return (await engine.generate(prompt, seed=seed, max_tokens=25)).token_ids

    alone = {seed: await ask(seed, prompt) for seed, prompt in asked}
    crowd = dict(zip(alone, await asyncio.gather(*(ask(*each) for each in asked)), strict=True))
    backwards = dict(zip(reversed(alone), await asyncio.gather(*(ask(*each) for each in reversed(asked))), strict=True))
    assert alone == crowd == backwards
    assert await ask(99, asked[0][1]) != alone[0]


@pytest.mark.parametrize("vocabulary", [100, 256, 257, 5_000])
def test_a_draw_is_the_inverse_of_the_cumulative_distribution_at_every_vocabulary(vocabulary: int) -> None:
    """Also where most tokens are ruled out, one holds all, and the uniform number is next to 0 or 1."""
    random_ = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(64, vocabulary, generator=random_)
    logits[:16, torch.randperm(vocabulary, generator=random_)[: vocabulary * 9 // 10]] = -torch.inf
    logits[16:20] = -torch.inf
    logits[16:20, vocabulary // 2] = 0
    uniforms = torch.rand(64, dtype=torch.float64, generator=random_)
    uniforms[::3], uniforms[1::3] = 0.0, 1 - 2**-53
    temperatures = [0.0, 1.0, 0.7, 1.0] * 16
    ids, logprobs = draw(logits, temperatures, uniforms.tolist())
    for row, temperature in enumerate(temperatures):
        due = (logits[row].double() / (temperature or 1.0)).log_softmax(-1)
        token, cdf = ids[row], due.exp().cumsum(-1)
        assert logprobs[row] == pytest.approx(due[token].item(), abs=1e-5)
        if temperature:
            assert (cdf[token - 1] if token else 0) - 1e-6 <= uniforms[row] <= cdf[token] + 1e-6
        else:
            assert token == logits[row].argmax()


@pytest.mark.parametrize("vocabulary", [VOCAB, 3_000])
def test_drawn_frequencies_match_the_softmax(vocabulary: int) -> None:
    count = 20_000
    logits = 3 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).tolist()
    drawn = Counter(draw(logits.expand(count, -1), [1.0] * count, uniforms)[0])
    assert chi_square(drawn, logits.softmax(-1).double() * count) < 4


def chi_square(seen: Counter[int], expected: torch.Tensor) -> float:
    """In standard deviations above its mean; tokens that are due less than five times count as one."""
    cells = [(seen[token], due) for token, due in enumerate(expected.tolist()) if due >= 5]
    cells.append((seen.total() - sum(count for count, _ in cells), max(seen.total() - sum(due for _, due in cells), 1e-9)))
    freedom = len(cells) - 1
    assert freedom > 3
    return (sum((count - due) ** 2 / due for count, due in cells) - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
async def test_sampled_frequencies_match_the_softmax(temperature: float) -> None:
    model = tiny()
    engine = engine_of(model)
    count = 4000
    drawn = await asyncio.gather(*(engine.generate([3, 1, 4], seed=seed, max_tokens=1, temperature=temperature) for seed in range(count)))
    frequencies = Counter(completion.token_ids[0] for completion in drawn)
    with torch.no_grad():
        expected = (model(torch.tensor([[3, 1, 4]])).logits[0, -1] / temperature).softmax(-1).double() * count
    assert chi_square(frequencies, expected) < 4


async def test_temperature_zero_is_the_greedy_decoding_of_transformers() -> None:
    model = tiny("qwen3")
    engine = engine_of(model)
    for prompt in prompts(4):
        completion = await engine.generate(prompt, seed=0, max_tokens=20, temperature=0.0)
        row = torch.tensor([prompt])
        greedy = model.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0
        )
        assert list(completion.token_ids) == greedy[0, len(prompt) :].tolist()
        torch.testing.assert_close(torch.tensor(completion.logprobs), plain_logprobs(model, prompt, completion), atol=2e-5, rtol=1e-5)


async def test_eos_and_token_sequences_stop_and_are_kept() -> None:
    free = await engine_of(tiny()).generate([1, 2], seed=5, max_tokens=40)
    ids = free.token_ids
    eos = ids[12]
    stopped = await engine_of(tiny(), eos_ids=(eos,)).generate([eos, 2, 1], seed=5, max_tokens=40)
    assert eos not in stopped.token_ids[:-1]
    pair = ids[7:9]
    first = next(end for end in range(2, 40) if ids[end - 2 : end] == pair)
    by_pair = await engine_of(tiny()).generate([1, 2], seed=5, max_tokens=40, stop=(pair, (ids[0],) * 9))
    assert by_pair.token_ids == ids[:first]
    assert by_pair.logprobs == pytest.approx(free.logprobs[:first], abs=1e-5)
    assert (by_pair.stop, free.stop) == ("stop", "length")
    # The prompt's end does not count: [2] is given, only the sampled part may match.
    across = await engine_of(tiny()).generate([1, 2], seed=5, max_tokens=4, stop=((2, ids[0]),))
    assert across.token_ids == ids[:4]


def tag_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which the closing tag spans several tokens and shares its last one with the text that follows."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator([">.. >.. ask ask verify verify </verify>.. é→"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


class Parrot(torch.nn.Module):
    """A real model whose greedy decoding writes a given text: the token due at each position gets a bonus."""

    def __init__(self, model: Any, script: Sequence[int]) -> None:
        super().__init__()
        self.inner = model
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.bonus = torch.zeros(CONTEXT, model.config.vocab_size)
        self.bonus[range(len(script)), list(script)] = 1e4

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **options: Any) -> Any:
        output = self.inner(input_ids=input_ids, position_ids=position_ids, **options)
        positions = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        output.logits[:, -1] += self.bonus[positions[:, -1]]
        return output


@pytest.mark.parametrize(("text", "stop", "kept"), [
    ("ask verify</verify>.. more", "</verify>", "ask verify</verify>.."),
    ("a✓b", "✓", "a✓"),
    ("no tag > here", "</verify>", "no tag > here"),
])  # fmt: skip
async def test_a_stop_string_is_found_across_tokens_and_nothing_is_cut(text: str, stop: str, kept: str) -> None:
    tokenizer = tag_tokenizer()
    script = tokenizer.encode(text)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)}))
    engine = engine_of(Parrot(model, script), decode=lambda ids: tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    completion = await engine.generate([0], seed=0, max_tokens=len(script), temperature=0.0, stop=(stop,))
    assert tokenizer.decode(list(completion.token_ids)) == kept
    assert list(completion.token_ids) == script[: len(completion.token_ids)]
    assert completion.stop == ("stop" if stop in text else "length")
    if stop == "</verify>" and completion.stop == "stop":
        assert not tokenizer.decode([completion.token_ids[-1]]).endswith(">")  # shares its token with what follows


class Talk(TypedDict):
    tokens: Annotated[tuple[int, ...], operator.add]
    logprobs: Annotated[tuple[float, ...], operator.add]
    seed: int


def conversation(engine: LocalEngine, delays: random.Random) -> Any:
    """policy -> two critics at once -> consult, three times: sampling, fan-out and helpers that answer in real time."""

    async def sample(state: Talk, offset: int) -> dict[str, Any]:
        completion = await engine.generate(
            state["tokens"], seed=1000 * state["seed"] + len(state["tokens"]) + offset, max_tokens=3 + state["seed"] % 5
        )
        return {"tokens": completion.token_ids, "logprobs": completion.logprobs}

    async def policy(state: Talk) -> dict[str, Any]:
        return await sample(state, 0)

    async def left(state: Talk) -> dict[str, Any]:
        return await sample(state, 100)

    async def right(state: Talk) -> dict[str, Any]:
        return await sample(state, 200)

    async def consult(state: Talk) -> dict[str, Any]:
        with engine.busy():
            await asyncio.sleep(delays.choice((0, 0.03)))
        return {"tokens": (state["seed"], 7)}

    graph = StateGraph(Talk)
    for name, node in {"policy": policy, "left": left, "right": right, "consult": consult}.items():
        graph.add_node(name, node)
    graph.add_edge(START, "policy")
    graph.add_edge("policy", "left")
    graph.add_edge("policy", "right")
    graph.add_edge(["left", "right"], "consult")
    graph.add_conditional_edges("consult", lambda state: "policy" if len(state["tokens"]) < 45 else END, ["policy", END])
    return graph.compile()


async def talk(engine: LocalEngine, delay_seed: int, count: int = 12) -> list[Talk]:
    delays = random.Random(delay_seed)
    graph = conversation(engine, delays)

    async def one(index: int) -> Talk:
        await asyncio.sleep(0 if index % 2 else delays.random() * 0.002)
        with engine.run(f"run-{index}"):
            await asyncio.sleep(delays.random() * 0.002)
            states = graph.astream({"tokens": (1, 2, index), "logprobs": (), "seed": index}, stream_mode="values")
            return [state async for state in states][-1]

    return await asyncio.gather(*(one(index) for index in range(count)))


async def test_delays_do_not_change_a_bit() -> None:
    async def once(delay_seed: int, deterministic: bool) -> tuple[list[Talk], list[Any]]:
        model, fed = tiny(), []
        engine = engine_of(model, deterministic=deterministic, max_batch=9)
        model.register_forward_pre_hook(
            lambda _, args, options: fed.append((options["input_ids"].tolist(), options["position_ids"].tolist())), with_kwargs=True
        )
        with engine.run("gate"):  # holds the first step until every run has begun
            waiting = asyncio.create_task(talk(engine, delay_seed), context=contextvars.Context())
            await asyncio.sleep(0.05)
        return await waiting, fed

    first, second = await once(1, True), await once(2, True)
    assert first[1] == second[1]  # the same batches, step by step
    assert first[0] == second[0]
    loose, _ = await once(3, False)
    assert [state["tokens"] for state in loose] == [state["tokens"] for state in first[0]]


async def test_a_consult_may_sample_itself_and_runs_that_end_early_leave_the_barrier() -> None:
    engine = engine_of(tiny())

    async def helper() -> Completion:
        with engine.busy():
            await asyncio.sleep(0.001)
            return await engine.generate([5], seed=1, max_tokens=3)

    async def consulting() -> Completion:
        with engine.run("a"):
            await helper()
            return await engine.generate([6], seed=2, max_tokens=3)

    async def broken() -> None:
        with engine.run("b"):
            await engine.generate([7], seed=3, max_tokens=2)
            raise KeyError("node")

    async def silent() -> None:
        with engine.run("c"):
            await asyncio.sleep(0.005)

    results = await asyncio.wait_for(asyncio.gather(consulting(), broken(), silent(), return_exceptions=True), 10)
    assert isinstance(results[0], Completion)
    assert isinstance(results[1], KeyError)


async def test_a_cancelled_request_leaves_and_the_others_go_on() -> None:
    engine = engine_of(tiny())
    expected = await engine.generate([1, 2, 3], seed=4, max_tokens=60)

    async def impatient() -> None:
        with engine.run("impatient"):
            await engine.generate([4], seed=1, max_tokens=CONTEXT)

    fed = inputs_of(engine.model)
    task = asyncio.ensure_future(impatient())
    patient = asyncio.ensure_future(engine.generate([1, 2, 3], seed=4, max_tokens=60))
    while len(fed) < 10:
        await asyncio.sleep(0)
    task.cancel()
    assert (await patient).token_ids == expected.token_ids
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sum(rows for rows, _ in fed) < 100  # of 60 steps
    with engine.run("held"):  # nobody samples while this run is silent, so the request can only time out
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.create_task(bare(engine), context=contextvars.Context()), 0.02)
    await engine.load_weights(tiny(seed=1).state_dict().items(), 1)


async def bare(engine: LocalEngine) -> Completion:
    return await engine.generate([1], seed=0, max_tokens=3)


async def test_a_failing_forward_fails_every_request_and_the_engine_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    engine = engine_of(model, max_batch=2)
    good = await engine.generate([1, 2], seed=0, max_tokens=10)
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: torch.zeros(3))
    failed = await asyncio.gather(*(engine.generate([1, 2], seed=s, max_tokens=10) for s in range(5)), return_exceptions=True)
    assert all(isinstance(error, EngineError) and "\n" not in str(error) for error in failed)
    monkeypatch.undo()
    assert await engine.generate([1, 2], seed=0, max_tokens=10) == good
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(EngineError, match="not finite"):
        await engine.generate([1, 2], seed=0, max_tokens=10)


@pytest.mark.parametrize(("prompt", "options", "message"), [
    ([], {}, "empty"),
    ([0] * CONTEXT, {}, "128"),
    ([VOCAB], {}, "48"),
    ([1], {"max_tokens": 0}, "max_tokens"),
    ([1], {"temperature": -1.0}, "temperature"),
    ([1], {"stop": ("",)}, "empty"),
])  # fmt: skip
async def test_bad_requests_are_refused_in_one_line(prompt: list[int], options: dict[str, Any], message: str) -> None:
    engine = engine_of(tiny())
    with pytest.raises(EngineError, match=message) as caught:
        await engine.generate(prompt, **{"seed": 0, "max_tokens": 5, **options})
    assert "\n" not in str(caught.value)
    assert (await engine.generate([1], seed=0, max_tokens=5)).version == 0


async def test_sampling_ends_at_the_context() -> None:
    completion = await engine_of(tiny("gpt2")).generate([1] * (CONTEXT - 3), seed=0, max_tokens=50)
    assert (len(completion.token_ids), completion.stop) == (3, "length")


async def test_loaded_weights_change_outputs_and_version() -> None:
    engine, other = engine_of(tiny()), tiny(seed=7)
    with engine.run("a"):
        before = await engine.generate([1, 2, 3], seed=0, max_tokens=8)
        await engine.load_weights(((name, tensor) for name, tensor in other.named_parameters()), 5)  # tied: no lm_head.weight
        grown = [1, 2, 3, *before.token_ids, 9]
        after = await engine.generate(grown, seed=0, max_tokens=8)
    assert (before.version, after.version) == (0, 5)
    torch.testing.assert_close(torch.tensor(after.logprobs), plain_logprobs(other, grown, after), atol=2e-5, rtol=1e-5)


async def test_logprobs_of_a_text_are_those_of_the_weights_in_use() -> None:
    engine, other, text = engine_of(tiny()), tiny(seed=7), Completion(tuple(range(2, 20)), (0.0,) * 18, "stop", 0)
    for model, version in ((tiny(), 0), (other, 1)):
        await engine.load_weights(model.named_parameters(), version)
        found = torch.tensor(await engine.logprobs([1, *text.token_ids]))
        torch.testing.assert_close(found, plain_logprobs(model, [1], text), atol=1e-5, rtol=1e-5)
    with pytest.raises(EngineError, match="1 tokens have no logprobs"):
        await engine.logprobs([1])
    await engine.sleep()
    await engine.close()


async def test_weights_that_do_not_fit_are_refused_and_nothing_is_copied() -> None:
    engine = engine_of(tiny())
    before = await engine.generate([1, 2], seed=0, max_tokens=8)
    good = dict(tiny(seed=7).named_parameters())
    name = next(iter(good))
    for bad in ({**good, "nobody": good[name]}, {**good, name: torch.zeros(2, 2)}, {key: good[key] for key in good if key != name}):
        with pytest.raises(EngineError, match="nobody|shape|lack"):
            await engine.load_weights(bad.items(), 1)
    assert await engine.generate([1, 2], seed=0, max_tokens=8) == before
    waiting = asyncio.ensure_future(engine.generate([1, 2], seed=0, max_tokens=8))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="while 1"):
        await engine.load_weights(good.items(), 1)
    assert await waiting == before


async def test_weights_wait_for_the_last_step_of_what_was_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a trace is that runs out of time: on a GPU its step is still under way in a thread."""
    engine, stepping = engine_of(tiny()), threading.Event()
    step = engine._step

    def slow(*args: Any) -> None:
        stepping.set()
        time.sleep(0.05)
        step(*args)

    monkeypatch.setattr(engine, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(engine, "_step", slow)
    late = asyncio.ensure_future(engine.generate([1, 2], seed=0, max_tokens=50))
    await asyncio.to_thread(stepping.wait)
    with pytest.raises(EngineError, match="while 1"):
        await engine.load_weights(tiny(seed=7).named_parameters(), 1)
    late.cancel()
    await asyncio.wait({late})
    await engine.load_weights(tiny(seed=7).named_parameters(), 1)
    assert (engine.version, late.cancelled()) == (1, True)


def test_a_model_that_keeps_no_columns_is_refused() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2))
    with pytest.raises(EngineError, match="Mamba"):
        engine_of(model)


def test_load_reads_a_model_directory(tmp_path: Any) -> None:
    tokenizer = tag_tokenizer()
    config = LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)}, eos_token_id=[2, 3])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer that loads"):
        LocalEngine.load(Config(), str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    engine = LocalEngine.load(Config(policy=Policy(model=str(tmp_path)), engine=Engine(max_batch=4)), str(tmp_path))
    assert (engine.eos_ids, engine.max_context, engine.max_batch) == ({2, 3}, CONTEXT, 4)
    assert asyncio.run(engine.generate(tokenizer.encode("ask"), seed=0, max_tokens=4)).token_ids  # any event loop will do
    assert asyncio.run(engine.generate(tokenizer.encode("ask"), seed=0, max_tokens=4)).token_ids
    assert LocalEngine.load(Config(engine=Engine(max_context=40)), str(tmp_path)).max_context == 40
    with pytest.raises(EngineError, match=f"max_context = {CONTEXT + 1}"):
        LocalEngine.load(Config(engine=Engine(max_context=CONTEXT + 1)), str(tmp_path))
