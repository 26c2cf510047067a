"""Watch a policy work: `python -m aipo_graph.demo MODEL ["question"]` in the terminal, with `--web` on a page.

Here is what is asked of it: its command line, the settings of a run and what is shown how; and the questions that people type.
"""

import random
import sys
from functools import cache, partial
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic_settings import CliPositionalArg, CliToggleFlag

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError
from aipo_graph.evaluate import own_settings, with_model
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.types import Problem

PROG = "python -m aipo_graph.demo"
MOST_SAMPLES = 16
"""Of one question on the page."""


class Demo(Config):
    """Show a trace as it is made: what the policy writes, whom it consults, what they reply. Without a question, ask for them."""

    model: CliPositionalArg[str] = "operators"
    """A model directory, the folder of a run, `operators` (the shipped base policy), or a hub name."""
    question: CliPositionalArg[str] = ""
    """What the policy is to solve."""
    graph: str = ""
    """The graph with agents: path.py:function, or package.module:function; default: rollout.graph."""
    with_agents: CliToggleFlag[bool] = False
    """Run the graph with agents; the default, also written --with-agents."""
    alone: CliToggleFlag[bool] = False
    """Run the graph without agents."""
    compare: CliToggleFlag[bool] = False
    """Run both and show them side by side."""
    temperature: NonNegativeFloat | None = None
    """Of the policy, 0 for greedy; default: rollout.temperature."""
    seed: NonNegativeInt | None = None
    """Of the first sample; default: run.seed."""
    samples: PositiveInt = 1
    """Traces per question."""
    web: CliToggleFlag[bool] = False
    """Show a page in the browser instead: alone and with agents side by side, several samples and their votes, earlier questions."""
    host: str = "127.0.0.1"
    """web: the address that it listens on. Whoever reaches it may use the model: another one than this machine's own at your own risk."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8060
    """web: the port that it listens on; 0 is any free one."""
    no_open: CliToggleFlag[bool] = False
    """web: leave the browser closed; also written --no-open."""


def settings(argv: list[str]) -> Demo:
    """The command line; without --config, the model's own run folder or the quick start says the rest."""
    demo, options = cli.parse(argv, Demo, prog=PROG)
    if options.file is None:
        demo, options = cli.parse([*argv, "--config", str(own_settings(demo.model))], Demo, prog=PROG)
    if options.dry_run:
        print(cli.write_yaml(Config.model_validate({name: getattr(demo, name) for name in Config.model_fields})), end="")
        sys.exit()
    if demo.alone + demo.with_agents + demo.compare > 1:
        raise ConfigError("--alone, --with-agents and --compare: choose one")
    if demo.web and demo.samples > MOST_SAMPLES:
        raise ConfigError(f"--samples {demo.samples}: the page shows at most {MOST_SAMPLES} of a question")
    if demo.alone and demo.graph:
        raise ConfigError("--graph names the graph with agents: leave out --alone, or name the one without as --rollout.solo")
    demo, _ = with_model(demo, demo.model)
    rollout = demo.rollout.model_copy(update={"graph": demo.graph or demo.rollout.graph})
    # On the page a slow helper must not hold up the runs of another tab.
    engine = demo.engine.model_copy(update={"deterministic": demo.engine.deterministic and not demo.web})
    return demo.model_copy(update={"rollout": rollout, "engine": engine})


# --- from what a person types to a problem

POOL = 256
"""Held-out problems of a kind that are drawn from, and whose answers are known."""


class Questions:
    """Turns words into problems, with the answer where it is known: a held-out problem's, or one that the task can solve itself."""

    def __init__(self, rollouts: Rollouts, seed: int) -> None:
        self._tokenizer = rollouts.tokenizer
        self._held_out = cache(partial(rollouts.task.heldout, POOL))
        self._answers = {problem.question: problem for problem in self._held_out("")}
        self.example = next(iter(self._answers), "")
        # Optional beside the Task protocol: solve(question) -> answer, or None for what is not one of its questions.
        self._solve = getattr(rollouts.task, "solve", lambda question: None)
        self._rng = random.Random(seed)

    def sample(self, kind: str = "") -> Problem:
        """A held-out problem of a kind (default: the task's main one). Raises ConfigError, TaskError."""
        held_out = self._held_out(kind)
        if not held_out:
            raise ConfigError("this task has no held-out problems to draw from: type a question")
        problem = self._rng.choice(held_out)
        self._answers[problem.question] = problem
        return problem

    def read(self, question: str) -> Problem:
        """Raises ConfigError for characters that the model's tokenizer cannot write."""
        unknown = [c for c in dict.fromkeys(question) if not c.isspace() and not self._tokenizer.plain(c)[0]]
        if unknown:
            raise ConfigError(
                f"the model's tokenizer does not know {' '.join(unknown)!r}: a question of this task looks like {self.example!r}"
            )
        return self._answers.get(question) or Problem("demo", question, self._solve(question) or "")
