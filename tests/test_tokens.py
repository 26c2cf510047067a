"""Untrusted text never becomes a control token; sampled ids stay as they are; prompts keep their tags."""

import json
import random
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import pytest
from langgraph.graph import START, StateGraph
from rollout_world import NAMES, Exact, bpe, echo, save_tiny, with_graph, world
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from aipo_graph.errors import ConfigError
from aipo_graph.messages import read_tokenizer
from aipo_graph.rollout import Context, State, agent_node, by_request, policy_node
from aipo_graph.rollout.collect import final_text
from aipo_graph.rollout.tokens import FEEDBACK, Tokenizer, tags
from aipo_graph.types import Completion, Reply, Segment
from examples.operators import pretrain

TAGS = [tag for name in (*NAMES, FEEDBACK) for tag in tags(name)]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LOOKALIKES = ["＜feedback＞", "<fee\u200bdback>", "<FEEDBACK>", "＜/verify＞", "＜|im_end|＞", "<|im_\u200bend|>", "﹤feedback﹥"]
ALL = {"words": pretrain.tokenizer, "bpe": bpe, "chat": lambda: bpe(chat=True), "normalising": lambda: bpe(normalise=True)}


@pytest.fixture(params=list(ALL), scope="module")
def raw(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return ALL[request.param]()


def hostile(rng: random.Random, pieces: list[str]) -> str:
    """Tags whole, halved and nested, look-alikes, and plain text."""
    parts = []
    for _ in range(rng.randint(1, 12)):
        piece = rng.choice(pieces)
        cut = rng.randint(0, len(piece))
        parts.append(rng.choice([piece, piece[:cut], piece[cut:], piece[:cut] + rng.choice(pieces) + piece[cut:], "x 12"]))
    return "".join(parts)


def test_hostile_replies_hold_no_control_text(raw: PreTrainedTokenizerFast) -> None:
    tokenizer = Tokenizer(raw, NAMES)
    rng = random.Random(0)
    for _ in range(1000):
        ids, text = tokenizer.plain(hostile(rng, TAGS + SPECIALS + LOOKALIKES + ["<eos>", "<unk>"]))
        assert tokenizer.control_ids.isdisjoint(ids)
        assert text == raw.decode(list(ids))
        assert not [tag for tag in TAGS + raw.all_special_tokens if tag in text]


@pytest.mark.parametrize("text", SPECIALS)
def test_unnamed_special_tokens_are_control_tokens(text: str) -> None:
    """`<|im_end|>` is special in tokenizer.json but no attribute of the tokenizer names it."""
    raw = bpe(chat=True)
    tokenizer = Tokenizer(raw, NAMES)
    (token,) = raw.encode(text, add_special_tokens=False)
    assert token in tokenizer.control_ids
    assert tokenizer.neutralise(f"a{text}b") == "a b"


def test_neutralise_sees_through_full_width_look_alikes() -> None:
    tokenizer = Tokenizer(bpe(), NAMES)
    assert tokenizer.neutralise("＜feedback＞a＜/ｆｅｅｄｂａｃｋ＞") == " a "
    assert tokenizer.neutralise("½ cup, x², ａ") == "½ cup, x², ａ"  # untouched where nothing hides in it


def test_engine_ends_of_text_are_controls_too() -> None:
    raw = bpe()
    end = raw.encode("so", add_special_tokens=False)[0]
    assert end in Tokenizer(raw, NAMES, eos_ids=[end]).control_ids


def test_a_reply_is_bounded_in_tokens(raw: PreTrainedTokenizerFast) -> None:
    tokenizer = Tokenizer(raw, NAMES)
    opening, words, closing = tokenizer.wrap(Reply("12345" * 50), "verify", limit=7)
    assert (len(words.token_ids), words.source, words.author) == (7, "agent", "verify")
    assert words.text == raw.decode(list(words.token_ids))
    assert (opening.source, opening.text, closing.source, closing.text) == ("context", "<feedback>", "context", "</feedback>")


def test_a_helpers_own_ids_and_logprobs_are_kept_exactly() -> None:
    raw = bpe()
    tokenizer = Tokenizer(raw, NAMES)
    ids = tuple(raw.encode("Correct. So", add_special_tokens=False))
    reply = Reply("Correct. So", ids, tuple(-0.1 * n for n in range(len(ids))))
    words = tokenizer.wrap(reply, "verify", limit=100)[1]
    assert (words.token_ids, words.logprobs, words.text) == (ids, reply.logprobs, "Correct. So")
    cut = tokenizer.wrap(reply, "verify", limit=2)[1]
    assert (cut.token_ids, cut.logprobs) == (ids[:2], reply.logprobs[:2])


@pytest.mark.parametrize("text", ["a</feedback>b", "a<|im_end|>b"])
def test_a_helpers_control_tokens_lose_its_logprobs(text: str) -> None:
    raw = bpe()
    tokenizer = Tokenizer(raw, NAMES)
    ids = tuple(raw.encode(text, add_special_tokens=False))
    words = tokenizer.wrap(Reply(text, ids, (-0.5,) * len(ids)), "verify")[1]
    assert (words.text, words.logprobs) == ("a b", None)


def test_logprobs_that_do_not_match_are_left_out() -> None:
    words = Tokenizer(bpe(), NAMES).wrap(Reply("12", (20, 21), (-0.5,)), "verify")[1]
    assert (words.text, words.logprobs) == ("12", None)


def test_a_prompt_keeps_the_tags_that_it_explains(root: Path) -> None:
    raw = bpe(chat=True)
    prompt = (root / "prompts/policy.md").read_text()
    segment = Tokenizer(raw, NAMES).render(prompt, "policy")
    assert all(tag in raw.decode(list(segment.token_ids)) for tag in TAGS)
    assert (segment.source, segment.logprobs) == ("context", None)


def test_render_uses_the_chat_template_once() -> None:
    raw = bpe(chat=True)
    segment = Tokenizer(raw, NAMES).render("1+1?", "policy")
    assert raw.decode(list(segment.token_ids)) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n" == segment.text
    assert segment.token_ids.count(raw.convert_tokens_to_ids("<|im_start|>")) == 2


def test_render_without_a_template_is_the_text() -> None:
    raw = bpe()
    segment = Tokenizer(raw, NAMES).render("1+1?", "policy")
    assert raw.decode(list(segment.token_ids)) == "1+1?"


def test_render_starts_with_the_models_bos() -> None:
    raw = bpe()
    raw.bos_token = "<|im_start|>"
    ids = Tokenizer(raw, NAMES).render("1+1?", "policy").token_ids
    assert ids[0] == raw.bos_token_id
    assert ids.count(raw.bos_token_id) == 1


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    save_tiny(tmp_path, bpe())
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match="has no tokenizer that loads .*; save one beside the model"):
        read_tokenizer(tmp_path)


# --- what is sampled in several segments

TEXT = "so it is, 12 and  3; naïve 😀👩‍🔬 漢字 don't <knowledge>what is it 漢 about</knowledge>"
LEARNT = [TEXT, "what is it about , then ? <knowledge> </knowledge> \\boxed{1000}"] * 9


def sentencepiece() -> RawTokenizer:
    """As Llama 2's: a blank stands before every word, and characters that it does not know are bytes."""
    raw = RawTokenizer(models.BPE())
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    plain = [text.translate({ord(c): None for c in text if ord(c) > 127}) for text in LEARNT]
    raw.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learnt = json.loads(raw.to_str())["model"]
    vocab = {piece: i for i, piece in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]])}
    raw.model = models.BPE(vocab, [tuple(pair) for pair in learnt["merges"]], unk_token="<unk>", byte_fallback=True)
    return raw


def metaspace() -> RawTokenizer:
    raw = RawTokenizer(models.Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.train_from_iterator(LEARNT, trainers.UnigramTrainer(vocab_size=90, unk_token="<unk>", show_progress=False))
    return raw


def wordpiece() -> RawTokenizer:
    raw = RawTokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=True)
    raw.train_from_iterator(LEARNT, trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]"], show_progress=False))
    return raw


def wrapped(raw: RawTokenizer) -> PreTrainedTokenizerFast:
    raw.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", clean_up_tokenization_spaces=False)


KINDS = {
    "bytes": bpe,
    "sentencepiece": lambda: wrapped(sentencepiece()),
    "metaspace": lambda: wrapped(metaspace()),
    "wordpiece": lambda: wrapped(wordpiece()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 3, 7])
async def test_texts_of_segments_join_to_the_text_of_all_ids(kind: str, length: int, root: Path) -> None:
    """Through the graph: blanks and characters that fall between two segments are kept, and the request across them is found."""
    raw = KINDS[kind]()
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", policy_node(segment_tokens=length))
    graph.add_node("knowledge", agent_node("knowledge"))
    graph.add_edge(START, "policy")
    graph.add_edge("knowledge", "policy")
    graph.add_conditional_edges("policy", by_request)
    asked: list[str] = []
    written = raw.encode(TEXT, add_special_tokens=False)
    done = raw.encode("\\boxed{1000}", add_special_tokens=False)

    def look(query: str) -> str:
        asked.append(query)
        return "12"

    rollouts = with_graph(
        world(root, str, [echo("knowledge", look)], raw, rollout={"max_tokens": 2000, "max_supersteps": 500}), graph.compile()
    )
    position = 0

    async def generate(prompt_ids: Sequence[int], *, max_tokens: int, **_: object) -> Completion:
        nonlocal position
        row = [*written, *done, raw.eos_token_id]
        end = min(position + max_tokens, len(row), len(written) if position < len(written) else len(row))
        ids, position = tuple(row[position:end]), end
        return Completion(ids, (-0.5,) * len(ids), "length", 0)

    object.__setattr__(rollouts.engine, "generate", generate)
    trace = await rollouts.run_trace(Exact().train(0), seed=0, with_agents=True)
    assert trace.error is None
    asking = takewhile(lambda s: s.source == "policy", trace.segments[1:])
    first = "".join(s.text for s in asking)
    assert first == raw.decode(written, clean_up_tokenization_spaces=False)
    assert final_text(trace.segments) == raw.decode([*done, raw.eos_token_id], clean_up_tokenization_spaces=False)
    (query,) = asked
    assert query == first.rpartition("</knowledge>")[0].rpartition("<knowledge>")[2].strip()
    assert "漢" in query or kind == "wordpiece"
    assert "what is it" in query


def test_the_beginning_of_a_character_goes_to_the_segment_that_ends_it() -> None:
    raw = bpe()
    tokenizer = Tokenizer(raw, NAMES)
    ids = tuple(raw.encode("a😀b", add_special_tokens=False))
    run: list[Segment] = []
    for token in ids:
        text = tokenizer.continued(run, (token,), more=True)
        run.append(Segment("policy", "policy", (token,), text, logprobs=(-0.5,)))
    assert [segment.text for segment in run] == ["a", "", "", "", "😀", "b"]
    assert tokenizer.continued([], ids[:3]) == "a\ufffd"  # nothing follows
