"""The quick start's three agents: each is an Agent instance with one tool, built from the config and named by path in `agents.use`."""

from aipo_graph.config import Config
from aipo_graph.load import data
from aipo_graph.rollout import Agent
from aipo_graph.tasks import operators
from aipo_graph.tools.retrieval import Corpus


def verify(config: Config) -> Agent:
    async def check(claim: str) -> str:
        """Checks one step, such as 8813-6475=2448 (digit by digit, modulo 10): yes or no."""
        return operators.check(claim)

    return Agent("verify", tools=(check,))


def knowledge(config: Config) -> Agent:
    rules = Corpus.read(data("operators_rules.jsonl"))

    async def rule(operator: str) -> str:
        """Looks an operator up in the rule book."""
        found = rules.search(operator)
        return str(found[0].fields["reply"]) if found and len(operator) == 1 else operators.UNKNOWN

    return Agent("knowledge", tools=(rule,))


def reasoning(config: Config) -> Agent:
    async def plan(problem: str) -> str:
        """The order in which to apply numbered operators, as in %1I2E3B."""
        return operators.plan(problem)

    return Agent("reasoning", tools=(plan,))
