"""Asynchronous work for callers that are not: from a script, a thread, or a notebook, in whose thread an event loop runs already."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, interrupted: Callable[[], None] | None = None) -> T:
    """`asyncio.run`, in a thread of its own where this one has a running loop, which then waits.

    Ctrl-C cancels ``main``. While this thread waits, the first one calls ``interrupted`` instead, if it is given.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main)
    begun: list[Any] = []

    async def begin() -> T:
        begun.append(asyncio.current_task())
        return await main

    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(copy_context().run, asyncio.run, begin())
        try:
            if interrupted is not None:
                with contextlib.suppress(KeyboardInterrupt):
                    return ended.result()
                interrupted()
            return ended.result()
        except KeyboardInterrupt:
            for task in begun:
                task.get_loop().call_soon_threadsafe(task.cancel)
            raise
