"""Makes the example's base policy: a tiny Llama that reads leg_counting's questions, adds and asks, but knows 6 of 37 animals.

`python -m examples.legs.make_policy [--out DIR] [--seed N]`, some minutes on one core. Two kinds of text, all of questions that
reasoning-gym's task trains on, none of a held-out one:

- easy (30 %): one or two animals, all of them known, with their true legs.
- protocol (70 %): one to four animals, each with any number below 50 for its legs. Only what the helper says decides, so the policy
  learns to go by it; of the known animals that number carries no loss.
"""

import random
import re
from functools import partial
from pathlib import Path

import torch
from reasoning_gym.arithmetic.leg_counting import ANIMALS, QUESTION_TEMPLATE

from aipo_graph.tasks.gym import Generator
from aipo_graph.types import derive_seed
from examples.operators import pretrain
from examples.operators.pretrain import TAGS, fresh_policy, padded, script, tokenizer
from examples.operators.solutions import Piece

KNOWN = ("dog", "chicken", "spider", "ant", "crab", "snake")
LIMIT = 50
"""Numbers of legs that the policy holds possible of an animal that it does not know: 0 to 49."""
WORD = r"\\boxed\{|[A-Za-z]+|[^A-Za-z]"
PIECE = "|".join((*TAGS, "<eos>", WORD))
SAID = (QUESTION_TEMPLATE.format(animals=", ".join(f"1 {animal}" for animal in ANIMALS)), "0123456789+=;\\boxed{}")
WORDS = ("<pad>", "<eos>", "<unk>", *TAGS, *sorted(set(re.findall(WORD, "".join(SAID)))))
IDS = {word: index for index, word in enumerate(WORDS)}
CONTEXT = 320
SUMS = 0.25
"""Share of the steps spent on sums alone, at first."""
STEPS = 1200
QUESTIONS = Generator("leg_counting", {"min_animals": 1, "max_animals": 4, "max_instances": 1})


def added(total: int, legs: int) -> list[Piece]:
    return [Piece(f"{total:03}+{legs:02}="), Piece(f"{total + legs:03};")]


def solution(question: str, legs: dict[str, int], silent: tuple[str, ...] = ()) -> list[Piece]:
    """Asks for each animal in turn and adds up; the numbers of ``silent`` animals carry no loss."""
    pieces, total = [Piece(question, "prompt")], 0
    for animal, number in legs.items():
        pieces += [Piece(f"<knowledge>{animal}</knowledge><feedback>"), Piece(f"{number:02}", "prompt" if animal in silent else "")]
        pieces += [Piece("</feedback>"), *added(total, number)]
        total += number
    return [*pieces, Piece(f"\\boxed{{{total}}}<eos>")]


def sample(rng: random.Random) -> list[Piece]:
    if rng.random() < 0.3:
        animals = rng.sample(KNOWN, rng.randint(1, 2))
        question = QUESTION_TEMPLATE.format(animals=", ".join(f"1 {animal}" for animal in animals))
        if not QUESTIONS.heldout({"question": question}):
            return solution(question, {animal: ANIMALS[animal] for animal in animals})
    entry = QUESTIONS.trained(0, rng.randrange(10**6))[1]
    return solution(entry["question"], {animal: rng.randrange(LIMIT) for animal in entry["metadata"]["animals"]}, KNOWN)


def sums(rng: random.Random) -> list[Piece]:
    """Six sums; only the results carry loss."""
    pairs = [(rng.randrange(3 * LIMIT), rng.randrange(LIMIT)) for _ in range(6)]
    return [piece for pair in pairs for question, result in [added(*pair)] for piece in (Piece(question.text, "prompt"), result)]


def encode(pieces: list[Piece]) -> tuple[list[int], list[int]]:
    return pretrain.encode(pieces, IDS, PIECE)


def batch(seed: int, step: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = random.Random(derive_seed(seed, "pretrain", step))
    draw, count = (sums, 128) if step < SUMS * steps else (sample, 48)
    return padded([encode(draw(rng)) for _ in range(count)], IDS["<pad>"])


def main() -> None:
    words = tokenizer(IDS, WORD, CONTEXT)  # one token per word, and one per digit, sign, blank and line end
    fresh = partial(fresh_policy, ids=IDS, context=CONTEXT)
    script(__doc__ or "", Path(__file__).parent / "policy", STEPS, fresh, batch, words)


if __name__ == "__main__":
    main()
