"""The trace viewer's Python side: a run's folder to an index and pages, one HTML text, and a server that follows."""

import base64
import contextlib
import gzip
import hashlib
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer
from pydantic import TypeAdapter
from rich.console import Console
from rollout_world import bpe
from started import Started
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.errors import ConfigError
from aipo_graph.load import data
from aipo_graph.log import LoggedGroup, RunLog
from aipo_graph.types import Learned, Problem, Segment, Status, Trace, TraceGroup
from aipo_graph.view import __main__ as view
from aipo_graph.view import record as page
from aipo_graph.view.read import Growing, ViewedRun, index_of
from aipo_graph.view.record import Pieces, split
from aipo_graph.view.serve import following

TOKENIZER = RawTokenizer.from_file(str(data("operators") / "tokenizer.json"))
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <img src=x onerror=alert(1)>",
    "\u202eabc\u202c \u2066x\u2069",
    "null\x00byte \x1b[31m",
    "]]>'\"`${alert(1)}",
]


def words(source: Any, author: str, text: str, logprob: float = -0.5, **rest: Any) -> Segment:
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False).ids)
    logprobs = tuple(logprob - i / 7 for i in range(len(ids))) if source == "policy" else None
    return Segment(source, author, ids, TOKENIZER.decode(ids, skip_special_tokens=False), logprobs=logprobs, **rest)


def trace(problem: str, reward: float = 1.0, status: Status = "done", error: str | None = None, seed: int = 2**62 + 1) -> Trace:
    segments = (
        words("context", "policy", "@8304ACB?"),
        words("policy", "policy", "<knowledge>A</knowledge>", version=3),
        words("context", "feedback", "<feedback>"),
        words("agent", "knowledge", "6279+"),
        words("context", "feedback", "</feedback>"),
        words("policy", "policy", "4573", logprob=-1e-9, version=3),
    )
    return Trace(problem, seed, True, segments, ("policy", "knowledge", "policy"), status, {"reward": reward}, error)


def learned(of: Trace, advantage: float = 0.93541) -> Learned:
    inside = [segment.source != "context" for segment in of.segments for _ in segment.token_ids]
    return Learned(*(tuple(value if here else None for here in inside) for value in (-1.23456, 0.28149, advantage, 0.3)))


def group(number: int, *traces: Trace) -> TraceGroup:
    name = f"train-{number}"
    return TraceGroup(Problem(name, f"question {number}", str(number), "hard"), traces or (trace(name), trace(name, reward=0.0)))


@contextlib.contextmanager
def running(folder: Path, **sections: Any) -> Iterator[RunLog]:
    config = Config.model_validate({"run": {"dir": str(folder), "name": "tiny", "trackers": []}, "train": {"steps": 9}} | sections)
    with RunLog(config, Console(quiet=True)) as log:
        yield log


def step(log: RunLog, number: int, *groups: TraceGroup, **metrics: float) -> None:
    groups = groups or (group(number),)
    log.step(number, {"reward/alone": 0.123456, **metrics}, groups, [tuple(map(learned, entry.traces)) for entry in groups])


def tiny(folder: Path, steps: int = 3) -> Path:
    with running(folder) as log:
        for number in range(1, steps + 1):
            step(log, number)
    return folder / "tiny"


def append(run: Path, *lines: bytes) -> None:
    with (run / "traces.jsonl").open("ab") as file:
        file.writelines(lines)


def read_run(run: Path, traces: int = 2000) -> ViewedRun:
    viewed = ViewedRun(run, traces)
    viewed.refresh()
    return viewed


def page_text(run: Path) -> str:
    return view.build([ViewedRun(run)])


def pages_of(viewed: ViewedRun) -> dict[int, dict[str, Any]]:
    return {number: json.loads(viewed.page(number)) for number in viewed.shown()}


# --- reading a run


@pytest.mark.slow
def test_a_run_of_the_trainer_is_told_as_it_was(viewed_run: Path) -> None:
    viewed = read_run(viewed_run)
    index = json.loads(index_of([viewed]))["runs"][0]
    logged = [json.loads(line) for line in (viewed_run / "traces.jsonl").read_text().splitlines()]
    flat = [(line, trace, learned) for line in logged for trace, learned in zip(line["group"]["traces"], line["learned"], strict=True)]
    assert index["state"] == "finished"
    assert index["notes"] == []
    assert (index["name"], index["steps"], index["recorded"], index["shown"]) == ("quickstart", 4, len(flat), len(flat))
    assert index["metrics"]["step"] == [1, 2, 3, 4]
    assert len({len(column) for column in index["metrics"].values()}) == 1
    assert index["settings"]["loss.agent"] == "aipo"
    assert index["summary"]["wall_seconds"] > 0
    assert {node["name"] for node in index["graph"]["nodes"]} == {"__start__", "policy", "verify", "knowledge", "reasoning", "__end__"}
    columns, pages = index["traces"], pages_of(viewed)
    for place, (line, trace, learned) in enumerate(flat):
        group = columns["group"][place]
        told = pages[group]["traces"][place - columns["group"].index(group)]
        assert pages[group]["about"] == {key: line["group"]["problem"][key] for key in ("question", "answer", "kind")}
        assert (told["step"], told["seed"], told["path"]) == (line["step"], str(trace["seed"]), trace["path"])
        assert columns["reward"][place] == pytest.approx(trace["scores"]["reward"], rel=1e-3)
        assert columns["consults"][place] == told_consults(trace)
        offset = 0
        for told_segment, segment in zip(told["segments"], trace["segments"], strict=True):
            assert "".join(told_segment["tokens"]) == segment["text"]
            assert len(told_segment["tokens"]) == len(segment["token_ids"])
            assert told_segment["logprobs"] == (segment["logprobs"] and pytest.approx(segment["logprobs"], rel=1e-2))
            for name, values in (told_segment["learned"] or {}).items():
                assert near(values, learned[name][offset : offset + len(segment["token_ids"])])
            offset += len(segment["token_ids"])


def near(told: list[float | None], logged: list[float | None]) -> bool:
    known = [entry for entry in logged if entry is not None]
    return [entry is None for entry in told] == [entry is None for entry in logged] and [
        entry for entry in told if entry is not None
    ] == pytest.approx(known, rel=1e-2)


def told_consults(trace: dict[str, Any]) -> dict[str, int]:
    authors = [segment["author"] for segment in trace["segments"] if segment["source"] == "agent"]
    return {name: authors.count(name) for name in authors}


def test_numbers_are_short_and_what_was_not_trained_on_has_none(tmp_path: Path) -> None:
    failed = trace("train-7", 0.0, "failed", "AgentError: gone")
    with running(tmp_path) as log:
        groups = (group(7, trace("train-7"), failed),)
        log.step(1, {"reward/alone": 0.123456, "odd": float("nan"), "tokens/policy": 12628.0}, groups, [(learned(trace("train-7")), None)])
    viewed = read_run(tmp_path / "tiny")
    index = viewed.index()
    assert index["metrics"] == {"step": [1], "reward/alone": [0.1235], "odd": [None], "tokens/policy": [12628]}
    assert index["traces"]["advantage"] == [0.9354, None]
    assert index["traces"]["error"] == [None, "AgentError: gone"]
    assert index["traces"]["consults"] == [{"knowledge": 1}, {"knowledge": 1}]
    assert index["problems"] == [{"id": "train-7", "kind": "hard", "question": group(7).problem.question}]
    one, two = pages_of(viewed)[0]["traces"]
    assert one["segments"][1]["learned"] == {
        "logprobs": [-1.23] * 3, "ratios": [0.281] * 3, "coefficients": [0.3] * 3, "advantages": [0.935] * 3,
    }  # fmt: skip
    assert one["segments"][0]["learned"] is None
    assert one["segments"][5]["logprobs"][0] == -1e-9
    assert [segment["learned"] for segment in two["segments"]] == [None] * 6
    assert one["seed"] == "4611686018427387905"


def test_learned_values_that_do_not_fit_the_tokens_are_left_out(tmp_path: Path) -> None:
    with running(tmp_path) as log:
        longer = learned(replace(trace("x"), segments=trace("x").segments * 2))
        log.step(1, {}, (group(1),), [(longer, learned(trace("x")))])
    one, two = pages_of(read_run(tmp_path / "tiny"))[0]["traces"]
    assert one["segments"][1]["learned"] is None
    assert two["segments"][1]["learned"] is not None


DAMAGED = {
    "cut": b'{"step":1,"group":{"problem":{"id":"a"',
    "not json": b"reward is 1",
    "types": b'{"step":"one","group":7}',
    "a list": b"[1,2]",
    "deep": b"[" * 100_000,
    "deep meta": b'{"step":1,"group":{"problem":{"id":"a","question":"","answer":"","meta":' + b'{"a":' * 500 + b"1" + b"}" * 503,
    "utf-8": b'{"step":1,"group":{"problem":{"id":"\xff","question":"","answer":""},"traces":[]}}',
    "null byte": b'{"step":1,"group":{"problem":{"id":"\x00","question":"","answer":""},"traces":[]}}',
    "surrogate": b'{"step":1,"group":{"problem":{"id":"\\ud800","question":"","answer":""},"traces":[]}}',
    "nan": b'{"step":NaN,"group":{"problem":{"id":"a","question":"","answer":""},"traces":[]}}',
    "no step": b'{"step":-1,"group":{"problem":{"id":"a","question":"","answer":""},"traces":[]}}',
    "large step": b'{"step":1' + b"0" * 400 + b',"group":{"problem":{"id":"a","question":"","answer":""},"traces":[]}}',
    "empty": b"",
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_left_out_counted_and_named(tmp_path: Path, line: bytes) -> None:
    run = tiny(tmp_path)
    lines = (run / "traces.jsonl").read_bytes().splitlines(keepends=True)
    (run / "traces.jsonl").write_bytes(b"".join([lines[0], line + b"\n", *lines[1:]]))
    (run / "metrics.jsonl").write_bytes(line + b"\n" + (run / "metrics.jsonl").read_bytes())
    viewed = read_run(run)
    index = viewed.index()
    assert index["notes"] == [
        f"{name}.jsonl: 1 line could not be read and is left out (line {n})" for name, n in (("metrics", 1), ("traces", 2))
    ]
    assert index["traces"]["step"] == [1, 1, 2, 2, 3, 3]
    assert index["metrics"]["step"] == [1, 2, 3]
    assert [len(page["traces"]) for page in pages_of(viewed).values()] == [2, 2, 2]


def test_many_damaged_lines_are_not_all_named(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    append(run, *[b"?\n"] * 2000)
    named = "line 4, line 5, line 6, line 7, line 8, …"
    assert read_run(run).index()["notes"] == [f"traces.jsonl: 2,000 lines could not be read and are left out ({named})"]


def test_a_line_without_an_end_is_damage_only_where_nobody_writes_it(tmp_path: Path) -> None:
    with running(tmp_path) as log:
        step(log, 1)
        append(log.folder, b'{"step":2,"gro')
        index = read_run(log.folder).index()
        assert (index["state"], index["notes"], index["recorded"]) == ("running", [], 2)
    index = read_run(log.folder).index()
    assert (index["state"], index["recorded"]) == ("stopped", 2)
    assert index["notes"] == ["traces.jsonl: 1 line could not be read and is left out (line 2)"]


def test_damaged_small_files_are_noted_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    (run / "config.yaml").write_text("run: &a [*a]\n")
    (run / "summary.json").write_text("[" * 100_000)
    (run / "graph.json").write_text('{"width": 1, "height": 1, "nodes": [], "edges": [{"source": "<b>", "target": 3}]}')
    index = read_run(run).index()
    notes = [note.partition(" is not shown: ")[0] for note in index["notes"]]
    assert notes[:3] == ["config.yaml", "graph.json", "summary.json"]
    assert notes[3].startswith("texts are shown whole")
    assert (index["settings"], index["summary"], index["recorded"]) == ({}, None, 6)


def test_pipes_in_place_of_files_are_not_waited_for(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    for name in ("config.yaml", "graph.json", "summary.json", "metrics.jsonl", "lock"):
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
    index = read_run(run).index()
    assert index["notes"][0] == "config.yaml is not shown: there is no such file"
    assert "metrics.jsonl cannot be read: it is not a file" in index["notes"]
    assert (index["state"], index["recorded"], index["metrics"]) == ("stopped", 6, {"step": []})


@pytest.mark.parametrize("settings", ["a: [{2020-01-01: 1}]", f"policy: {{model: {'a' * 5000}}}", "policy: {model: ~nobodyx/x}"])
def test_settings_that_no_run_has_are_a_note(tmp_path: Path, settings: str) -> None:
    run = tiny(tmp_path)
    (run / "config.yaml").write_text(settings)
    index = read_run(run).index()
    assert index["notes"][-1].startswith("texts are shown whole")
    assert index["recorded"] == 6


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    with running(tmp_path) as log:
        pass
    index = read_run(log.folder).index()
    assert index["notes"] == ["no trace is recorded yet"]
    assert (index["recorded"], index["graph"], index["agents"]) == (0, None, ["verify", "knowledge", "reasoning"])


def test_of_many_traces_evenly_spaced_steps_are_shown_whole(tmp_path: Path) -> None:
    run = tiny(tmp_path, steps=100)
    index = read_run(run, traces=22).index()
    assert (index["shown"], index["recorded"]) == (22, 200)
    steps = sorted(set(index["traces"]["step"]))
    assert (steps[0], steps[-1], len(steps)) == (1, 100, 11)
    gaps = [two - one for one, two in pairwise(steps)]
    assert set(gaps) == {10, 9} or set(gaps) == {10}
    assert all(index["traces"]["step"].count(step) == 2 for step in steps)
    assert sorted(set(read_run(run, traces=1).index()["traces"]["step"])) == [1, 100]


# --- following


def test_a_file_that_grows_gives_each_line_once(tmp_path: Path) -> None:
    growing = Growing(tmp_path / "lines", TypeAdapter(int))
    assert list(growing.read()) == []
    growing.path.write_bytes(b"11\n?\n22\n3")
    assert list(growing.read()) == [(0, 3, 11), (5, 3, 22)]
    assert (growing.damaged, growing.rest) == ([2], True)
    with growing.path.open("ab") as file:
        file.write(b"3\n")
    assert not growing.rewritten()
    assert list(growing.read()) == [(8, 3, 33)]
    assert (growing.lines, growing.rest) == (4, False)
    growing.path.write_bytes(b"11\n!\n22\n33\n44\n")
    assert not growing.rewritten()  # what was read last is there
    growing.path.write_bytes(b"11\n?\n")
    assert growing.rewritten()
    growing.path.unlink()
    assert growing.rewritten()


def test_a_live_run_gains_pages_and_a_resumed_one_starts_over(tmp_path: Path) -> None:
    with running(tmp_path) as log:
        viewed = ViewedRun(log.folder)
        assert viewed.refresh()
        step(log, 1)
        assert viewed.refresh()
        first = viewed.page(0)
        assert not viewed.refresh()
        step(log, 2)
        step(log, 3)
        assert viewed.refresh()
        assert viewed.page(0) == first
        assert viewed.index()["traces"]["group"] == [0, 0, 1, 1, 2, 2]
        log.resume_at(1)
        step(log, 2, group(22))
        assert viewed.refresh()
        index = viewed.index()
        assert (index["traces"]["step"], index["metrics"]["step"]) == ([1, 1, 2, 2], [1, 2])
        assert json.loads(viewed.page(1))["traces"][0]["problem"] == "train-22"
        with pytest.raises(LookupError):
            viewed.page(2)
        (log.folder / "summary.json").write_text('{"steps": 2}')
        assert viewed.refresh()
        assert viewed.index()["state"] == "running"
    assert viewed.refresh()
    assert viewed.index()["state"] == "finished"


# --- pieces


def saved(tokenizer: RawTokenizer, folder: Path) -> Pieces:
    tokenizer.save(str(folder / "tokenizer.json"))
    return Pieces(folder / "tokenizer.json")


def test_pieces_of_bytes_join_to_the_text(tmp_path: Path) -> None:
    raw = bpe().backend_tokenizer
    pieces = saved(raw, tmp_path)
    text = "Solve it 😀👩‍🔬! 漢字 naïve <|im_end|>\n x"
    ids = raw.encode(text, add_special_tokens=False).ids
    found = pieces.split(ids, text)
    assert found is not None
    assert "".join(found) == text
    assert len(found) == len(ids)
    for place, piece in enumerate(found):
        if not piece:
            assert "\ufffd" in raw.decode([ids[place]])
    smile = next(place for place, piece in enumerate(found) if "😀" in piece)
    assert found[smile] == "😀"
    assert found[smile - 3 : smile] == ["", "", ""]
    assert "<|im_end|>" in found
    assert pieces.split(ids, text) == found  # the second time from what is known by then


def test_a_text_that_ends_or_starts_in_the_middle_of_a_character(tmp_path: Path) -> None:
    raw = bpe().backend_tokenizer
    pieces = saved(raw, tmp_path)
    ids = raw.encode("a😀b", add_special_tokens=False).ids
    assert pieces.split(ids[:3], raw.decode(ids[:3])) == ["a", "", raw.decode(ids[:3])[1:]]
    tail = pieces.split(ids[2:], raw.decode(ids[2:]))
    assert tail is not None
    assert tail[-1] == "b"
    half = ids[1:2] * 200  # never a character
    found = pieces.split(half, raw.decode(half))
    assert found is not None
    assert "".join(found) == raw.decode(half)


def test_segments_that_part_a_character_are_split_as_one_text(tmp_path: Path) -> None:
    raw = bpe().backend_tokenizer
    pieces = saved(raw, tmp_path)
    ids = tuple(raw.encode("a😀b", add_special_tokens=False).ids)

    def written(token_ids: tuple[int, ...], text: str, thread: str = "main") -> Segment:
        return Segment("policy", "policy", token_ids, text, logprobs=(-0.5,) * len(token_ids), thread=thread)

    segments = [
        written(ids[:3], "a"),
        written(ids[:2], "a", "other"),
        written(ids[3:], "😀b"),
        Segment("context", "x", ids, "a😀b"),
        written(ids, "a😀b"),
    ]
    assert split(segments, pieces) == [
        ["a", "", ""],
        ["a", ""],
        ["", "😀", "b"],
        ["a", "", "", "", "😀", "b"],
        ["a", "", "", "", "😀", "b"],
    ]
    assert split(segments[:1], None) == [None]


def test_tokens_that_end_one_character_and_start_the_next(tmp_path: Path) -> None:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    text = "é漢字ü😀ñ" * 20
    raw.train_from_iterator(
        [text, "漢é字ñ"] * 20,
        trainers.BpeTrainer(vocab_size=275, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    pieces, ids = saved(raw, tmp_path), raw.encode(text).ids
    found = pieces.split(ids, text)
    assert found is not None
    assert "".join(found) == text
    assert len(found) == len(ids)


def test_pieces_of_sentencepiece_keep_their_blanks(tmp_path: Path) -> None:
    raw = RawTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw.train_from_iterator(
        ["what is it about, then"] * 9, trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    )
    raw.add_special_tokens([AddedToken("<s>", special=True)])
    pieces = saved(raw, tmp_path)
    ids = raw.encode("what is it").ids
    assert "".join(pieces.split(ids, "what is it") or []) == "what is it"
    bos = raw.token_to_id("<s>")
    with_bos = pieces.split([bos, *ids], "what is it")
    assert with_bos is not None
    assert with_bos[0] == ""
    assert "".join(with_bos) == "what is it"
    smile = [raw.token_to_id(f"<0x{byte:02X}>") for byte in "😀".encode()]
    text = raw.decode([*ids, *smile, *ids], skip_special_tokens=False)
    found = pieces.split([*ids, *smile, *ids], text)
    assert found is not None
    assert found[len(ids) : len(ids) + 4] == ["", "", "", "😀"]
    assert "".join(found) == text


def test_ids_of_another_tokenizer_give_the_text_whole(tmp_path: Path) -> None:
    pieces = Pieces(data("operators") / "tokenizer.json")
    assert pieces.split([1, 10**12], "ab") is None
    assert pieces.split([-1], "a") is None
    assert pieces.split([4, 5], "nothing of the kind") is None
    assert pieces.split([], "") == []
    strange = Segment("policy", "policy", (10**12, 4), text="whole", logprobs=(-1.0, -2.0), version=0)
    with running(tmp_path) as log:
        log.step(1, {}, [group(1, Trace("p", 0, False, (strange,), ("policy",)))])
    told = pages_of(read_run(tmp_path / "tiny"))[0]["traces"][0]["segments"][0]
    assert (told["tokens"], told["logprobs"], told["learned"]) == (["whole"], None, None)


def test_the_tokenizer_is_the_policys_own_then_the_models_then_none(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    assert len(pages_of(read_run(run))[0]["traces"][0]["segments"][0]["tokens"]) == 9  # `operators` ships
    (run / "policy").mkdir()
    (run / "policy" / "tokenizer.json").write_text('{"a": 1}')
    index = read_run(run).index()
    assert "no tokenizer that loads" in index["notes"][0]
    config = (run / "config.yaml").read_text().replace("model: operators", "model: nobody/nothing")
    (run / "config.yaml").write_text(config)
    (run / "policy" / "tokenizer.json").unlink()
    viewed = read_run(run)
    assert "policy.model = 'nobody/nothing' has a tokenizer.json on this machine" in viewed.index()["notes"][0]
    assert pages_of(viewed)[0]["traces"][0]["segments"][0]["tokens"] == ["@8304ACB?"]


# --- the page


class Elements(HTMLParser):
    """What a browser would find: elements with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), ""))
        self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = False

    def handle_data(self, text: str) -> None:
        if self._open:
            tag, attrs, before = self.found[-1]
            self.found[-1] = tag, attrs, before + text


def unpacked(text: str) -> dict[str, Any]:
    """The data entries of a page."""
    entries = [(attrs["id"], inside) for tag, attrs, inside in Elements(text).found if (attrs.get("id") or "").startswith("data-")]
    return {str(name).removeprefix("data-"): json.loads(gzip.decompress(base64.b64decode(inside))) for name, inside in entries}


def test_the_policy_allows_the_pages_own_scripts_and_styles_and_no_others() -> None:
    text = page.assemble("title", page.SCRIPTS, page.STYLES, [("index", b"{}")])
    policy = page.csp(text)
    for tag in ("script", "style"):
        inline = [inside for name, attrs, inside in Elements(text).found if name == tag and "type" not in attrs]
        assert len(inline) == len(page.SCRIPTS if tag == "script" else page.STYLES)
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" for inside in inline]
        assert re.search(f"{tag}-src ([^;]*)", policy)[1].split() == hashes  # type: ignore[index]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "connect-src" not in policy
    assert "connect-src 'self'" in page.csp(page.assemble("title", page.SCRIPTS, page.STYLES, live=True))


def test_nothing_of_a_run_becomes_markup(tmp_path: Path) -> None:
    name = "<img src=x>&\"'"
    with running(tmp_path) as log:
        segments = [Segment("context", text, (1,), text=text, thread=text) for text in [*HOSTILE, "t" * 1_000_000]]
        bad = Trace(HOSTILE[0], 0, False, tuple(segments), tuple(HOSTILE), "failed", {HOSTILE[0]: 1.0}, HOSTILE[0])
        log.step(1, {HOSTILE[0]: 1.0}, [TraceGroup(Problem(HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3]), (bad,))])
    (tmp_path / "tiny").rename(tmp_path / name)
    text = page_text(tmp_path / name)
    plain = page_text(tiny(tmp_path / "plain", steps=1))
    shape = [(tag, sorted(attrs)) for tag, attrs, _ in Elements(text).found]
    assert shape == [(tag, sorted(attrs)) for tag, attrs, _ in Elements(plain).found]
    assert not any(entry in text for entry in (*HOSTILE[:3], "\x00"))
    entries = unpacked(text)
    told = entries["page-0-0"]["traces"][0]
    assert [segment["tokens"] for segment in told["segments"]] == [[entry] for entry in [*HOSTILE, "t" * 1_000_000]]
    assert entries["index"]["runs"][0]["name"] == name


def test_a_script_that_would_end_its_element_is_refused(tmp_path: Path) -> None:
    for text in ("'</ScRipt>'", "'<!--'"):
        (tmp_path / "x.js").write_text(text)
        with pytest.raises(ValueError, match="ends its own element"):
            page.assemble("title", [str(tmp_path / "x.js")], [])


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    """No element of it names another place, and no style loads one."""
    text = page_text(tiny(tmp_path))
    for tag, attrs, inside in Elements(text).found:
        assert not {"src", "srcset", "action", "onload", "style"} & set(attrs)
        assert attrs.get("href", "data:,") == "data:,"
        if tag == "style":
            assert not re.search(r"@import|url\((?!\s*['\"]?data:)", inside)


# --- the command


def test_the_command_writes_one_file_and_the_same_run_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny(tmp_path)
    assert cli.main(view.command, [str(run), "--no-open"]) == 0
    said = capsys.readouterr().out
    assert f"{run / 'view.html'}: 6 traces, " in said
    first = (run / "view.html").read_bytes()
    assert cli.main(view.command, [str(run), "--no-open"]) == 0
    assert (run / "view.html").read_bytes() == first
    entries = unpacked(first.decode())
    assert set(entries) == {"index", "page-0-0", "page-0-1", "page-0-2"}
    packed = re.findall(r'id="data-[^"]*">([^<]*)<', first.decode())
    assert [base64.b64decode(entry)[4:8] for entry in packed] == [b"\0\0\0\0"] * 4  # gzip's time of packing
    assert not list(run.glob(".*"))


def test_two_runs_are_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tiny(tmp_path / "a"), tiny(tmp_path / "b", steps=2)
    out = tmp_path / "both.html"
    assert cli.main(view.command, [str(one), str(two), "--no-open", "--out", str(out), "--traces", "4"]) == 0
    assert "4 of 6 traces and 4 traces" in capsys.readouterr().out
    entries = unpacked(out.read_text())
    assert [run["shown"] for run in entries["index"]["runs"]] == [4, 4]
    assert set(entries) == {"index", "page-0-0", "page-0-2", "page-1-0", "page-1-1"}


def test_runs_of_one_name_are_told_apart_and_one_run_is_not_compared_with_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, out = tiny(tmp_path / "a"), tiny(tmp_path / "b"), tmp_path / "both.html"
    assert cli.main(view.command, [str(one), "--out", str(out), "--no-open", str(two)]) == 0
    assert [run["name"] for run in unpacked(out.read_text())["index"]["runs"]] == [str(one), str(two)]
    (tmp_path / "link").symlink_to(one)
    assert cli.main(view.command, [str(one), str(tmp_path / "link"), "--no-open"]) == 2
    assert "are one run; name another" in capsys.readouterr().err


def test_a_folder_with_a_name_outside_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny(tmp_path).rename(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff\n"))
    assert cli.main(view.command, [str(run), "--no-open"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert unpacked((run / "view.html").read_text())["index"]["runs"][0]["name"] == "r?\n"


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.html").mkdir()
    assert cli.main(view.command, [str(tiny(tmp_path)), "--no-open", "--out", str(tmp_path / "x.html")]) == 2
    assert "x.html: Is a directory; choose another --out" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "x.html"]


def test_a_run_is_found_by_its_name_and_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny(tmp_path / "runs")
    append(run, b"?\n")
    opener = tmp_path / "opener"
    opener.write_text(f"#!/bin/sh\necho \"$1\" > '{tmp_path}/opened'\n")
    opener.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for name, value in {"BROWSER": f"{opener} %s", "DISPLAY": "", "WAYLAND_DISPLAY": ""}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(view.command, ["tiny"]) == 0
    assert "note: tiny: traces.jsonl: 1 line could not be read and is left out (line 4)" in capsys.readouterr().out
    assert (tmp_path / "opened").read_text().strip() == (run / "view.html").as_uri()
    (tmp_path / "opened").unlink()
    monkeypatch.delenv("BROWSER")
    assert cli.main(view.command, ["tiny"]) == 0  # no display
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nosuch"], "no run 'nosuch' here or in runs/"),
        (["timy"], "did you mean 'tiny'?"),
        (["other"], "is no run's folder: it has no traces.jsonl"),
        (["runs/tiny/config.yaml"], "is a file: give the folder"),
        (["tiny", "nosuch"], "no run 'nosuch'"),
        (["n" * 300], "cannot be looked at: File name too long"),
        ([""], "is no run's folder"),
        (["tiny", "--out", "nosuch/x.html"], "cannot write nosuch/x.html: No such file or directory; choose another --out"),
        (["tiny", "--out", "runs/tiny/traces.jsonl"], "must end in .html"),
        (["tiny", "--traces", "0"], "traces = '0': must be greater than 0"),
        (["tiny", "--traces", "9" * 5000], "traces = '999"),
        (["tiny", "--serve", "--port", "70000"], "port = '70000': must be less than or equal to 65535"),
        (["tiny", "--serve", "--host", "no.such.host.invalid", "--port", "0"], "cannot listen on no.such.host.invalid"),
        (["tiny", "--serve", "--out", "x.html"], "--serve writes no file"),
        (["tiny", "nosuch", "more"], "unrecognized arguments: more"),
        (["tiny", "--traced", "3"], "no setting --traced; did you mean '--traces'?"),
        ([], "the following arguments are required: RUN"),
    ],
)
def test_bad_input_is_one_clear_line(
    args: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(tmp_path / "runs")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main(view.command, args) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error
    assert (tmp_path / "runs" / "tiny" / "traces.jsonl").stat().st_size > 1000


# --- the server


@contextlib.asynccontextmanager
async def client_of(run: Path) -> Any:
    text = page.assemble("title", page.SCRIPTS, page.STYLES, live=True)
    async with TestClient(TestServer(following([ViewedRun(run)], text, "127.0.0.1"))) as client:
        yield client


async def test_the_served_page_follows_the_run(tmp_path: Path) -> None:
    with running(tmp_path) as log:
        step(log, 1)
        async with client_of(log.folder) as client:
            first = await client.get("/index")
            index = (await first.json())["runs"][0]
            assert (index["state"], index["traces"]["step"]) == ("running", [1, 1])
            same = await client.get("/index", headers={"If-None-Match": first.headers["ETag"]})
            assert (same.status, await same.read()) == (304, b"")
            append(log.folder, b'{"step": 2, "gr')
            assert (await client.get("/index", headers={"If-None-Match": first.headers["ETag"]})).status == 304
            os.truncate(log.folder / "traces.jsonl", (log.folder / "traces.jsonl").stat().st_size - 15)
            step(log, 2)
            second = await client.get("/index", headers={"If-None-Match": first.headers["ETag"]})
            assert second.status == 200
            index = (await second.json())["runs"][0]
            assert index["traces"]["step"] == [1, 1, 2, 2]
            told = await (await client.get(f"/page/0/{index['traces']['group'][-1]}")).json()
            assert told["traces"][0]["step"] == 2
            log.resume_at(1)
            index = (await (await client.get("/index")).json())["runs"][0]
            assert index["traces"]["step"] == [1, 1]
            assert (await client.get("/page/0/1")).status == 404


async def test_pages_that_there_are_not_are_404(tmp_path: Path) -> None:
    async with client_of(tiny(tmp_path)) as client:
        await client.get("/index")
        assert (await client.get("/page/0/0")).status == 200
        for place in ("0/3", "1/0", "0", "0/-1", "0/x", "0/" + "9" * 5000, "²/0", "0/0/0"):
            assert (await client.get(f"/page/{place}")).status == 404, place
        assert (await client.get("/traces.jsonl")).status == 404
        for origin, status in ((str(client.make_url("/")).rstrip("/"), 405), ("http://evil.example", 403)):
            assert (await client.post("/index", json={}, headers={"Origin": origin})).status == status


async def test_other_names_are_refused_and_every_answer_is_guarded(tmp_path: Path) -> None:
    async with client_of(tiny(tmp_path)) as client:
        for host in ("evil.example", "evil.example:8050", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "a b"):
            for path in ("/", "/index", "/page/0/0"):
                refused = await client.get(path, headers={"Host": host})
                assert refused.status in (400, 403), host
                assert "train-" not in await refused.text()
        for host in ("localhost:1", "127.0.0.1", "[::1]:8050", "192.168.1.2:8050"):
            assert (await client.get("/index", headers={"Host": host})).status == 200
        for path, status in (("/", 200), ("/index", 200), ("/page/0/0", 200), ("/no", 404)):
            response = await client.get(path)
            assert response.status == status
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'sha256-")
            assert "frame-ancestors 'none'" in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Referrer-Policy"] == "no-referrer"
            assert response.headers["Cache-Control"] == "no-store"
            assert not any(name.startswith("Access-Control") for name in response.headers)
        zipped = await client.get("/index", headers={"Accept-Encoding": "gzip"})
        assert zipped.headers["Content-Encoding"] == "gzip"


async def test_the_command_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    run = tiny(tmp_path)
    with Started("aipo_graph.view", [str(run), "--serve", "--port", "0", "--no-open"], run) as process:
        url = process.wait_for(r"^http://127\.0\.0\.1:\d+/(?=: )")
        async with ClientSession() as client:
            text = await (await client.get(url)).text()
            assert 'data-source="live"' in text
            assert unpacked(text) == {}
            assert (await (await client.get(f"{url}index")).json())["runs"][0]["recorded"] == 6
        assert (process.end(signal.SIGINT), process.err.read_text()) == (0, "")


def test_a_port_in_use_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(view.command, [str(tiny(tmp_path)), "--serve", "--no-open", "--port", str(port)]) == 2
    error = capsys.readouterr().err.strip()
    assert f"cannot listen on 127.0.0.1, port {port} (Address already in use); choose another --port, 0 for any that is free" in error
    assert "\n" not in error


def test_a_file_that_is_no_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="no tokenizer that loads"):
        Pieces(tmp_path / "tokenizer.json")


def test_a_reward_just_below_1_is_not_rounded_to_it() -> None:
    trace = Trace("p", 0, False, (), (), scores={"reward": 0.99996})
    [told] = page.rows(LoggedGroup(1, TraceGroup(Problem("p", "1+1?", "2"), (trace,)), ()))
    assert (told["reward"], trace.solved) == (0.99996, False)
