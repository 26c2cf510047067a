"""An endless stream of training steps, and where new weights enter it."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from aipo_graph.errors import ConfigError
from aipo_graph.rollout.collect import Rollouts, Step
from aipo_graph.rollout.sync import Probe, SyncCheck


class LocalRollouts:
    """Rollouts in this process, one step after the other or, with `max_lag = 1`, one step ahead of the learner.

    ``synced`` holds what the last load's probe said, for the log.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        if rollouts.config.rollout.max_lag > 1:
            raise ConfigError(f"rollout.max_lag = {rollouts.config.rollout.max_lag}: this process samples at most 1 step ahead; use 0 or 1")
        self._rollouts = rollouts
        self._published: tuple[Iterable[tuple[str, Any]], int, Probe | None] | None = None
        self._check = SyncCheck(rollouts.config.policy.dtype)
        self.synced: dict[str, float] = {}

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int, probe: Probe | None = None) -> None:
        """Publishes new weights: an engine that can takes them at once, another before it starts on the next step.

        With a ``probe`` the engine's logprobs are compared with the learner's afterwards; EngineError if the load took no effect.
        """
        self._published = (weights, version, probe)
        if self._rollouts.engine.in_flight:
            await self._take()

    async def stream(self, start: int, steps: int, drawn: int) -> AsyncGenerator[Step, None]:
        """Steps start … steps-1 in order, from training problem ``drawn`` on.

        With `max_lag = 1` step s+1 is sampled while the caller learns from step s, except across a checkpoint, so that a resumed
        run samples with just the weights that the undisturbed one did.
        """
        config = self._rollouts.config
        ahead: asyncio.Task[Step] | None = None
        try:
            for number in range(start, steps):
                if ahead is None:
                    await self._take()
                step = await (ahead or self._rollouts.run_step(number, drawn))
                ahead, drawn = None, step.drawn
                if config.rollout.max_lag and number + 1 < steps and (number + 1) % config.run.checkpoint_every:
                    await self._take()
                    ahead = asyncio.create_task(self._rollouts.run_step(number + 1, drawn))
                yield step
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.wait({ahead})

    async def _take(self) -> None:
        """Loads what was published: while the caller of `stream` waits, unless the engine loads in flight; nobody changes weights."""
        if self._published is not None:
            (weights, version, probe), self._published = self._published, None
            await self._rollouts.engine.load_weights(weights, version)
            if probe is not None:
                self.synced = self._check(probe, await self._rollouts.engine.logprobs(probe.token_ids), version)
