"""What policies of the operator task do when the start of a solution is put in: `python -m experiments.probe POLICY …`.

Verify: the chance that a step slips, and that the policy's own verdict is "no" after a right step and after the same step with one digit
changed. Reasoning: does it ask for a plan of two, three and four operators, plan when the request is put in, and go through a plan that
is put in? Greedy.
"""

import random
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch

from aipo_graph import cli, load
from aipo_graph.learn.model import load_model
from aipo_graph.tasks.operators import MARKERS, OPERATORS, RULES, Operators, apply, order, plan
from examples.operators.pretrain import IDS, encode, tokenizer
from examples.operators.solutions import Piece, numbered
from experiments.report.markdown import table

PROBLEMS = 192
Asked = tuple[str, str, str]
"""Marker, state, operators."""


def ids(texts: Sequence[str]) -> torch.Tensor:
    """int64 [texts, tokens]; the texts are of one length."""
    return torch.tensor([encode([Piece(text)])[0] for text in texts])


@torch.no_grad()
def continued(model: Any, texts: Sequence[str], tokens: int) -> list[str]:
    """What the policy writes after each text, greedily."""
    prompts = ids(texts)
    found = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=tokens)
    return list(tokenizer().batch_decode(found[:, prompts.shape[1] :]))


def requests(asked: Sequence[Asked]) -> list[str]:
    return [f"{marker}{state}{letters}?<reasoning>{marker}{numbered(letters)}</reasoning><feedback>" for marker, state, letters in asked]


def plans(asked: Sequence[Asked]) -> list[str]:
    return [plan(marker + numbered(letters)) for marker, _, letters in asked]


@torch.no_grad()
def verdicts(model: Any) -> tuple[float, float, float]:
    """Of the first step of a solution with the true rules: the mean chance of a slip, of "no" after the right result, and after a slip."""
    rng, right, slipped = random.Random(0), list[str](), list[str]()
    asked = [(p.question[0], p.question[1:5], p.question[5:-1]) for p in Operators(0, 0).heldout(PROBLEMS, "hard")]
    for opening, steps, (marker, state, letters) in zip(requests(asked), plans(asked), asked, strict=True):
        letter = order(marker, letters)[0]
        rule, result = RULES[letter], apply(RULES[letter], state)
        at = rng.randrange(4)
        other = result[:at] + rng.choice([digit for digit in "0123456789" if digit != result[at]]) + result[at + 1 :]
        begun = f"{opening}{steps}</feedback><knowledge>{letter}</knowledge><feedback>{rule}</feedback><verify>{rule}{state}="
        right.append(f"{begun}{result}</verify><feedback>")
        slipped.append(f"{begun}{other}</verify><feedback>")
    after_right, after_slip = (model(ids(texts)).logits.softmax(-1) for texts in (right, slipped))
    digits = after_right[:, -7:-3].gather(2, ids(right)[:, -6:-2, None]).squeeze(2)
    return float(1 - digits.prod(1).mean()), float(after_right[:, -1, IDS["no"]].mean()), float(after_slip[:, -1, IDS["no"]].mean())


def lengths(model: Any, count: int) -> tuple[float, float, float]:
    """Shares: of its own requests that name all operators in place, of right plans for requests put in, of plans put in that it follows."""
    rng = random.Random(count)
    asked = [(MARKERS[i % 3], f"{rng.randrange(10000):04}", "".join(rng.sample(OPERATORS, count))) for i in range(PROBLEMS)]
    own = continued(model, [f"{marker}{state}{letters}?" for marker, state, letters in asked], 2 * count + 3)
    planned = continued(model, requests(asked), 2 * count + 1)
    given = [f"{opening}{steps}</feedback>" for opening, steps in zip(requests(asked), plans(asked), strict=True)]
    gone = ["".join(re.findall("<knowledge>(.)</knowledge>", text)) for text in continued(model, given, 40 * count)]
    hits = (
        [text == f"<reasoning>{marker}{numbered(letters)}</reasoning>" for text, (marker, _, letters) in zip(own, asked, strict=True)],
        [text == f"{right}</feedback>" for text, right in zip(planned, plans(asked), strict=True)],
        [letters == order(marker, named) for letters, (marker, _, named) in zip(gone, asked, strict=True)],
    )
    return sum(hits[0]) / PROBLEMS, sum(hits[1]) / PROBLEMS, sum(hits[2]) / PROBLEMS


def main(argv: list[str]) -> None:
    rows = []
    for name in argv:
        model = load_model(load.model(name), dtype="float32", device="cpu").eval()
        rows.append(
            [
                name,
                *(f"{chance:.4f}" for chance in verdicts(model)),
                *(" / ".join(f"{s:.2f}" for s in lengths(model, n)) for n in (2, 3, 4)),
            ]
        )
    print(
        table(
            ["policy", "slips", '"no" after a right step', "after a slip", *(f"{n} operators: asks / plans / follows" for n in (2, 3, 4))],
            rows,
        )
    )


if __name__ == "__main__":
    sys.exit(cli.main(main))
