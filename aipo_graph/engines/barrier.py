"""When a batch may form: once every active graph run waits for the engine and no consult is in flight.

Runs come back from their helpers at times that nothing controls. Whoever samples only at such points sees the same requests
together in every repetition of a job, hence the same floating-point sums.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

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
        self._idle: set[Party] = set()
        self._news = asyncio.Event()
        self.events = 0

    @property
    def current(self) -> Party | None:
        """The innermost run or consult of this barrier that the calling task is in."""
        party = _current.get()
        return party if party in self._parties else None

    @contextlib.contextmanager
    def enter(self, party: Party) -> Iterator[None]:
        self._parties.add(party)
        self._idle.add(party)
        self._tell()
        token = _current.set(party)
        try:
            yield
        finally:
            _current.reset(token)
            self._parties.discard(party)
            self._idle.discard(party)
            self._tell()

    def hold(self, party: Party | None) -> None:
        """One more request of the party, and of the run that it is a consult of, is in the engine."""
        while party is not None:
            party.pending += 1
            self._idle.discard(party)
            party = party.parent
        self._tell()

    def release(self, party: Party | None) -> None:
        while party is not None:
            party.pending -= 1
            if not party.pending and party in self._parties:
                self._idle.add(party)
            party = party.parent
        self._tell()

    def _tell(self) -> None:
        self.events += 1
        self._news.set()

    def bind(self) -> None:
        """Serves the running event loop from now on."""
        self._news = asyncio.Event()

    async def settle(self) -> None:
        """Returns when every request that can arrive without a further step has arrived."""
        quiet = 0
        while quiet < QUIET_TURNS:
            while self._idle:
                self._news.clear()
                await self._news.wait()
            seen = self.events
            await asyncio.sleep(0)
            quiet = quiet + 1 if seen == self.events else 0
