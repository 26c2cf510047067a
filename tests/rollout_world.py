"""What the rollout tests share: two real tokenizers, tiny models for the real engine, and an engine that writes what a test says."""

from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aipo_graph.config import Config
from aipo_graph.engines.local import LocalEngine
from aipo_graph.messages import read_tokenizer
from aipo_graph.rollout import Agent
from aipo_graph.rollout.agents import Prompts
from aipo_graph.rollout.collect import Rollouts, open_graph
from aipo_graph.rollout.graph import Graph
from aipo_graph.rollout.stream import Step, Stream
from aipo_graph.rollout.tokens import Tokenizer
from aipo_graph.types import Completion, Problem, Stop
from examples.operators import pretrain

NAMES = ("verify", "knowledge", "reasoning")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Solve the problem step by step. So <verify>1+1=2</verify>. Then <knowledge>area of a circle</knowledge>, and so on.",
    "<feedback>Correct.</feedback> The answer is \\boxed{12}. <reasoning>what next?</reasoning>. user assistant system",
] * 50


def bpe(chat: bool = False, normalise: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which tags are ordinary text and `>.` is one token."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if normalise:
        raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\u200b", ""), normalizers.Lowercase()])
    raw.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    # Only the end of text is named in the config: header tokens of many chat models are special without being named.
    raw.add_special_tokens([AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False)
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer


def save_tiny(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 0, context: int = 512) -> str:
    """A random two-layer Llama beside its tokenizer, as a Hugging Face model directory."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def settings(**sections: Mapping[str, Any]) -> Config:
    """A config for tests: everything on the CPU."""
    return Config.model_validate({"run": {"device": "cpu"}} | sections)


@dataclass
class Scribe:
    """An engine whose policy is a function: it writes ``write(text so far)``, token by token, and obeys stops and limits."""

    tokenizer: PreTrainedTokenizerFast
    write: Callable[[str], str]
    version: int = 0
    in_flight: bool = False
    takes: Literal["weights", "adapter"] = "weights"
    sampled: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.eos_ids = frozenset({self.tokenizer.eos_token_id})

    async def generate(
        self, prompt_ids: Sequence[int], *, seed: int, max_tokens: int, stop: tuple[Stop, ...] = (), temperature: float = 1.0
    ) -> Completion:
        text = self.write(self.tokenizer.decode(list(prompt_ids)))
        planned = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id][:max_tokens]
        written = self.tokenizer.decode(planned)
        if any(entry in written for entry in stop if isinstance(entry, str)):
            lengths = range(1, len(planned) + 1)
            end = bisect(lengths, 0, key=lambda n: any(str(entry) in self.tokenizer.decode(planned[:n]) for entry in stop))
            planned = planned[: end + 1]
        ids = tuple(planned)
        self.sampled.append(ids)
        return Completion(ids, tuple(-0.5 for _ in ids), "stop", self.version)

    @contextmanager
    def run(self, key: str) -> Iterator[None]:
        yield

    @contextmanager
    def busy(self) -> Iterator[None]:
        yield

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        self.version = version

    async def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        return (-0.5,) * (len(token_ids) - 1)

    async def sleep(self) -> None: ...

    async def close(self) -> None: ...


@dataclass
class Exact:
    """A task whose answer is in the last box of the text; problems are numbered."""

    async def reward(self, answer: str, reply: str) -> Any:
        return float(f"\\boxed{{{answer}}}" in reply)

    def train(self, index: int) -> Problem:
        return Problem(f"p{index}", f"what is p{index}?", str(1000 + index))

    def heldout(self, count: int, kind: str = "") -> list[Problem]:
        return [self.train(index) for index in range(count)]


def echo(name: str, reply: Callable[[str], str]) -> Agent:
    async def tool(query: str) -> str:
        """Answers."""
        return reply(query)

    return Agent(name, tools=(tool,), backoff=0.001)


def world(
    root: Path, write: Callable[[str], str], helpers: Iterable[Agent], tokenizer: PreTrainedTokenizerFast | None = None, **sections: Any
) -> Rollouts:
    """Rollouts over the shipped graphs with a Scribe for a policy."""
    raw = tokenizer or pretrain.tokenizer()
    engine = Scribe(raw, write)
    named = {agent.name: agent for agent in helpers}
    return Rollouts(
        settings(**sections),
        engine,
        Exact(),
        Tokenizer(raw, named, engine.eos_ids),
        open_graph("graphs/aipo.py:build"),
        open_graph("graphs/solo.py:build"),
        named,
        Prompts(root, dict.fromkeys(("policy", "solo", *named), "{question}")),
        1.0,
    )


def sampling(folder: Path, tokenizer: PreTrainedTokenizerFast, helpers: Iterable[Agent], context: int = 512, **sections: Any) -> Rollouts:
    """Rollouts over the shipped graphs with the real engine and a random model."""
    config = settings(**sections)
    named = {agent.name: agent for agent in helpers}
    engine = LocalEngine.load(config, save_tiny(folder, tokenizer, context=context))
    return Rollouts(
        config,
        engine,
        Exact(),
        Tokenizer(read_tokenizer(folder), named, engine.eos_ids),
        open_graph("graphs/aipo.py:build"),
        open_graph("graphs/solo.py:build"),
        named,
        Prompts(folder, dict.fromkeys(("policy", "solo", *named), "{question}")),
        1.0,
    )


async def run_step(rollouts: Rollouts, number: int, drawn: int) -> Step:
    """One training step alone, from training problem ``drawn`` on."""
    async with aclosing(Stream(rollouts, rollouts.run_groups).steps(number, number + 1, drawn)) as steps:
        return await anext(steps)


def with_graph(rollouts: Rollouts, graph: Graph) -> Rollouts:
    return replace(rollouts, graph=graph, solo=graph)
