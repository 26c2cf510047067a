"""The embedded engine: a Hugging Face causal LM with full or sliding-window attention, sampled in this process."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch

from aipo_graph.config import Config
from aipo_graph.engines.decoder import Decoder, device_here, draw
from aipo_graph.engines.facts import Facts, check_request
from aipo_graph.errors import EngineError, first_line
from aipo_graph.forward import read_weights
from aipo_graph.messages import decode
from aipo_graph.types import Completion, Stop

# --- where sampling stops: EOS ids, token sequences, strings in the decoded text


Decode = Callable[[Sequence[int]], str]


class Stops:
    """One set of stops. Only a token in ``watch`` can complete one; ``pieces`` gives each token's own text."""

    def __init__(self, eos_ids: frozenset[int], decode: Decode, pieces: Callable[[], list[str]], stop: tuple[Stop, ...]) -> None:
        self._eos_ids = eos_ids
        self._decode = decode
        self._strings = [entry for entry in stop if isinstance(entry, str)]
        self._sequences = [list(entry) for entry in stop if not isinstance(entry, str)]
        self.watch = {*eos_ids, *(ids[-1] for ids in self._sequences)}
        if self._strings:
            ends = {text[-1] for text in self._strings}
            # Decoded alone, a token may lose its spaces, and one that holds part of a character shows U+FFFD.
            anywhere = any(end.isspace() for end in ends)
            self.watch.update(t for t, piece in enumerate(pieces()) if anywhere or "\ufffd" in piece or not ends.isdisjoint(piece))
        # Tokens to decode when looking for a string: up to four (bytes) per character, and some that decode to nothing.
        self._tail = max((4 * len(text) + 8 for text in self._strings), default=0)

    def met(self, sampled: list[int]) -> bool:
        """Whether the last sampled token, one of ``watch``, completes a stop. A string may end inside it: the ids stay as they are."""
        if sampled[-1] in self._eos_ids or any(sampled[-len(ids) :] == ids for ids in self._sequences):
            return True
        text = self._decode(sampled[-self._tail :]) if self._strings else ""
        return any(string in text for string in self._strings)


def _pieces(decode: Decode, vocab_size: int) -> list[str]:
    return [decode([token]) for token in range(vocab_size)]


# --- when a batch may form: once every active graph run waits for the engine and no consult is in flight

# Runs come back from their helpers at times that nothing controls. Whoever samples only at such points sees the same requests together in
# every repetition of a job, hence the same floating-point sums.

QUIET_TURNS = 8
"""Event-loop turns without news after which all requests of a fan-out have arrived (one was enough for LangGraph 1.2)."""


@dataclass(eq=False, slots=True)
class Party:
    """A graph run, or a consult within one: it holds up the others while it has no request in the engine."""

    key: str
    parent: "Party | None" = None
    pending: int = 0


_current: ContextVar[Party | None] = ContextVar("party", default=None)


class Barrier:
    def __init__(self) -> None:
        self._parties: set[Party] = set()
        self.news = asyncio.Event()

    @property
    def current(self) -> Party | None:
        """The innermost run or consult of this barrier that the calling task is in."""
        return party if (party := _current.get()) in self._parties else None

    @contextlib.contextmanager
    def enter(self, party: Party) -> Iterator[None]:
        self._parties.add(party)
        self.news.set()
        token = _current.set(party)
        try:
            yield
        finally:
            _current.reset(token)
            self._parties.discard(party)
            self.news.set()

    def count(self, party: Party | None, requests: int) -> None:
        """So many more requests of the party, and of the run that it is a consult of, are in the engine."""
        while party is not None:
            party.pending += requests
            party = party.parent
        self.news.set()

    async def settle(self) -> None:
        """Returns when every request that can arrive without a further step has arrived."""
        quiet = 0
        while quiet < QUIET_TURNS:
            while not all(party.pending for party in self._parties):
                self.news = asyncio.Event()  # of the loop that runs now
                await self.news.wait()
            self.news.clear()
            await asyncio.sleep(0)
            quiet = 0 if self.news.is_set() else quiet + 1


# --- the engine

PREFILL_TOKENS = 16384
"""Padded tokens of one prefill forward."""
DENSITY = 0.75
"""Smallest share of live rows among the decoded slots before they are brought together."""


@dataclass(eq=False, slots=True)
class _Row:
    """One request. Its slot caches all its tokens but the last, which is the next step's input."""

    prompt: tuple[int, ...]
    seed: int
    limit: int
    stops: Stops
    temperature: float
    uniforms: list[float]
    party: Party | None
    future: "asyncio.Future[Completion]"
    sampled: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    slot: int = -1
    cached: int = 0
    """Leading tokens that its run had left in the slot."""
    live: bool = False
    """Being decoded. A row that is done keeps its slot for its run to come back to."""

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prompt, *self.sampled)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.sampled)

    @property
    def order(self) -> tuple[Any, ...]:
        """Where it stands among those who join together, whenever each arrived."""
        return (len(self.prompt) - self.cached, self.party.key if self.party else "", self.seed, self.prompt)


class LocalEngine:
    """Samples for many graph runs at once; implements ``types.Engine``.

    Tokens and logprobs of a request depend on its prompt and seed, not on its company, up to floating-point rounding. With
    ``deterministic`` not even rounding differs when a job is repeated: batches form only when every active ``run`` waits for
    the engine and no ``busy`` consult is in flight, in an order independent of arrival.

    Args:
        decode: text of token ids, control tokens included.
        max_batch: slots: requests decoded at once; a run that consults keeps its own while nobody else needs it.
        max_context: longest prompt plus completion, in tokens.
    """

    def __init__(
        self,
        model: Any,
        eos_ids: Iterable[int],
        decode: Decode,
        *,
        max_batch: int = 256,
        deterministic: bool = True,
        max_context: int,
    ) -> None:
        self.eos_ids = frozenset(eos_ids)
        self.max_batch = max_batch
        self.max_context = max_context
        self.deterministic = deterministic
        self.version = 0
        self.takes: Literal["weights", "adapter"] = "weights"
        self.in_flight = False
        self._decoder = Decoder(model, max_context)
        self.model = self._decoder.model
        self.device = self._decoder.device
        self._stops = cache(partial(Stops, self.eos_ids, decode, cache(partial(_pieces, decode, self._decoder.vocab_size))))
        self._barrier = Barrier()
        self._waiting: list[_Row] = []
        self._slots: list[_Row | None] = [None] * max_batch
        self._stepping = False  # in another thread
        self._loop: asyncio.Task[None] | None = None

    @classmethod
    def load(cls, config: Config, model_path: str) -> "LocalEngine":
        """The policy at ``model_path`` (directory or hub name) on ``run.device``. Raises ConfigError, EngineError if it does not load."""
        facts, engine = Facts.read(config, model_path), config.engine
        return cls(
            read_weights(model_path, config.policy.dtype, facts.config).to(device_here(config)),
            facts.eos_ids,
            partial(decode, facts.tokenizer),
            max_batch=engine.max_batch,
            deterministic=engine.deterministic,
            max_context=facts.context,
        )

    async def generate(
        self, prompt_ids: Sequence[int], *, seed: int, max_tokens: int, stop: tuple[Stop, ...] = (), temperature: float = 1.0
    ) -> Completion:
        """Samples until an EOS token or a ``stop`` match ("stop"), or ``max_tokens`` or the model's context ("length").

        The i-th token is drawn by inverse CDF with the i-th number of Philox(seed). ``temperature`` 0 is greedy, with logprobs
        at 1. The ids stay as sampled, also where a stop string ends inside the last one. Raises EngineError.
        """
        prompt = tuple(prompt_ids)
        limit = check_request(prompt, max_tokens, temperature, stop, vocab_size=self._decoder.vocab_size, context=self.max_context)
        uniforms = np.random.Generator(np.random.Philox(key=seed)).random(limit).tolist()
        party, future = self._barrier.current, asyncio.get_running_loop().create_future()
        row = _Row(prompt, seed, limit, self._stops(stop), temperature, uniforms, party, future)
        self._barrier.count(party, 1)
        self._waiting.append(row)
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._serve())
            self._loop.add_done_callback(self._ended)
        try:
            return await future
        finally:  # before another batch forms: the loop gives way once it has resolved futures
            self._barrier.count(party, -1)

    @contextlib.contextmanager
    def run(self, key: str) -> Iterator[None]:
        """Entered around one graph run. ``key`` is unique among active runs and orders their requests."""
        yield from self._enter(Party(key))

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Entered around one consult, whose answer takes real time. It may itself sample from this engine."""
        parent = self._barrier.current
        yield from self._enter(Party(parent.key if parent else "", parent))

    def _enter(self, party: Party) -> Iterator[None]:
        try:
            with self._barrier.enter(party):
                yield
        finally:
            self._slots = [None if row and row.party is party and not row.live else row for row in self._slots]

    async def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copies the tensors in place, all or none; later completions carry ``version``. Names are those of ``state_dict``.

        Raises EngineError while a request is served, and for unknown, missing or misshapen tensors.
        """
        if self._stepping and self._loop and all(row.future.done() for row in [*self._live, *self._waiting]):
            await asyncio.wait({self._loop})  # the last step of what was cancelled
        if not self._stepping:
            self._drop_cancelled()
        if count := len(self._live) + len(self._waiting):
            raise EngineError(f"weights {version} cannot be loaded while {count} requests are sampled; wait for them")
        targets, given = self.model.state_dict(), dict(weights)
        wrong = [name for name, tensor in given.items() if name not in targets or tensor.shape != targets[name].shape]
        covered = {targets[name].data_ptr() for name in given.keys() & targets.keys()}  # a tied tensor is covered by its twin
        wrong += [name for name, target in targets.items() if target.data_ptr() not in covered]
        if wrong:
            raise EngineError(f"weights {version}: {wrong[0]!r} is unknown, missing or of another shape; send all of the same model")
        self.model.load_state_dict(given, strict=False)
        self._slots = [None] * self.max_batch
        self.version = version

    async def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """log p(token t | tokens < t) for t = 1, 2, … at temperature 1, in one pass without the cache. Raises EngineError."""
        if len(token_ids) < 2:
            raise EngineError(f"{len(token_ids)} tokens have no logprobs; give at least 2")
        check_request(token_ids, 1, 0.0, vocab_size=self._decoder.vocab_size, context=self.max_context)
        row = torch.tensor([list(token_ids)], device=self.device)
        with torch.no_grad():
            scores = self.model(input_ids=row[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
        return tuple(scores.gather(1, row[0, 1:, None])[:, 0].tolist())

    async def sleep(self) -> None:
        """Does nothing: what it holds are the weights."""

    async def close(self) -> None:
        """Does nothing: it started nothing."""

    async def _serve(self) -> None:
        while self._waiting or self._live:
            await asyncio.sleep(0)
            if self.deterministic and self._barrier.news.is_set():
                await self._barrier.settle()
            self._drop_cancelled()
            joiners = self._admit()
            if not (rows := self._compact()):
                continue
            if self.device.type == "cpu":
                self._step(joiners, rows)  # a thread would cost more than a tiny model's step
            else:
                self._stepping = True
                await asyncio.to_thread(self._step, joiners, rows)
                self._stepping = False
            self._finish(rows)

    def _ended(self, loop: "asyncio.Task[None]") -> None:
        """Whatever stopped the loop, nobody is left waiting."""
        error = None if loop.cancelled() else loop.exception()
        if error is None and not loop.cancelled():
            return
        rows, self._waiting = self._waiting + self._live, []
        self._slots, self._stepping = [None] * self.max_batch, False
        self._decoder.reset()
        for row in rows:
            if error is None:
                row.future.cancel()
            elif not row.future.done():
                row.future.set_exception(EngineError(f"the model failed while sampling: {type(error).__name__}: {first_line(error)}"))

    @property
    def _live(self) -> list[_Row]:
        return [row for row in self._slots if row is not None and row.live]

    def _drop_cancelled(self) -> None:
        self._waiting = [row for row in self._waiting if not row.future.done()]
        for row in self._live:
            if row.future.done():
                row.live = False
                self._slots[row.slot] = None

    def _admit(self) -> list[_Row]:
        """Gives waiting rows a slot: the one where their run left off, else a free one, else one that a run may come back to."""
        if not self._waiting:
            return []
        self._waiting.sort(key=lambda row: row.order)
        free = self.max_batch - len(self._live)
        joiners, self._waiting = self._waiting[:free], self._waiting[free:]
        pasts: dict[Party, list[_Row]] = {}
        for old in self._slots:
            if old is not None and old.party is not None and not old.live:
                pasts.setdefault(old.party, []).append(old)
        for row in joiners:
            mine = pasts.get(row.party, []) if row.party else []
            best = max((old for old in mine if row.prompt[: len(old.tokens)] == old.tokens), key=lambda old: old.length, default=None)
            if best is not None:
                mine.remove(best)
                row.slot, row.cached = best.slot, best.length - 1
                self._slots[row.slot] = row
        spare = [slot for slot, old in enumerate(self._slots) if old is None] + [old.slot for mine in pasts.values() for old in mine]
        for row, slot in zip((row for row in joiners if row.slot < 0), spare, strict=False):
            row.slot = slot
            self._slots[slot] = row
        for row in joiners:
            row.live = True
        return sorted(joiners, key=lambda row: row.order)

    def _compact(self) -> list[_Row]:
        """The live rows by slot, brought together where too many slots between them would be decoded for nothing."""
        rows = self._live
        if not rows or len(rows) >= DENSITY * (rows[-1].slot + 1):
            return rows
        holes = [slot for slot in range(len(rows)) if (old := self._slots[slot]) is None or not old.live]
        pairs = []
        for slot, row in zip(holes, rows[-len(holes) :], strict=True):
            old, self._slots[slot], self._slots[row.slot] = self._slots[slot], row, self._slots[slot]
            pairs.append((row.slot, slot))
            if old is not None:
                pairs.append((slot, row.slot))
                old.slot = row.slot
            row.slot = slot
        self._decoder.move(pairs, max(row.length for row in self._slots if row is not None))
        return self._live

    def _step(self, joiners: list[_Row], rows: list[_Row]) -> None:
        """Prefills the joiners, in order of what they need, and samples one token for every live row.

        A joiner's last token is left to the common step, so that all sampling happens there.
        """
        while joiners and (need := len(joiners[-1].prompt) - 1 - joiners[-1].cached):
            close = sum(2 * (len(row.prompt) - 1 - row.cached) >= need for row in joiners)
            count = max(1, min(close, PREFILL_TOKENS // need))
            joiners, group = joiners[:-count], joiners[-count:]
            new = [list(row.prompt[row.cached : -1]) for row in group]
            # The padding's columns are overwritten by the row's own tokens before anything sees them.
            padded = [ids + [0] * (need - len(ids)) for ids in new]
            self._decoder.forward([row.slot for row in group], padded, [row.cached for row in group])
        # A slot between live rows decodes a 0 at the column that whoever comes back to it writes first.
        slots = range(rows[-1].slot + 1)
        last, starts = [[0] for _ in slots], [old.length - 1 if (old := self._slots[slot]) else 0 for slot in slots]
        for row in rows:
            last[row.slot] = [row.sampled[-1] if row.sampled else row.prompt[-1]]
        logits = self._decoder.forward(slots, last, starts)
        if len(rows) < len(slots):
            logits = logits[[row.slot for row in rows]]
        ids, logprobs = draw(logits, [row.temperature for row in rows], [row.uniforms[len(row.sampled)] for row in rows])
        for row, token, logprob in zip(rows, ids, logprobs, strict=True):
            row.sampled.append(token)
            row.logprobs.append(logprob)

    def _finish(self, rows: list[_Row]) -> None:
        """Resolves the rows that are done; their columns stay until their run comes back or ends."""
        for row in rows:
            stopped = row.sampled[-1] in row.stops.watch and row.stops.met(row.sampled)
            if not stopped and len(row.sampled) < row.limit:
                continue
            row.live = False
            if row.party is None:
                self._slots[row.slot] = None
            if not row.future.done():
                row.future.set_result(Completion(tuple(row.sampled), tuple(row.logprobs), "stop" if stopped else "length", self.version))
