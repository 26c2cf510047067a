"""Asynchronous work for callers that are not (a script, a thread, a notebook whose thread runs a loop), and plain work for one that is."""

import _thread
import asyncio
import contextlib
import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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


def inner(function: Any) -> Any:
    """A function itself, of a partial."""
    return inner(function.func) if isinstance(function, functools.partial) else function


async def call(function: Callable[..., Any], *args: Any, named: Mapping[str, Any], late: list[Future[Any]]) -> Any:
    """What a function of a user's gives, async or plain. A plain one runs in a thread that nobody waits for at the end of the process: what
    does not end in time cannot be ended, and is one of ``late`` from then on."""
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return await function(*args, **named)
    context, ended = copy_context(), Future[Any]()
    ended.set_running_or_notify_cancel()  # so that whoever stops waiting for it does not cancel it

    def work() -> None:
        try:
            ended.set_result(context.run(function, *args, **named))
        except BaseException as error:  # noqa: BLE001  # raised where the call is awaited
            ended.set_exception(error)

    _thread.start_new_thread(work, ())  # a Thread's start waits for it, and the whole event loop with it
    try:
        value = await asyncio.wrap_future(ended)
    except asyncio.CancelledError:
        late[:] = [*(call for call in late if not call.done()), ended]
        raise
    return await value if inspect.isawaitable(value) else value
