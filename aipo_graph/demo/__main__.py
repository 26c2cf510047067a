"""`python -m aipo_graph.demo MODEL ["question"] [--web]`."""

import asyncio
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging

from aipo_graph import cli
from aipo_graph.demo.options import settings
from aipo_graph.demo.terminal import converse
from aipo_graph.demo.web import serve
from aipo_graph.engines import open_engine
from aipo_graph.engines.chat import open_chats
from aipo_graph.engines.launch import launched
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.tasks.open import open_task
from aipo_graph.view.serve import bound


def command(argv: list[str]) -> None:
    demo = settings(argv)
    console = Console(highlight=False)
    logging.disable_progress_bar()
    torch.set_num_threads(demo.run.threads)
    with ExitStack() as stack:
        # Taken first: who finds it in use need not wait for the model.
        listening = stack.enter_context(bound(demo.host, demo.port)) if demo.web else None
        served = stack.enter_context(launched(demo, demo.policy.model, Path(demo.run.dir), console))
        runner = stack.enter_context(asyncio.Runner())
        engine = runner.run(open_engine(served, demo.policy.model))
        stack.callback(lambda: runner.run(engine.close()))
        rollouts = Rollouts.open(served, engine, open_task(demo), runner.run(open_chats(served, engine)))
        if demo.temperature is not None:
            rollouts = replace(rollouts, temperature=demo.temperature)
        if listening:
            runner.run(serve(demo, listening, rollouts, console))
        else:
            converse(runner, rollouts, demo, console)


if __name__ == "__main__":
    sys.exit(cli.main(command))
