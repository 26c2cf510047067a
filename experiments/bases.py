"""Makes the study's other base policies: `python experiments/bases.py NAME --out DIR`, about four minutes each on one core.

`wordy`: the quick start's policy, which also learned to write replies between words that say nothing; `reader`: which learned to read over
such words, and not to write them. `qwen3`, `gemma3`: the quick
start's policy with the layers of another family, of about the same size.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM

from aipo_graph import cli
from examples.operators.pretrain import DIGITS, IDS, STEPS, embed_digits, fresh_policy, policy_config, pretrain, sample
from examples.operators.solutions import Piece
from experiments.helpers import signs


def wordy(rng: random.Random) -> list[Piece]:
    """One of two solutions has signs around each reply."""
    return _among_signs(rng, "")


def reader(rng: random.Random) -> list[Piece]:
    """The same, but the signs carry no loss: the policy reads over them, and never learned to write them."""
    return _among_signs(rng, "prompt")


def _among_signs(rng: random.Random, helper: str) -> list[Piece]:
    pieces = sample(rng)
    if rng.random() < 0.5:
        return pieces
    found: list[Piece] = []
    for piece in pieces:
        found += [Piece(signs(rng), helper)] * piece.text.startswith("</feedback>") + [piece]
        found += [Piece(signs(rng), helper)] * piece.text.endswith("<feedback>")
    return found


def qwen3(seed: int) -> Any:
    """Qwen3's layers: norms on queries and keys, grouped heads."""
    return _fresh(Qwen3ForCausalLM, Qwen3Config, seed, num_key_value_heads=2, intermediate_size=224)


def gemma3(seed: int) -> Any:
    """Gemma 3's layers: four norms a layer, gelu, scaled embeddings, one local and one global layer."""
    own = {"num_key_value_heads": 2, "intermediate_size": 224, "query_pre_attn_scalar": 32, "sliding_window": 512}
    return _fresh(Gemma3ForCausalLM, Gemma3TextConfig, seed, **own)


KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "max_position_embeddings", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""What the other families' policies have of the quick start's."""


def _fresh(model_class: Any, config_class: Any, seed: int, **own: Any) -> Any:
    torch.manual_seed(seed)
    ours = policy_config()
    rope = {"rope_type": "default", "rope_theta": 100.0}
    if config_class is Gemma3TextConfig:
        rope = {"sliding_attention": rope, "full_attention": rope}
    model = model_class(config_class(**{key: getattr(ours, key) for key in KEPT}, rope_parameters=rope, tie_word_embeddings=False, **own))
    embed_digits(model, [IDS[digit] for digit in DIGITS])
    return model


BASES = {"wordy": (wordy, fresh_policy), "reader": (reader, fresh_policy), "qwen3": (sample, qwen3), "gemma3": (sample, gemma3)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BASES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args(argv)
    draw, fresh = BASES[given.name]
    pretrain(given.out, given.seed, given.steps, draw=draw, fresh=fresh)


if __name__ == "__main__":
    sys.exit(cli.main(main))
