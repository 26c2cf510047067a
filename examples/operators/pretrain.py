"""Makes the operator task's base policy: a tiny Llama that can use rules and ask for them, but does not have them all.

Three kinds of text, all of them solutions in the format of `solutions.py`:

- easy (40 %): known operators with their true rules. Some are used without asking.
- protocol (40 %): a random rule for every operator and, under ``%`` and ``&``, a random order. Only what the helpers say decides, so
  the policy learns to go by it; for novel operators it learns that it cannot know. For the other operators the helper's words carry no
  loss: what is believed about them stays as it is.
- misbelief (20 %): misbelieved operators with their wrong rules.

In all of them some steps slip in a digit; a checked slip is answered with "no" and redone. No operator set of the held-out problems occurs.

With ``--expert`` it makes a helper instead, of the same size and with the same tokenizer: asked ``B?``, it says operator B's true rule.
"""

import argparse
import math
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aipo_graph import cli
from aipo_graph.errors import ConfigError
from aipo_graph.tasks.operators import (
    BELIEFS,
    MARKERS,
    MISBELIEVED,
    NOVEL,
    OPERATORS,
    RULES,
    TRAIN_TRIPLES,
    apply,
)
from aipo_graph.types import Problem, derive_seed
from examples.operators.solutions import Habits, Piece, solution

DIGITS = "0123456789"
TAGS = tuple(f"<{slash}{name}>" for name in ("verify", "knowledge", "reasoning", "feedback") for slash in ("", "/"))
WORDS = ("<pad>", "<eos>", "<unk>", *DIGITS, *OPERATORS, *MARKERS, *"+-=;?}", "\\boxed{", "yes", "no", *TAGS)
IDS = {word: index for index, word in enumerate(WORDS)}
_SPLIT = r"yes|no|\\boxed\{|" + "|".join(TAGS) + r"|<eos>|[\s\S]"

CONTEXT = 512
SLIP = 0.12
IGNORE = -100
SUMS = 0.2
"""Share of the steps spent on arithmetic alone, at first."""
STEPS = 1400
EXPERT_STEPS = 200
PEAK_RATE = 4e-3


def tokenizer(ids: Mapping[str, int] = IDS, split: str = _SPLIT, context: int = CONTEXT) -> PreTrainedTokenizerFast:
    """One token per word of ``ids``, TAGS among them, as ``split`` finds them; decoding joins them without blanks."""
    raw = RawTokenizer(models.WordLevel(dict(ids), unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(split), behavior="isolated")
    raw.decoder = decoders.Fuse()
    raw.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )


def policy_config(ids: Mapping[str, int] = IDS, context: int = CONTEXT, eos: str = "<eos>") -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(ids),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=ids[eos],
        pad_token_id=ids["<pad>"],
    )


def fresh_policy(seed: int, ids: Mapping[str, int] = IDS, context: int = CONTEXT) -> LlamaForCausalLM:
    """An untrained policy."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(policy_config(ids, context))
    embed_digits(model, [ids[digit] for digit in DIGITS])
    return model


def embed_digits(model: Any, ids: Sequence[int]) -> None:
    """The ten digits, whose token ids are given in order, start as Fourier features, in which addition mod 10 is a rotation."""
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.normal_(0, 0.3)
        for digit, token in enumerate(ids):
            angles = [2 * math.pi * k * digit / 10 for k in range(1, 6)]
            features = torch.tensor([f(a) for a in angles for f in (math.cos, math.sin)])
            weight[token, : len(features)] = features


def sample(rng: random.Random) -> list[Piece]:
    """One solution, prompt first."""
    draw, marker, lenient = rng.random(), "@", False
    if draw < 0.4:
        operators, rules = rng.choice(TRAIN_TRIPLES["easy"]), RULES
    elif draw < 0.8:
        operators, marker, lenient = rng.choice(TRAIN_TRIPLES["hard"]), rng.choice(MARKERS), rng.random() < 0.5
        rules = {letter: _rule(rng) for letter in operators}
    else:
        operators, rules = rng.choice([t for t in TRAIN_TRIPLES["hard"] if set(t) <= set(MISBELIEVED)]), BELIEFS
    operators = "".join(rng.sample(operators, 3))
    steps = operators if marker == "@" else "".join(rng.sample(operators, 3))
    problem = Problem("", f"{marker}{rng.randrange(10000):04}{operators}?", "")
    pieces = solution(problem, rules, steps, Habits(SLIP, lenient), rng)
    if 0.4 <= draw < 0.8:
        pieces = [_unheard(piece, lenient) for piece in pieces]
    return [Piece(problem.question, "prompt"), *pieces, Piece("<eos>")]


def sums(rng: random.Random) -> list[Piece]:
    """Three steps; only the results carry loss. Without the many zeros in the keys, arithmetic mod 10 stays at chance."""
    pieces = []
    for _ in range(3):
        rule, state = _rule(rng, zeros=0.4), f"{rng.randrange(10000):04}"
        pieces += [Piece(f"{rule}{state}=", "prompt"), Piece(apply(rule, state)), Piece(";", "prompt")]
    return pieces


def recall(rng: random.Random) -> list[Piece]:
    """What the expert learns: an operator's name, its true rule."""
    letter = rng.choice(OPERATORS)
    return [Piece(f"{letter}?", "prompt"), Piece(RULES[letter]), Piece("<eos>")]


def _rule(rng: random.Random, zeros: float = 0.0) -> str:
    return "".join("0" if rng.random() < zeros else rng.choice("123456789") for _ in range(4)) + rng.choice("+-")


def _unheard(piece: Piece, lenient: bool) -> Piece:
    silent = (piece.helper == "knowledge" and piece.about not in NOVEL) or (piece.helper == "verify" and lenient)
    return Piece(piece.text, "prompt") if silent else piece


def encode(pieces: list[Piece], ids: Mapping[str, int] = IDS, split: str = _SPLIT) -> tuple[list[int], list[int]]:
    """Token ids and labels; prompts and words without loss get IGNORE."""
    row: list[int] = []
    labels: list[int] = []
    for piece in pieces:
        tokens = [ids[word] for word in re.findall(split, piece.text)]
        row += tokens
        labels += [IGNORE] * len(tokens) if piece.helper == "prompt" else tokens
    return row, labels


Draw = Callable[[random.Random], list[Piece]]
"""Makes one text to learn from."""


def batch(seed: int, step: int, steps: int, draw: Draw = sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both int64 [rows, longest]."""
    rng = random.Random(derive_seed(seed, "pretrain", step))
    if draw is not recall and step < SUMS * steps:
        draw = sums
    count = 96 if draw in (recall, sums) else 48
    return padded([encode(draw(rng)) for _ in range(count)], IDS["<pad>"])


def padded(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids and labels as two int64 tensors [rows, longest]."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [IGNORE] * (longest - len(row)) for _, row in rows])
    return ids, labels


def rate(progress: float) -> float:
    """Learning rate over its peak: 5 % of warm-up, then a cosine to 2 %."""
    return min(1.0, progress / 0.05) * (0.51 + 0.49 * math.cos(math.pi * progress))


def losses(model: Any, batches: Callable[[int], tuple[torch.Tensor, torch.Tensor]], steps: int) -> Iterator[float]:
    """Trains the model in place on the batch of each step, one optimizer step per loss (nats per token that carries loss)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        ids, labels = batches(step)
        hidden, targets = model.model(ids).last_hidden_state[:, :-1], labels[:, 1:]
        heard = targets != IGNORE
        loss = F.cross_entropy(model.lm_head(hidden[heard]), targets[heard])
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * rate((step + 1) / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()


def pretrain(
    out: Path, seed: int, steps: int, force: bool = False, draw: Draw = sample, fresh: Callable[[int], Any] = fresh_policy
) -> None:
    """Writes the policy that ``fresh(seed)`` makes, trained on ``draw``'s texts, and its tokenizer to the folder ``out``.

    The folder appears whole or not at all. Raises ConfigError if it exists and ``force`` is not set, or cannot be written.
    """
    if out.exists() and not force:
        raise ConfigError(f"{out} exists: give another --out, or --force to replace it")
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    model = fresh(seed)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeRemainingColumn())
    with Progress(TextColumn("pretraining"), *columns) as progress:
        task = progress.add_task("", total=steps, loss=math.nan)
        for loss in losses(model, lambda step: batch(seed, step, steps, draw), steps):
            progress.update(task, advance=1, loss=loss)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
            new, old = Path(folder, "new"), Path(folder, "old")
            model.save_pretrained(new)
            tokenizer().save_pretrained(new)
            if out.exists():
                out.rename(old)
            new.rename(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); give another --out") from error


def script(
    doc: str,
    out: Path,
    steps: int,
    fresh: Callable[[int], Any],
    batches: Callable[[int, int, int], tuple[torch.Tensor, torch.Tensor]],
    words: PreTrainedTokenizerFast,
) -> None:
    """The command line of a script that makes another policy: ``batches(seed, step, steps)`` train what ``fresh(seed)`` makes."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=out, help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="root of every random draw (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    model = fresh(options.seed)
    for step, loss in enumerate(losses(model, lambda step: batches(options.seed, step, options.steps), options.steps)):
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step} of {options.steps}: loss {loss:.3f}", flush=True)
    model.save_pretrained(options.out)
    words.save_pretrained(options.out)
    print(f"the policy is in {options.out}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def command(argv: list[str]) -> None:
    parser = _Parser(
        prog="python -m examples.operators.pretrain",
        description="Makes the operator task's base policy: a tiny language model in Hugging Face format, about four minutes on one core.",
    )
    parser.add_argument("--expert", action="store_true", help="make a helper that knows every operator's rule instead (seconds)")
    parser.add_argument("--out", type=Path, help="folder to write (default: operators, or operators_expert)")
    parser.add_argument("--seed", type=int, default=0, help="root of every random draw (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, help=f"optimizer steps (default: {STEPS}, {EXPERT_STEPS} for the expert)")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    given = parser.parse_args(argv)
    out, steps = (Path("operators_expert"), EXPERT_STEPS) if given.expert else (Path("operators"), STEPS)
    pretrain(given.out or out, given.seed, given.steps or steps, given.force, recall if given.expert else sample)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(cli.main(command))
