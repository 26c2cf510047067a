"""What both vLLM modes say and hear: sampling parameters, completions, scored texts, names of weight versions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aipo_graph.engines.facts import Facts
from aipo_graph.errors import EngineError
from aipo_graph.types import Completion, Stop

COLDEST, HOTTEST = 0.01, 2.0
"""Between these vLLM samples at the temperature that it is asked for."""


def sampling(facts: Facts, *, seed: int, limit: int, stop: tuple[Stop, ...], temperature: float) -> dict[str, Any]:
    """vLLM's sampling parameters, all that shape the distribution said: its defaults come from the model's generation config.

    Raises EngineError for a stop or a temperature that vLLM cannot honour.
    """
    if not all(stop):
        raise EngineError(f"stop holds an empty entry: {stop!r}; leave it out")
    strings = [entry for entry in stop if isinstance(entry, str)]
    sequences = [entry for entry in stop if not isinstance(entry, str)]
    if longer := [ids for ids in sequences if len(ids) > 1]:
        raise EngineError(f"stop holds the token sequence {longer[0]}: vLLM stops at single tokens or strings; give its text")
    if temperature and not COLDEST <= temperature <= HOTTEST:
        raise EngineError(f"temperature is {temperature}: vLLM takes 0 for greedy, or {COLDEST:g} to {HOTTEST:g}; give one of these")
    return {
        "seed": seed % 2**63,
        "max_tokens": limit,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,
        "stop": strings,
        "stop_token_ids": sorted(facts.eos_ids.union(*sequences)),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }


def scoring(count: int) -> dict[str, Any]:
    """Parameters that score a prompt of ``count`` tokens. Raises EngineError where there is nothing to score."""
    if count < 2:
        raise EngineError(f"{count} tokens have no logprobs; give at least 2")
    return {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}


def completion(
    facts: Facts, token_ids: Sequence[int], logprobs: Sequence[float], finish: str | None, versions: Sequence[tuple[int, int]]
) -> Completion:
    """A finished request; ``versions`` are (first token, weights) in order. Raises EngineError where vLLM did not finish it."""
    if finish not in ("stop", "length") or not token_ids or len(token_ids) != len(logprobs):
        raise EngineError(f"vLLM ended a request with {finish!r} after {len(token_ids)} tokens and {len(logprobs)} logprobs; see its log")
    stopped = finish == "stop" or token_ids[-1] in facts.eos_ids
    (_, first), *later = versions
    return Completion(tuple(token_ids), tuple(logprobs), "stop" if stopped else "length", first, tuple(later))


def prompt_scores(token_ids: Sequence[int], entries: Sequence[Mapping[Any, Any] | None]) -> Iterable[Any]:
    """Each token's own entry among vLLM's prompt logprobs, which have none for the first token. Keys are ids, or ids as text."""
    for token, entry in zip(token_ids[1:], entries[1:], strict=True):
        found = entry or {}
        yield found[token] if token in found else found[str(token)]


class Labels:
    """Names of weight versions that no other run uses, since a server can outlive its run or be shared by mistake.

    >>> labels = Labels("a1b2")
    >>> labels.of(3), labels.version("a1b2-3")
    ('a1b2-3', 3)
    """

    def __init__(self, token: str) -> None:
        self._token = token

    def of(self, version: int) -> str:
        return f"{self._token}-{version}"

    def version(self, label: str) -> int:
        """Raises EngineError for weights that this run did not load."""
        token, _, number = label.rpartition("-")
        if token != self._token:
            raise EngineError(f"the server sampled with weights {label!r}, which this run did not load; give each run its own server")
        return int(number)
