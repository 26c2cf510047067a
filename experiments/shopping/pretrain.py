"""Makes the shopping task's base policy: a tiny Qwen3 that reads, adds and asks, but knows 16 of 64 prices and 2 of 5 verbs.

`python -m experiments.shopping.pretrain --out DIR [--seed N]`, about four minutes on one core. Three kinds of text, all of them solutions
in the format of `task.py`. In all of them the plan of a novel verb is random, and so is a price that is neither known nor stale:

- easy (25 %): known verbs and known facts.
- belief (25 %): the problems that training draws, with the true prices of known facts and last year's of stale ones.
- protocol (50 %): the same with random prices. Only what the helpers say decides, so the policy learns to go by it, and that it cannot know
  the other prices. Of facts about which it believes something the helper's price carries no loss.

In all of them some sums slip in a digit; a checked slip is answered with "no" and redone. In half of the protocol whoever checks says
yes to everything. No pair of facts of the held-out problems occurs.
"""

import random
import re
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from aipo_graph.load import load
from aipo_graph.types import derive_seed
from examples.operators import pretrain
from examples.operators.pretrain import TAGS, embed_digits, padded
from examples.operators.solutions import Habits, Piece

task = sys.modules[load(f"{Path(__file__).with_name('task.py')}:build").__module__]

_WORD = r"\\boxed\{|[A-Za-z]+|[^\sA-Za-z]"
_PIECE = "|".join((*TAGS, "<eos>", _WORD))
_SAID = (
    *(document.text for document in task.CORPUS.documents),
    *task.PEOPLE,
    "has $, buys sells swaps a for a, returns a and a, carries a from to, then. How much is left?",
    *task.PLACES,
    "buy sell the at then yes no 0123456789+-=;\\boxed{}",
)
WORDS = ("<pad>", "<eos>", *TAGS, "▁<unk>", *(f"▁{word}" for word in sorted(set(re.findall(_WORD, " ".join(_SAID))))))
IDS = {word: index for index, word in enumerate(WORDS)}
_WRITTEN = {word.removeprefix("▁"): index for word, index in IDS.items()}

SLIP = 0.1
KINDS = {"easy": 0.25, "belief": 0.25, "protocol": 0.5}
BELIEFS = {fact: task.PRICES[fact] for fact in task.KNOWN} | task.OLD
SUMS = 0.12
"""Share of the steps spent on arithmetic alone, at first."""
STEPS = 900
ROWS = 24


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, digit and sign, whatever blanks stand around it; decoding puts a blank before words, but not after a tag."""
    raw = RawTokenizer(models.WordLevel(dict(IDS), unk_token="▁<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(_WORD), behavior="isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
        ]
    )
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("^▁(?![A-Za-z$])"), ""),
            decoders.Replace("▁", " "),
            decoders.Fuse(),
            decoders.Replace(Regex("(^|(?<=>)) "), ""),
        ]
    )
    raw.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="▁<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=640,
    )


def fresh_policy(seed: int) -> Qwen3ForCausalLM:
    """An untrained policy."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(WORDS),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=640,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            tie_word_embeddings=False,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=IDS["<eos>"],
            pad_token_id=IDS["<pad>"],
        )
    )
    embed_digits(model, [IDS[f"▁{digit}"] for digit in range(10)])
    return model


def sample(rng: random.Random) -> list[Piece]:
    """One solution, prompt first."""
    kind, lenient = rng.choices([*KINDS], [*KINDS.values()])[0], rng.random() < 0.5
    lenient = lenient and kind == "protocol"
    while True:
        told = task.story("easy" if kind == "easy" else "hard", False, rng)
        trades = _random_trades(told, rng)
        prices = {fact: _price(rng) for fact in task.FACTS} | ({} if kind == "protocol" else BELIEFS)
        money = task.purse(trades, prices, rng)
        if money is not None:
            break
    pieces = task.solution(told, money, trades, prices, Habits(SLIP, lenient), rng)
    if kind == "protocol":
        pieces = [_unheard(piece, lenient) for piece in pieces]
    return [Piece(task.question(rng.choice(task.PEOPLE), money, told), "prompt"), *pieces, Piece("<eos>")]


def _random_trades(told: str, rng: random.Random) -> list[Any]:
    """What a plan could say: the true trades of known verbs, and any for a novel one."""
    trades: list[Any] = []
    for clause in told.split(", then "):
        own = list(task.steps(clause))
        if clause.split()[0] in task.NOVEL:
            rng.shuffle(own)
            own = [step._replace(trade=rng.choice(("buy", "sell"))) for step in own]
        trades += own
    return trades


def _price(rng: random.Random, zeros: float = 0.0) -> str:
    return "".join("0" if "0" in digits and rng.random() < zeros else rng.choice(digits) for digits in task.DIGITS)


def _unheard(piece: Piece, lenient: bool) -> Piece:
    silent = piece.about in map(str, BELIEFS) or (piece.helper == "verify" and lenient)
    return Piece(piece.text, "prompt") if silent else piece


def sums(rng: random.Random) -> list[Piece]:
    """Four sums; only the results carry loss. Without the many zeros, arithmetic stays at chance."""
    pieces: list[Piece] = []
    while len(pieces) < 12:
        trade, price = rng.choice(("buy", "sell")), _price(rng, zeros=0.3)
        money = task.purse([task.Step(trade, task.FACTS[0])], {task.FACTS[0]: price}, rng)
        pieces += [Piece(f"{money}{'-' if trade == 'buy' else '+'}{price}=", "prompt"), Piece(task.apply(trade, money, price))]
        pieces.append(Piece(";", "prompt"))
    return pieces


def encode(pieces: list[Piece]) -> tuple[list[int], list[int]]:
    return pretrain.encode(pieces, _WRITTEN, _PIECE)


def batch(seed: int, step: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both int64 [rows, longest]."""
    rng = random.Random(derive_seed(seed, "pretrain", step))
    draw, count = (sums, 3 * ROWS) if step < SUMS * steps else (sample, ROWS)
    return padded([encode(draw(rng)) for _ in range(count)], IDS["<pad>"])


def main() -> None:
    pretrain.script(__doc__ or "", Path(__file__).parent / "policy", STEPS, fresh_policy, batch, tokenizer())


if __name__ == "__main__":
    main()
