"""Where sampling stops: EOS ids, token sequences, strings in the decoded text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aipo_graph.errors import EngineError
from aipo_graph.types import Stop


@dataclass(frozen=True, slots=True)
class StopRule:
    """One compiled set of stops. Only a token in ``watch`` can complete one."""

    watch: frozenset[int]
    strings: tuple[str, ...]
    sequences: tuple[list[int], ...]
    tail: int
    """Tokens to decode when looking for a string: up to four (bytes) per character, and some that decode to nothing."""


class Stops:
    def __init__(self, eos_ids: frozenset[int], decode: Callable[[Sequence[int]], str], vocab_size: int) -> None:
        self._eos_ids = eos_ids
        self._decode = decode
        self._vocab = range(vocab_size)
        self._pieces: list[str] = []
        self._rules: dict[tuple[Stop, ...], StopRule] = {}

    def rule(self, stop: tuple[Stop, ...]) -> StopRule:
        """Raises EngineError for an empty entry."""
        if stop not in self._rules:
            self._rules[stop] = self._compile(stop)
        return self._rules[stop]

    def _compile(self, stop: tuple[Stop, ...]) -> StopRule:
        if not all(stop):
            raise EngineError(f"stop holds an empty entry: {stop!r}; leave it out")
        strings = tuple(entry for entry in stop if isinstance(entry, str))
        sequences = tuple(list(entry) for entry in stop if not isinstance(entry, str))
        watch = {*self._eos_ids, *(ids[-1] for ids in sequences)}
        if strings:
            self._pieces = self._pieces or [self._decode([token]) for token in self._vocab]
            ends = {text[-1] for text in strings}
            # Decoded alone, a token may lose its spaces, and one that holds part of a character shows U+FFFD.
            anywhere = any(end.isspace() for end in ends)
            watch.update(t for t in self._vocab if anywhere or "\ufffd" in self._pieces[t] or not ends.isdisjoint(self._pieces[t]))
        return StopRule(frozenset(watch), strings, sequences, max((4 * len(text) + 8 for text in strings), default=0))

    def met(self, rule: StopRule, sampled: list[int]) -> bool:
        """Whether the last sampled token completes a stop. A string may end inside it: the ids stay as they are."""
        if sampled[-1] not in rule.watch:
            return False
        if sampled[-1] in self._eos_ids or any(sampled[-len(ids) :] == ids for ids in rule.sequences):
            return True
        if not rule.strings:
            return False
        text = self._decode(sampled[-rule.tail :])
        return any(string in text for string in rule.strings)
