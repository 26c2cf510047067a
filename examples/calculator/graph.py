"""LangChain's agent with a calculator, as it is; only its model is the policy in training."""

import re

from langchain.agents import create_agent
from langchain_core.tools import tool

from aipo_graph.rollout import Graph, PolicyChatModel


@tool
async def calculator(expression: str) -> str:
    """Works out a sum, a difference or a product of two whole numbers, such as 12*34."""
    match = re.fullmatch(r"([0-9]{1,6})([+*-])([0-9]{1,6})", expression)
    if match is None:  # a text, not an exception: the policy is to learn from it
        return "?"
    a, b = int(match[1]), int(match[3])
    return str({"+": a + b, "-": a - b, "*": a * b}[match[2]])


def build() -> Graph:
    return create_agent(PolicyChatModel(), tools=[calculator])


def solo() -> Graph:
    return create_agent(PolicyChatModel(), tools=[])
