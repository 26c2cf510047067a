"""The shopping task's three agents: each is an Agent instance with one tool, named by path in `agents.use`."""

from pathlib import Path

from aipo_graph import load
from aipo_graph.config import Config
from aipo_graph.rollout import Agent

_TASK = str(Path(__file__).with_name("task.py"))


def verify(config: Config) -> Agent:
    check = load.load(f"{_TASK}:check")

    async def check_sum(claim: str) -> str:
        """Checks one sum, such as 4635-2314=2321: yes or no."""
        return str(check(claim))

    return Agent("verify", tools=(check_sum,))


def knowledge(config: Config) -> Agent:
    lookup = load.load(f"{_TASK}:lookup")

    async def search(query: str) -> str:
        """Finds what the corpus says about a query, such as pear at Ada."""
        return str(lookup(query))

    return Agent("knowledge", tools=(search,))


def reasoning(config: Config) -> Agent:
    plan = load.load(f"{_TASK}:plan")

    async def trades(story: str) -> str:
        """Takes a story apart into what is bought and sold, such as swaps pear at Ada for fig at Cid."""
        return str(plan(story))

    return Agent("reasoning", tools=(trades,))
