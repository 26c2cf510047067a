"""LangChain's agent with a tool that asks an expert, as it is; only its model is the policy in training."""

from langchain.agents import create_agent
from langchain_core.tools import tool

from aipo_graph.load import load
from aipo_graph.rollout import Graph, PolicyChatModel

CODES: dict[str, str] = load(f"{__file__.removesuffix('graph.py')}task.py:CODES")


@tool
async def ask_expert(letter: str) -> str:
    """The code of a letter."""
    return CODES.get(letter, "?")


def build() -> Graph:
    return create_agent(PolicyChatModel(), tools=[ask_expert])
