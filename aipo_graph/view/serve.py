"""The page of a live run, read when it is asked for; and how a page is served on loopback, which the demo does too."""

import asyncio
import hashlib
import ipaddress
import signal
import socket
import webbrowser
from collections.abc import Sequence
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler
from rich.console import Console

from aipo_graph.cli import printable
from aipo_graph.errors import AipoError, ConfigError
from aipo_graph.view.read import ViewedRun, index_of
from aipo_graph.view.record import csp, has_display


def application(page: str, host: str) -> web.Application:
    """``GET /`` the page. Refuses requests for any name but this server's (a web page cannot make its own lead here: DNS rebinding) and
    posts of other pages. What is refused is said in one line of JSON.
    """

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if not _ours(request.headers.get("Host", ""), host):
                raise web.HTTPForbidden(reason="this server answers to its address and to localhost only")
            if request.method == "POST" and request.headers.get("Origin") not in (f"http://{request.host}", f"https://{request.host}"):
                raise web.HTTPForbidden(reason="only the page itself may ask")
            if request.method == "POST" and request.content_type != "application/json":
                raise web.HTTPUnsupportedMediaType(reason="the body must be application/json")
            return await handler(request)
        except AipoError as error:
            return web.json_response({"error": printable(str(error))}, status=400)
        except web.HTTPException as error:
            return web.json_response({"error": error.reason}, status=error.status)

    async def secured(request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(headers)

    async def show(request: web.Request) -> web.Response:
        return _packed(page.encode(), "text/html")

    headers = {
        "Content-Security-Policy": csp(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
    app = web.Application(middlewares=[guard], client_max_size=1 << 20)
    app.on_response_prepare.append(secured)
    app.router.add_get("/", show)
    return app


def following(runs: Sequence[ViewedRun], page: str, host: str) -> web.Application:
    """The page of runs that go on: ``/index`` its index with an ETag, ``/page/0/3`` the traces of a group of a run."""
    reading = asyncio.Lock()
    written = b""

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
            viewed, number = runs[int(request.match_info["run"])], int(request.match_info["page"])
            async with reading:
                return _packed(await asyncio.to_thread(viewed.page, number), "application/json")
        except LookupError as error:
            raise web.HTTPNotFound(reason="no such page of traces, or no longer: read the index again") from error

    app = application(page, host)
    app.add_routes([web.get("/index", index), web.get("/page/{run:[0-9]{1,9}}/{page:[0-9]{1,9}}", traces)])
    return app


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where it cannot be had."""
    try:
        host.encode("idna")  # else a bare TypeError comes from create_server
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        why = str(getattr(error, "strerror", None) or error).partition(" (while")[0]  # Python repeats the address
        raise ConfigError(
            f"cannot listen on {host}, port {port} ({why}); choose another --port, 0 for any that is free, or another --host, "
            "127.0.0.1 for this machine alone"
        ) from error


async def serve(app: web.Application, listening: socket.socket, what: str, danger: str, console: Console, opens: bool) -> None:
    """Serves until SIGINT or SIGTERM, a second of which ends the process at once. Who goes away cancels the handler of their request.

    Args:
        what: said beside the URL. ``danger``: what anybody can do who reaches another address than this machine's own.
        opens: in a browser, where there is a display.
    """
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, ended.set)
        host, port = listening.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        if not ipaddress.ip_address(host).is_loopback:
            console.print(f"note: whoever can reach {host} can {danger}", markup=False)
        console.print(f"{url}: {printable(what)}; Ctrl-C ends it", markup=False)
        if opens and has_display():
            await asyncio.to_thread(webbrowser.open, url)
        await ended.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        await runner.cleanup()


def _ours(given: str, host: str) -> bool:
    """An address can be no other site's name; a name can."""
    try:
        name = urlsplit(f"//{given}").hostname or ""
        return name in ("localhost", host.lower()) or bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _packed(body: bytes, content_type: str, headers: dict[str, str] | None = None) -> web.Response:
    response = web.Response(body=body, content_type=content_type, charset="utf-8", headers=headers)
    response.enable_compression()
    return response
