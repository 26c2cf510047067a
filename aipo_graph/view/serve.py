"""The page of a live run, read when it is asked for; and how a page is served on loopback, which the demo does too."""

import asyncio
import errno
import hashlib
import ipaddress
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from aipo_graph.errors import ConfigError
from aipo_graph.view.page import csp
from aipo_graph.view.read import ViewedRun, index_of


def guard(host: str) -> Middleware:
    """Refuses requests for any name but this server's: a web page cannot make its own name lead here (DNS rebinding)."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not _ours(request.headers.get("Host", ""), host):
            raise web.HTTPForbidden(text="this server answers to its address and to localhost only")
        return await handler(request)

    return check


def secured(policy: str) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """The headers of every response, for ``Application.on_response_prepare``; ``policy``: its Content-Security-Policy."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
        response.headers["Cache-Control"] = "no-store"

    return add


def application(runs: Sequence[ViewedRun], page: str, host: str) -> web.Application:
    """``GET /`` the page, ``/index`` its index with an ETag, ``/page?run=0&page=3`` traces. The runs must be live ones."""
    reading = asyncio.Lock()
    written = b""

    async def show(request: web.Request) -> web.StreamResponse:
        return _packed(page.encode(), "text/html")

    async def index(request: web.Request) -> web.StreamResponse:
        nonlocal written
        async with reading:
            changed = [await asyncio.to_thread(viewed.refresh) for viewed in runs]
            if any(changed) or not written:
                written = await asyncio.to_thread(index_of, runs)
        tag = hashlib.sha256(written).hexdigest()[:32]
        if any(known.value == tag for known in request.if_none_match or ()):
            return web.Response(status=304, headers={"ETag": f'"{tag}"'})
        return _packed(written, "application/json", {"ETag": f'"{tag}"'})

    async def traces(request: web.Request) -> web.StreamResponse:
        try:
            viewed, number = runs[_natural(request, "run")], _natural(request, "page")
            async with reading:
                return _packed(await asyncio.to_thread(viewed.page, number), "application/json")
        except LookupError as error:
            raise web.HTTPNotFound(text="no such page of traces, or no longer: read the index again") from error

    app = web.Application(middlewares=[guard(host)])
    app.on_response_prepare.append(secured(csp(page)))
    app.add_routes([web.get("/", show), web.get("/index", index), web.get("/page", traces)])
    return app


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where it cannot be had."""
    try:
        host.encode("idna")  # else a bare TypeError comes from create_server
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except UnicodeError as error:
        raise ConfigError(f"--host {host}: no name of a machine; choose another, 127.0.0.1 for this machine alone") from error
    except OSError as error:
        raise ConfigError(_refused(host, port, error)) from error


@asynccontextmanager
async def serving(app: web.Application, listening: socket.socket, *, cancels: bool = False) -> AsyncIterator[str]:
    """The page is served, at the URL. ``cancels``: whether who goes away cancels the handler of their request."""
    runner = web.AppRunner(app, handler_cancellation=cancels, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        host, port = listening.getsockname()[:2]
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    finally:
        await runner.cleanup()


@contextmanager
def told_to_end() -> Iterator[asyncio.Event]:
    """Set by SIGINT and by SIGTERM. After this block they end the process at once, whatever is still being closed."""
    told, loop = asyncio.Event(), asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, told.set)
    try:
        yield told
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def serve(app: web.Application, host: str, port: int, started: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM; ``started`` is told the URL. Raises ConfigError where the port cannot be had."""
    with bound(host, port) as listening:
        async with serving(app, listening) as url:
            with told_to_end() as told:
                started(url)
                await told.wait()


def _refused(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use; choose another --port, or 0 for any that is free"
    if error.errno == errno.EACCES:
        return f"port {port} may not be opened by you; choose a --port above 1023"
    why = str(error.strerror or error).partition(" (while")[0]  # Python repeats the address
    return f"cannot listen on {host}, port {port} ({why}); choose another --host, 127.0.0.1 for this machine alone"


def _ours(given: str, host: str) -> bool:
    """An address can be no other site's name; a name can."""
    try:
        name = urlsplit(f"//{given}").hostname or ""
        return name in ("localhost", host.lower()) or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _natural(request: web.Request, key: str) -> int:
    """A number of the query. Raises KeyError for anything else."""
    text = request.query.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise KeyError(key)
    return int(text)


def _packed(body: bytes, content_type: str, headers: dict[str, str] | None = None) -> web.Response:
    response = web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)
    response.enable_compression()
    return response
