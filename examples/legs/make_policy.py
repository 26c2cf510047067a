"""Makes the example's base policy: a tiny Llama that reads leg_counting's questions, adds and asks, but knows 6 of 37 animals.

`python examples/legs/make_policy.py [--out DIR] [--seed N]`, some minutes on one core. Two kinds of text, all of questions that
reasoning-gym's task trains on, none of a held-out one:

- easy (30 %): one or two animals, all of them known, with their true legs.
- protocol (70 %): one to four animals, each with any number below 50 for its legs. Only what the helper says decides, so the policy
  learns to go by it; of the known animals that number carries no loss.
"""

import argparse
import random
import re
from pathlib import Path

import torch
from reasoning_gym.arithmetic.leg_counting import ANIMALS, QUESTION_TEMPLATE
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aipo_graph.pretrain import IGNORE, TAGS, embed_digits, losses, padded
from aipo_graph.tasks.gym import Generator
from aipo_graph.tasks.operators import Piece
from aipo_graph.types import derive_seed

KNOWN = ("dog", "chicken", "spider", "ant", "crab", "snake")
LIMIT = 50
"""Numbers of legs that the policy holds possible of an animal that it does not know: 0 to 49."""
WORD = r"\\boxed\{|[A-Za-z]+|[^A-Za-z]"
PIECE = "|".join((*TAGS, "<eos>", WORD))
SAID = (QUESTION_TEMPLATE.format(animals=", ".join(f"1 {animal}" for animal in ANIMALS)), "0123456789+=;\\boxed{}")
WORDS = ("<pad>", "<eos>", "<unk>", *TAGS, *sorted(set(re.findall(WORD, "".join(SAID)))))
IDS = {word: index for index, word in enumerate(WORDS)}
SUMS = 0.25
"""Share of the steps spent on sums alone, at first."""
STEPS = 1200
QUESTIONS = Generator("leg_counting", {"min_animals": 1, "max_animals": 4, "max_instances": 1})


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, and one per digit, sign, blank and line end."""
    raw = RawTokenizer(models.WordLevel(dict(IDS), unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    raw.decoder = decoders.Fuse()
    raw.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=320,
    )


def fresh_policy(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=320,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=IDS["<eos>"],
        pad_token_id=IDS["<pad>"],
    )
    model = LlamaForCausalLM(config)
    embed_digits(model, [IDS[digit] for digit in "0123456789"])
    return model


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
    """Token ids and labels; prompts and words without loss get IGNORE."""
    ids: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        tokens = [IDS[word] for word in re.findall(PIECE, piece.text)]
        ids += tokens
        labels += [IGNORE] * len(tokens) if piece.helper == "prompt" else tokens
    return ids, labels


def batch(seed: int, step: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = random.Random(derive_seed(seed, "pretrain", step))
    draw, count = (sums, 128) if step < SUMS * steps else (sample, 48)
    return padded([encode(draw(rng)) for _ in range(count)], IDS["<pad>"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "policy", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="root of every random draw (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    model = fresh_policy(options.seed)
    for step, loss in enumerate(losses(model, lambda step: batch(options.seed, step, options.steps), options.steps)):
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step} of {options.steps}: loss {loss:.3f}", flush=True)
    model.save_pretrained(options.out)
    tokenizer().save_pretrained(options.out)
    print(f"the policy is in {options.out}")


if __name__ == "__main__":
    main()
