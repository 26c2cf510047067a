"""`python -m aipo_graph.demo MODEL ["question"] [--web]`; and what the terminal shows: one trace as it is made, by who wrote what."""

import asyncio
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.prompt import Prompt
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from aipo_graph import cli
from aipo_graph.demo import Demo, Questions, settings
from aipo_graph.demo.web import Server
from aipo_graph.engines import open_engine
from aipo_graph.engines.chat import open_chats
from aipo_graph.engines.launch import launched
from aipo_graph.errors import AipoError, EngineError
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.rollout.tokens import FEEDBACK, tags
from aipo_graph.tasks.grading import last_box
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Problem, Segment, Source, Trace, derive_seed
from aipo_graph.view.serve import bound, serve

STYLES: Mapping[Source, str] = {"context": "dim", "policy": "cyan", "agent": "yellow"}
SIDE_BY_SIDE = 100
"""Columns of the narrowest terminal in which --compare does not stack."""


def visible(text: str) -> str:
    """Untrusted text made harmless to a terminal: every character that could move the cursor, colour or reorder is spelt out.

    >>> visible("a\\x1b[31mb\\u202ec\\td")
    'a\\\\x1b[31mb\\\\u202ec    d'
    """
    text = text.replace("\t", "    ")
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


@dataclass
class Turn:
    """What one author wrote at a time."""

    label: str
    source: Source
    text: Text


def turns(segments: Sequence[Segment]) -> list[Turn]:
    """The turns of one superstep's segments; a reply and the tags around it are one."""
    found: list[Turn] = []
    opening, closing = tags(FEEDBACK)
    for segment in segments:
        words = visible(segment.text).rstrip("\n")
        if segment.source == "policy":
            # Alone it writes the replies too, all in one go: a line for each reads like the same with agents.
            words = words.replace(opening, "\n" + opening).replace(closing, closing + "\n").strip("\n")
        text = Text(words, STYLES[segment.source])
        is_tag = segment.source == "context" and segment.author == FEEDBACK
        if is_tag and segment.text != opening and found:
            found[-1].text.append_text(text)
        elif segment.source == "agent" and found and found[-1].label == FEEDBACK:
            found[-1] = Turn(_label(segment), "agent", found[-1].text.append_text(text))
        else:
            found.append(Turn(FEEDBACK if is_tag else _label(segment), segment.source, text))
    return found


def _label(segment: Segment) -> str:
    name = "prompt" if segment.source == "context" else visible(segment.author)
    return name if segment.thread in ("main", name) else f"{name} ({visible(segment.thread)})"


def summary(trace: Trace, answer: str) -> Turn:
    """The last turn: what came of it. The reward only where the right ``answer`` is known."""
    box = last_box(trace.reply)
    parts = ["no boxed answer" if box is None else f"answer {visible(box)}"]
    if answer and trace.trained:
        parts.append(f"reward {trace.reward:g}" + ("" if trace.solved else f" (right is {visible(answer)})"))
    consults = Counter(s.author for s in trace.segments if s.source == "agent")
    parts.append("consults: " + (", ".join(f"{visible(name)} {count}" for name, count in sorted(consults.items())) or "none"))
    tokens = {source: sum(len(s.token_ids) for s in trace.segments if s.source == source) for source in STYLES}
    parts.append("tokens: " + (", ".join(f"{source} {tokens[source]}" for source in STYLES if tokens[source]) or "none"))
    if trace.status != "done":
        parts.append(f"ended: {trace.status}" + (f" ({visible(trace.error)})" if trace.error else ""))
    parts += [name for name in ("violation", "leaks") if trace.scores.get(name)]
    return Turn("summary", "context", Text("; ".join(parts), "bold"))


# --- the screen


class Screen:
    """Where traces are shown: in colour on a terminal, elsewhere and under NO_COLOR as lines that start with their `[author]`."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.plain = not console.is_terminal or console.is_dumb_terminal or console.no_color
        self._width = max(map(len, names)) + 2

    def show(self, turn: Turn) -> None:
        if self.plain:
            # Further lines are indented: only an author's own line starts with a bracket.
            text = turn.text.plain.replace("\n", "\n  ")
            self.console.print(Text(f"[{turn.label}] {text}"), soft_wrap=True)
        else:
            self.console.print(self.row(turn))

    def row(self, turn: Turn) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=self._width, no_wrap=True)
        grid.add_column(overflow="fold", ratio=1)
        indent = "  " if turn.source == "agent" else ""
        grid.add_row(Text(indent + turn.label, f"bold {STYLES[turn.source]}"), turn.text)
        return grid

    def beside(self, columns: Mapping[str, Sequence[Turn]]) -> RenderableType:
        """One panel per title, next to each other where there is room."""
        panels = [Panel(Group(*map(self.row, shown)), title=title, border_style="dim") for title, shown in columns.items()]
        return Columns(panels, width=self.console.width // (1 if self.console.width < SIDE_BY_SIDE else len(panels)) - 1)

    def note(self, text: str) -> None:
        self.console.print(Text(visible(text)), soft_wrap=True)


# --- traces of questions


async def trace_of(rollouts: Rollouts, problem: Problem, seed: int, with_agents: bool, show: Callable[[Turn], None]) -> Trace:
    """One trace, shown superstep by superstep; scored only where the answer is known."""

    def add(segments: Sequence[Segment]) -> None:
        for turn in turns(segments):
            show(turn)

    start = rollouts.run_trace if problem.answer else rollouts.run_graph
    trace = await start(problem, seed=seed, with_agents=with_agents, on_segments=add)
    show(summary(trace, problem.answer))
    return trace


def show_traces(runner: asyncio.Runner, rollouts: Rollouts, screen: Screen, demo: Demo, problem: Problem) -> None:
    """All traces of one question, alone, with agents, or both. Raises EngineError after one that failed."""
    modes = ("alone", "with agents") if demo.compare else ("alone",) if demo.alone else ("with agents",)
    solved = Counter[str]()
    for sample in range(demo.samples):
        seed = derive_seed(demo.run.seed if demo.seed is None else demo.seed, "demo", problem.question, sample)
        columns: dict[str, list[Turn]] = {mode: [] for mode in modes}
        beside = demo.compare and not screen.plain
        live = Live(console=screen.console, transient=True, get_renderable=lambda: screen.beside(columns))  # noqa: B023
        waiting = nullcontext() if screen.plain else live if beside else screen.console.status("", spinner="dots")
        failed = None
        with waiting:
            for mode, column in columns.items():
                if demo.compare and screen.plain:
                    screen.note(f"--- {mode}")
                trace = runner.run(trace_of(rollouts, problem, seed, mode != "alone", column.append if beside else screen.show))
                solved[mode] += trace.solved
                failed = failed or (None if trace.trained else trace.error)
        if beside:
            screen.console.print(screen.beside(columns))
        if failed:
            raise EngineError(failed)
    if demo.samples > 1 and problem.answer:
        screen.note("; ".join(f"{mode}: {solved[mode]} of {demo.samples} solved" for mode in modes))


def converse(runner: asyncio.Runner, rollouts: Rollouts, demo: Demo, console: Console) -> None:
    """Answers the one question of the command line, else one after the other, until `:q` or the end of the input."""
    questions = Questions(rollouts, demo.run.seed)
    screen = Screen(console, ["summary", "policy", *rollouts.agents])
    if demo.question:
        show_traces(runner, rollouts, screen, demo, questions.read(demo.question))
        return
    screen.note(f"Type a question such as {questions.example}, :sample for a held-out problem, :q to leave.")
    while True:
        try:
            words = Prompt.ask(Text("question", "bold"), console=console).strip()
            if words in (":q", ":quit"):
                return
            if words:
                show_traces(runner, rollouts, screen, demo, questions.sample() if words == ":sample" else questions.read(words))
        except EOFError:
            console.print()
            return
        except AipoError as error:
            screen.note(f"error: {error}")


def command(argv: list[str]) -> None:
    demo = settings(argv)
    console = Console(highlight=False)
    logging.disable_progress_bar()
    torch.set_num_threads(demo.run.threads)
    with ExitStack() as stack:
        if demo.web:  # first: who finds the port in use need not wait for the model
            listening = stack.enter_context(bound(demo.host, demo.port))
        served = stack.enter_context(launched(demo, demo.policy.model, Path(demo.run.dir), console))
        runner = stack.enter_context(asyncio.Runner())
        engine = runner.run(open_engine(served, demo.policy.model))
        stack.callback(lambda: runner.run(engine.close()))
        rollouts = Rollouts.open(served, engine, open_task(demo), runner.run(open_chats(served)))
        if demo.temperature is not None:
            rollouts = replace(rollouts, temperature=demo.temperature)
        if demo.web:
            app = Server(demo, rollouts).app()
            runner.run(serve(app, listening, demo.model, "use the model, and read and delete what was asked", console, not demo.no_open))
        else:
            converse(runner, rollouts, demo, console)


if __name__ == "__main__":
    sys.exit(cli.main(command))
