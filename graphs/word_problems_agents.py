"""Agents for word problems: Verify checks an equation with sympy, Knowledge searches a small corpus.

Each works without a language model; with one in `agents.models` (verify: openai:gpt-5-mini) the model answers and calls the tool.
Reasoning is a language model alone, which needs no function here: `agents.use.reasoning: ""` and `agents.models.reasoning: …`.
"""

from aipo_graph.config import Config
from aipo_graph.rollout import Agent
from aipo_graph.tasks.datasets import CORPUS
from aipo_graph.tools.retrieval import Corpus
from aipo_graph.tools.symbolic import check


def verify(config: Config) -> Agent:
    return Agent("verify", tools=(check,))


def knowledge(config: Config) -> Agent:
    facts = Corpus.read(CORPUS)

    async def search(query: str) -> str:
        """Finds the fact of the corpus that fits the request best."""
        found = facts.search(query)
        return found[0].text if found else "Unknown."

    return Agent("knowledge", tools=(search,))
