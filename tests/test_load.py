"""The one dynamic import: found in the right order, imported once, faults told in one line."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from langchain_core.messages import HumanMessage

from aipo_graph.cli import read_yaml
from aipo_graph.config import Config
from aipo_graph.errors import AipoError, ConfigError, GraphError
from aipo_graph.load import data, find, load, model, shipped
from aipo_graph.messages import read_tokenizer
from aipo_graph.rollout.agents import Prompts
from aipo_graph.rollout.tokens import Tokenizer
from aipo_graph.tasks.open import open_task


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(spec: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_module_and_file(here: Path) -> None:
    (here / "my.py").write_text("def build():\n    return 'mine'\n")
    assert load("my.py:build")() == "mine"
    assert load(f"{here}/my.py:build") is load("my.py:build")
    assert load("aipo_graph.errors:ConfigError") is ConfigError


def test_a_file_is_imported_once_and_its_annotations_resolve(here: Path) -> None:
    (here / "my.py").write_text(
        "from __future__ import annotations\nimport dataclasses\nprint('run')\n@dataclasses.dataclass\nclass A:\n    x: B\nclass B: pass\n"
    )
    first = load("my.py:A")
    assert first is load("my.py:A")
    assert dataclasses.fields(first)[0].name == "x"


def test_a_file_that_was_edited_is_read_again_and_so_is_what_stands_on_it(here: Path) -> None:
    (here / "rules.py").write_text("WORD = 'one'\n")
    (here / "my.py").write_text("from aipo_graph.load import load\nclass A:\n    word = load('rules.py:WORD')\n")
    first = load("my.py:A")
    (here / "rules.py").write_text("WORD = 'two'\n")  # of the same size, within a second
    assert (first.word, load("my.py:A").word) == ("one", "two")
    again = load("my.py:A")
    (here / "rules.py").unlink()
    assert load("my.py:A") is again


@pytest.mark.parametrize("spec", ["~nobody-here/my.py:build", "no\0where/my.py:build", f"{'x' * 300}.py:build"])
def test_a_name_that_no_file_can_have(spec: str, here: Path) -> None:
    assert refusal(spec).startswith("no file ")


def test_two_files_of_one_name_do_not_meet(here: Path) -> None:
    for folder in ("a", "b"):
        (here / folder).mkdir()
        (here / folder / "same.py").write_text(f"where = {folder!r}\n")
    assert (load("a/same.py:where"), load("b/same.py:where")) == ("a", "b")


def test_order_of_lookup(here: Path) -> None:
    ours = shipped() / "configs/quickstart.yaml"
    assert find("configs/quickstart.yaml") == ours
    (here / "configs").mkdir()
    (here / "configs/quickstart.yaml").touch()
    assert find("configs/quickstart.yaml") == here / "configs/quickstart.yaml"
    assert find("prompts", "dir") == shipped() / "prompts"


def test_nothing_there_names_the_nearest(here: Path) -> None:
    (here / "configs").mkdir()
    (here / "configs/mine.yaml").touch()
    with pytest.raises(ConfigError, match=r"no file 'configs/mina.yaml'.*did you mean 'configs/mine.yaml'\?"):
        find("configs/mina.yaml")
    with pytest.raises(ConfigError, match="no folder 'prompt'.*did you mean 'prompts'"):
        find("prompt", "dir")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def built(): ...\n", "my.py has no 'build'; did you mean 'built'?"),
        ("x = 1\ny = (2\n", "SyntaxError in {here}/my.py:2"),
        ("import json\n\njson.loads('{{')\n", "JSONDecodeError in {here}/my.py:3: Expecting property name"),
        ("import nope_nope\n", "ModuleNotFoundError in {here}/my.py:1: No module named 'nope_nope'"),
        ("a = 1\nb = a.c\n", "AttributeError in {here}/my.py:2"),
        ("raise ValueError('two\\nlines')\n", "ValueError in {here}/my.py:1: two lines"),
        ("x = '\0'\n", "in {here}/my.py"),
        ("def f(): f()\nf()\n", "RecursionError in {here}/my.py"),
    ],
)
def test_a_file_that_does_not_load(here: Path, source: str, message: str) -> None:
    (here / "my.py").write_text(source.replace("{{", "{"))
    for _ in range(2):  # a failed import leaves nothing behind that a second try would find
        assert message.format(here=here) in refusal("my.py:build")


def test_an_error_of_ours_passes_through(here: Path) -> None:
    (here / "my.py").write_text("from aipo_graph.errors import GraphError\nraise GraphError('no node')\n")
    with pytest.raises(GraphError, match="no node"):
        load("my.py:build")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("graphs/aipo.py", "names nothing to load"),
        ("my graph:build x", "names nothing to load"),
        (":build", "names nothing to load"),
        ("nope/graph.py:build", "no file 'nope/graph.py' here or among the files that ship"),
        ("nopkg.mod:build", "No module named 'nopkg'; install it, or give the file as path/to/file.py:name"),
        ("aipo_graph.typez:build", "No module named 'aipo_graph.typez'"),
        ("aipo_graph.types:Problm", "has no 'Problm'; did you mean 'Problem'?"),
    ],
)
def test_a_spec_that_names_nothing(here: Path, spec: str, message: str) -> None:
    assert message in refusal(spec)


def test_model_names(here: Path) -> None:
    assert model("someone/some-model-8b") == "someone/some-model-8b"
    (here / "mine").mkdir()
    assert model("mine") == str(here / "mine")
    assert Path(model("operators")) == data("operators")
    with pytest.raises(ConfigError, match="no folder './nope'"):
        model("./nope")


ROWS = [(f"{i}+1?", i + 1) for i in range(40)]
WRITTEN = {
    "prompt.md": "Solve: {question}\n",
    "a.yaml": "run: {name: x}\n",
    "a.csv": "question,answer\n" + "".join(f"{q},{a}\n" for q, a in ROWS),
    "a.jsonl": "".join(f'{{"question": "{q}", "answer": "{a}"}}\n' for q, a in ROWS),
    "model/chat_template.jinja": "{{ messages[0].content }}",
}
"""The text files that a user gives."""


def read(path: Path) -> object:
    """What the package makes of one of them."""
    if path.suffix == ".md":
        return Prompts.read(path.parent).render("prompt", question="1+1?")
    if path.suffix == ".yaml":
        return read_yaml(path)
    if path.suffix == ".jinja":
        return Tokenizer(read_tokenizer(path.parent)).chat.render([HumanMessage("1+1?")])
    return open_task(Config.model_validate({"task": {"name": "dataset", "data": str(path)}})).heldout(99)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_byte_order_mark_is_no_text_and_another_encoding_is_refused(name: str, here: Path) -> None:
    shutil.copytree(data("operators"), here / "model")
    path = here / name
    path.write_text(WRITTEN[name], encoding="utf-8")
    plain = read(path)
    path.write_text(WRITTEN[name], encoding="utf-8-sig")
    assert read(path) == plain
    for encoding in ("utf-16", "utf-32"):
        path.write_text(WRITTEN[name], encoding=encoding)
        with pytest.raises(AipoError) as refused:
            read(path)
        assert "\n" not in str(refused.value)
        assert path.name in str(refused.value) or str(path.parent) in str(refused.value)
        assert re.search("UTF-8|utf-8", str(refused.value))
