"""The tokenizer, the pretraining command, and the base policy that ships with the package."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from aipo_graph import cli
from aipo_graph.load import data
from aipo_graph.tasks import operators
from aipo_graph.tasks.operators import BELIEFS, HELDOUT_TRIPLES, RULES, Operators
from aipo_graph.types import Problem
from examples.operators import pretrain
from examples.operators.solutions import Piece, solution

SHIPPED = data("operators")
TASK = Operators(seed=0, easy_share=0.25)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def policy() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(SHIPPED).eval()


def written(problem: Problem) -> str:
    return problem.question + "".join(piece.text for piece in solution(problem)) + "<eos>"


def test_round_trip(tokenizer: PreTrainedTokenizerBase) -> None:
    for problem in TASK.heldout(50):
        text = written(problem)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_word_is_one_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == len(pretrain.WORDS)
    for word in pretrain.WORDS:
        assert tokenizer.encode(word) == [pretrain.IDS[word]]
    assert tokenizer.decode(tokenizer.encode("<verify>1</verify>"), skip_special_tokens=True) == "<verify>1</verify>"
    assert tokenizer.encode("ü 你 Z") == [pretrain.IDS["<unk>"]] * 5


def test_shipped_tokenizer_is_the_one_of_the_code(tmp_path: Path) -> None:
    pretrain.tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (SHIPPED / name).read_text()


def test_training_and_tokenizer_read_a_text_alike(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(0)
    for _ in range(50):
        pieces = pretrain.sample(rng)
        ids, labels = pretrain.encode(pieces)
        assert ids == tokenizer.encode("".join(piece.text for piece in pieces))
        assert all(label in (token, pretrain.IGNORE) for token, label in zip(ids, labels, strict=True))


def test_pretraining_gives_away_no_hidden_rule_and_no_heldout_triple() -> None:
    rng = random.Random(0)
    hidden = {letter: RULES[letter] for letter in operators.NOVEL + operators.MISBELIEVED}
    heldout = {"".join(sorted(triple)) for triples in HELDOUT_TRIPLES.values() for triple in triples}
    told = dict.fromkeys(hidden, 0)
    for _ in range(3000):
        question, *pieces = pretrain.sample(rng)
        assert "".join(sorted(question.text[5:8])) not in heldout
        for piece in pieces:
            if piece.helper == "knowledge" and piece.about in hidden:
                told[piece.about] += piece.text == hidden[piece.about]
                assert piece.about in operators.NOVEL or piece.text == BELIEFS[piece.about]
    assert sum(told.values()) <= 3


def test_twice_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pretrain.pretrain(tmp_path / name, seed=3, steps=4)
    pretrain.pretrain(tmp_path / "c", seed=4, steps=4)
    files = {name: {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files["a"].keys()
    assert files["a"]["model.safetensors"] != files["c"]["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_an_existing_folder_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "policy"
    out.mkdir()
    (out / "mine").write_text("precious")
    assert cli.main(pretrain.command, ["--out", str(out), "--steps", "1"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (out / "mine").read_text() == "precious"
    assert cli.main(pretrain.command, ["--out", str(out), "--steps", "1", "--force"]) == 0
    assert not (out / "mine").exists()
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--steps", "many"], ["--seed", "x"], ["--outt", "y"]])
def test_bad_arguments_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(pretrain.command, argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_shipped_weights_are_small() -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size <= 2_000_000


def test_the_expert_knows_every_rule(tmp_path: Path) -> None:
    """What the quick start's Knowledge agent is when it is a language model: asked for an operator, it says its rule."""
    assert cli.main(pretrain.command, ["--expert", "--out", str(tmp_path / "expert")]) == 0
    expert = LlamaForCausalLM.from_pretrained(tmp_path / "expert")
    for letter, rule in RULES.items():
        asked = torch.tensor(pretrain.encode([Piece(f"{letter}?")])[0])[None]
        said = expert.generate(asked, max_new_tokens=8, do_sample=False)[0, 2:].tolist()
        assert "".join(pretrain.WORDS[token] for token in said) == f"{rule}<eos>"


class Solver:
    """Greedy or sampled solutions of many problems at once; with helpers, their words are forced in."""

    def __init__(self, model: LlamaForCausalLM, helped: bool, greedy: bool):
        self.model, self.helped, self.greedy = model, helped, greedy

    @torch.no_grad()
    def texts(self, problems: list[Problem], limit: int = 180) -> Iterator[str]:
        ids = pretrain.IDS
        tokens = torch.tensor([pretrain.encode([Piece(p.question)])[0] for p in problems])
        queues: list[list[int]] = [[] for _ in problems]
        cache, fed = None, tokens
        generator = torch.Generator().manual_seed(0)
        while tokens.shape[1] < limit:
            out = self.model(fed, past_key_values=cache, use_cache=True)
            cache, scores = out.past_key_values, out.logits[:, -1]
            drawn = scores.argmax(-1) if self.greedy else torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
            for row, queue in enumerate(queues):
                if queue:
                    drawn[row] = queue.pop(0)
                elif self.helped:
                    queue += self.reply([*tokens[row].tolist(), int(drawn[row])])
            fed = drawn[:, None]
            tokens = torch.cat([tokens, fed], 1)
            if (tokens == ids["<eos>"]).any(1).all():
                break
        for row in tokens.tolist():
            yield "".join(pretrain.WORDS[token] for token in row).split("<eos>")[0]

    @staticmethod
    def reply(row: list[int]) -> list[int]:
        helpers = {"verify": operators.check, "reasoning": operators.plan, "knowledge": lambda letter: RULES.get(letter, operators.UNKNOWN)}
        text = "".join(pretrain.WORDS[token] for token in row[-20:])
        for name, helper in helpers.items():
            if text.endswith(f"</{name}>"):
                query = text.removesuffix(f"</{name}>").rpartition(f"<{name}>")[2]
                return pretrain.encode([Piece(f"<feedback>{helper(query)}</feedback>")])[0]
        return []


async def share(solver: Solver, kind: str) -> float:
    problems = TASK.heldout(64, kind)
    scores = [await TASK.reward(p.answer, text) for p, text in zip(problems, solver.texts(problems), strict=True)]
    return sum(scores) / len(scores)


async def test_shipped_policy_knows_the_easy_and_not_the_hard(policy: LlamaForCausalLM) -> None:
    assert await share(Solver(policy, helped=False, greedy=True), "easy") >= 0.8
    assert await share(Solver(policy, helped=False, greedy=False), "hard") == 0.0


async def test_shipped_policy_goes_by_what_helpers_say(policy: LlamaForCausalLM) -> None:
    assert await share(Solver(policy, helped=True, greedy=False), "hard") >= 0.5
