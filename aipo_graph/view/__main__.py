"""Look at a run: `python -m aipo_graph.view RUN [OTHER]` writes its traces and curves as one HTML file and opens it."""

import asyncio
import sys
import webbrowser
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg, CliToggleFlag
from rich.console import Console

from aipo_graph import cli
from aipo_graph.config import Section
from aipo_graph.errors import ConfigError
from aipo_graph.load import nearest
from aipo_graph.view.read import ViewedRun, index_of
from aipo_graph.view.record import SCRIPTS, STYLES, assemble, has_display

RUNS = Path("runs")


class View(Section):
    """Shows what a run did: its traces token by token, with what was learned from them, and its curves. Writes one HTML file that needs
    nothing else, and opens it."""

    run: CliPositionalArg[str]
    """A run's folder, or its name below runs/."""
    other: CliPositionalArg[str | None] = None
    """A second run, to compare it with."""
    out: str = ""
    """The file to write; default: view.html in the first run's folder."""
    no_open: CliToggleFlag[bool] = False
    """Do not open it in a browser; also written --no-open."""
    traces: PositiveInt = 2000
    """Of a run with more, evenly spaced steps are shown."""
    serve: CliToggleFlag[bool] = False
    """Serve the page instead, and follow a run that goes on, until Ctrl-C."""
    host: str = "127.0.0.1"
    """Address to serve on; whoever reaches it reads the run."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8050
    """Port to serve on, 0 for any that is free."""


def run_folder(name: str) -> Path:
    """The folder of a run, or of that name below ``runs/``. Raises ConfigError where there is none, or no run in it."""
    try:
        folder = next((path for path in (Path(name), RUNS / name) if path.is_dir()), None)
        if folder is None:
            if Path(name).is_file():
                raise ConfigError(f"{name} is a file: give the folder of the run that it belongs to")
            there = [path.name for path in RUNS.iterdir() if path.is_dir()] if RUNS.is_dir() else []
            raise ConfigError(f"no run {name!r} here or in {RUNS}/{nearest(name, there)}")
        if not any((folder / file).exists() for file in ("traces.jsonl", "metrics.jsonl", "config.yaml")):
            raise ConfigError(
                f"{folder} is no run's folder: it has no traces.jsonl, metrics.jsonl or config.yaml; name one that training wrote"
            )
    except OSError as error:
        raise ConfigError(f"run {name!r} cannot be looked at: {error.strerror}; name another, or make it readable") from error
    return folder


def opened(names: Sequence[str], traces: int) -> list[ViewedRun]:
    """One run, or two that are not the same, not yet read."""
    folders = [run_folder(name) for name in names]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(f"{' and '.join(names)} are one run; name another to compare it with, or none")
    return [ViewedRun(folder, traces) for folder in folders]


def build(runs: Sequence[ViewedRun]) -> str:
    """The page of runs as they are now."""
    for viewed in runs:
        viewed.refresh()
    pages = ((f"page-{place}-{number}", viewed.page(number)) for place, viewed in enumerate(runs) for number in viewed.shown())
    try:
        return assemble(_title(runs), SCRIPTS, STYLES, chain([("index", index_of(runs))], pages))
    except LookupError as error:
        raise ConfigError("traces.jsonl was cut off while it was read, for the run goes on; repeat the command") from error


def make(names: Sequence[str], out: str | Path | None, traces: int, opens: bool) -> Path:
    """The page of runs as a file, whole or not at all, opened where there is a display."""
    runs, console = opened(names, traces), Console(soft_wrap=True, highlight=False)
    if out and Path(out).suffix not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: the file's name must end in .html")
    file = Path(out) if out else runs[0].folder / "view.html"
    with Console(stderr=True).status("reading"):
        page = build(runs)
    try:
        cli.write_whole(file, page)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}; choose another --out") from error
    counts = [(found["shown"], found["recorded"]) for found in _noted(runs, console)]
    told = " and ".join(f"{shown:,} traces" if shown == recorded else f"{shown:,} of {recorded:,} traces" for shown, recorded in counts)
    console.print(f"{cli.printable(str(file))}: {told}, {file.stat().st_size / 1e6:.2f} MB", markup=False)
    if opens and has_display():
        webbrowser.open(file.resolve().as_uri())
    return file


def show(given: View, runs: Sequence[ViewedRun]) -> None:
    """The page, served until Ctrl-C."""
    from aipo_graph.view.serve import bound, following, serve  # half a second that the file does not need

    console = Console(soft_wrap=True, highlight=False)
    for viewed in runs:
        viewed.refresh()
    _noted(runs, console)
    with bound(given.host, given.port) as listening:
        app = following(runs, assemble(_title(runs), SCRIPTS, STYLES, live=True), given.host)
        names = " and ".join(str(viewed.folder) for viewed in runs)
        asyncio.run(serve(app, listening, names, "read the run", console, not given.no_open))


def command(argv: list[str]) -> None:
    given, _ = cli.parse(argv, View, prog="python -m aipo_graph.view")
    names = [name for name in (given.run, given.other) if name is not None]
    if not given.serve:
        make(names, given.out, given.traces, not given.no_open)
    elif given.out:
        raise ConfigError("--out: --serve writes no file; leave one of them out")
    else:
        show(given, opened(names, given.traces))


def _title(runs: Sequence[ViewedRun]) -> str:
    return f"{cli.printable(' and '.join(viewed.name for viewed in runs))} · aipo_graph"


def _noted(runs: Sequence[ViewedRun], console: Console) -> list[dict[str, Any]]:
    """The runs' indices, whose notes are said."""
    told = [viewed.index() for viewed in runs]
    for found in told:
        for note in found["notes"]:
            console.print(f"note: {found['name']}: {cli.printable(note)}", markup=False)
    return told


if __name__ == "__main__":
    sys.exit(cli.main(command))
