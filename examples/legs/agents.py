"""The helper: it knows how many legs each animal of reasoning-gym's leg_counting has."""

from reasoning_gym.arithmetic.leg_counting import ANIMALS

from aipo_graph.config import Config
from aipo_graph.rollout import Agent


async def legs(animal: str) -> str:
    """How many legs an animal has, in two digits."""
    known = ANIMALS.get(animal.strip())
    return "?" if known is None else f"{known:02}"


def knowledge(config: Config) -> Agent:
    return Agent("knowledge", tools=(legs,))
