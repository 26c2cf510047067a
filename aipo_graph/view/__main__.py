"""Look at a run: `python -m aipo_graph.view RUN [OTHER]` writes its traces and curves as one HTML file and opens it."""

import argparse
import asyncio
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress

from aipo_graph import cli
from aipo_graph.cli import write_whole
from aipo_graph.errors import ConfigError
from aipo_graph.load import nearest
from aipo_graph.view.page import SCRIPTS, STYLES, assemble, has_display
from aipo_graph.view.read import ViewedRun, index_of, read_run

RUNS = Path("runs")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m aipo_graph.view",
        description="Shows what a run did: its traces token by token, with what was learned from them, and its curves. Writes one HTML "
        "file that needs nothing else, and opens it.",
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name below runs/")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="a second run, to compare it with")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: view.html in the first run's folder)")
    parser.add_argument("--no-open", action="store_true", help="do not open it in a browser")
    parser.add_argument(
        "--traces",
        type=_natural,
        default=2000,
        metavar="N",
        help="of a run with more, evenly spaced steps are shown (default: %(default)s)",
    )
    parser.add_argument("--serve", action="store_true", help="serve the page instead, and follow a run that goes on, until Ctrl-C")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on; whoever reaches it reads the run (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8050, help="port to serve on, 0 for any that is free (default: %(default)s)")
    return parser


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


def build(folders: Sequence[Path], traces: int, console: Console) -> tuple[str, list[ViewedRun]]:
    """The page of runs as they are now."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        reading = progress.add_task("reading", total=sum(_size(folder) for folder in folders))
        runs = [read_run(folder, traces, lambda size: progress.advance(reading, size)) for folder in folders]
        pages = [(place, number) for place, viewed in enumerate(runs) for number in range(viewed.pages)]

        def data() -> Iterator[tuple[str, bytes]]:
            yield "index", index_of(runs)
            for place, number in progress.track(pages, description="writing"):
                yield f"page-{place}-{number}", runs[place].page(number)

        try:
            return assemble(_title(runs), SCRIPTS, STYLES, data()), runs
        except KeyError as error:
            raise ConfigError("traces.jsonl was cut off while it was read, for the run goes on; repeat the command") from error


def write(folders: Sequence[Path], out: Path, traces: int, console: Console) -> None:
    """The page as a file, whole or not at all."""
    page, runs = build(folders, traces, Console(stderr=True))
    try:
        write_whole(out, page)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; choose another --out") from error
    for viewed in runs:
        _say_notes(viewed, console)
    counts = [(found["shown"], found["recorded"]) for found in (viewed.index() for viewed in runs)]
    told = " and ".join(f"{shown:,} traces" if shown == recorded else f"{shown:,} of {recorded:,} traces" for shown, recorded in counts)
    console.print(f"{cli.printable(str(out))}: {told}, {out.stat().st_size / 1e6:.2f} MB", markup=False)


def show(folders: Sequence[Path], traces: int, host: str, port: int, opens: bool, console: Console) -> None:
    """The page, served until Ctrl-C."""
    from aipo_graph.view.serve import application, serve  # half a second that the file does not need

    runs = [ViewedRun(folder, traces, live=True) for folder in folders]
    for viewed in runs:
        viewed.refresh()
        _say_notes(viewed, console)
    if host not in LOOPBACK:
        console.print(f"note: whoever can reach {host} can read the run", markup=False)

    def started(url: str) -> None:
        console.print(f"{url}: {cli.printable(' and '.join(str(viewed.folder) for viewed in runs))}; Ctrl-C ends it", markup=False)
        if opens:
            webbrowser.open(url)

    asyncio.run(serve(application(runs, assemble(_title(runs), SCRIPTS, STYLES, live=True), host), host, port, started))


def make(names: Sequence[str], out: str | Path | None, traces: int, opens: bool) -> Path:
    """The page of runs as a file, opened where there is a display."""
    folders = folders_of(names)
    if out and Path(out).suffix not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: the file's name must end in .html")
    file = Path(out) if out else folders[0] / "view.html"
    write(folders, file, traces, Console(soft_wrap=True, highlight=False))
    if opens and has_display():
        webbrowser.open(file.resolve().as_uri())
    return file


def folders_of(names: Sequence[str]) -> list[Path]:
    """Of one run, or of two that are not the same."""
    folders = [run_folder(name) for name in names]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError(f"{' and '.join(names)} are one run; name another to compare it with, or none")
    return folders


def command(argv: list[str]) -> None:
    given = _parser().parse_intermixed_args(argv)  # OTHER may come after an option
    names = [name for name in (given.run, given.other) if name is not None]
    if not given.serve:
        make(names, given.out, given.traces, not given.no_open)
        return
    if given.out:
        raise ConfigError("--out: --serve writes no file; leave one of them out")
    console = Console(soft_wrap=True, highlight=False)
    show(folders_of(names), given.traces, given.host, given.port, not given.no_open and has_display(), console)


def _title(runs: Sequence[ViewedRun]) -> str:
    return f"{cli.printable(' and '.join(viewed.name for viewed in runs))} · aipo_graph"


def _say_notes(viewed: ViewedRun, console: Console) -> None:
    for note in viewed.index()["notes"]:
        console.print(f"note: {viewed.name}: {cli.printable(note)}", markup=False)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "traces.jsonl", folder / "metrics.jsonl") if path.is_file())


def _natural(text: str) -> int:
    if not text.isdecimal() or len(text) > 15 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: give 1 or more")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give 0 to 65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(cli.main(command))
