"""A Knowledge agent of one's own: a rule book with gaps."""

from aipo_graph.config import Config
from aipo_graph.rollout import Agent
from aipo_graph.tasks.operators import RULES


def knowledge(config: Config) -> Agent:
    known = {letter: rule for letter, rule in RULES.items() if letter <= "H"}

    async def look_up(operator: str) -> str:
        """The rule of an operator, such as E."""
        return known.get(operator, "?")

    return Agent("knowledge", tools=(look_up,))
