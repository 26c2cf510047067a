"""What a policy's files say about it, read without loading its weights: tokenizer, end-of-text ids, vocabulary, context."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from aipo_graph.config import Config
from aipo_graph.errors import ContextError, EngineError
from aipo_graph.forward import read_config, scaled_from
from aipo_graph.messages import read_tokenizer, turn_end
from aipo_graph.types import Stop


@dataclass(frozen=True, slots=True)
class Facts:
    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    """Token ids that end a text: those of generation config, model config and tokenizer, and that which ends a reply in the template."""
    vocab_size: int
    context: int
    """Longest prompt plus completion: the model's own, or ``engine.max_context`` where that is less."""

    @classmethod
    def read(cls, config: Config, model_path: str) -> Self:
        """Raises ConfigError where the directory or hub name has no config or tokenizer, EngineError where it names no context."""
        model, tokenizer = read_config(model_path), read_tokenizer(model_path)
        try:
            generation = GenerationConfig.from_pretrained(model_path).eos_token_id
        except OSError:  # a model directory need not have one
            generation = None
        text = model.get_text_config()
        named = (generation, text.eos_token_id, tokenizer.eos_token_id, turn_end(tokenizer))
        ends = frozenset(token for ids in named for token in ([ids] if isinstance(ids, int) else ids or ()))
        return cls(model_path, model, tokenizer, ends, int(text.vocab_size), _context(config, model, model_path))


def _context(config: Config, model: PretrainedConfig, model_path: str) -> int:
    """Raises EngineError where the model names no context, ``engine.max_context`` is longer than it, or a row's positions would depend on
    the rows beside it.
    """
    own = getattr(model.get_text_config(), "max_position_embeddings", None)
    if not own:
        raise EngineError(f"the policy {model_path!r} names no max_position_embeddings in its config.json; add it")
    if config.engine.max_context > own:
        raise EngineError(f"engine.max_context = {config.engine.max_context}: the policy {model_path!r} has a context of {own}; lower it")
    context = config.engine.max_context or int(own)
    if (border := scaled_from(model)) and border < context:
        raise EngineError(
            f"the policy {model_path!r} has a context of {context}, and past {border} tokens the longest row of a batch scales "
            f"the positions of all; set engine.max_context = {border}"
        )
    return context


def check_request(
    prompt: Sequence[int], max_tokens: int, temperature: float, stop: tuple[Stop, ...] = (), *, vocab_size: int, context: int
) -> int:
    """How many tokens may be sampled: ``max_tokens``, or what the context leaves. Raises ContextError, EngineError."""
    if not prompt:
        raise EngineError("the prompt is empty; give at least one token")
    if len(prompt) >= context:
        raise ContextError(f"the prompt has {len(prompt)} tokens, the model's context is {context}; lower the budgets")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise EngineError(f"the prompt holds token {max(prompt)}, the model has {vocab_size} tokens; use its own tokenizer")
    if max_tokens < 1:
        raise EngineError(f"max_tokens is {max_tokens}; give at least 1")
    if not 0 <= temperature < math.inf:
        raise EngineError(f"temperature is {temperature}; give a finite number, 0 for greedy")
    if not all(stop):
        raise EngineError(f"stop holds an empty entry: {stop!r}; leave it out")
    return min(max_tokens, context - len(prompt))
