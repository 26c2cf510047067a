"""Prompt files: checked when read, filled in once."""

from pathlib import Path

import pytest

from aipo_graph.errors import ConfigError
from aipo_graph.rollout.agents import Prompts


def write(folder: Path, **texts: str) -> Prompts:
    for name, text in texts.items():
        (folder / f"{name}.md").write_text(text)
    return Prompts.read(folder)


@pytest.mark.parametrize("folder", ["prompts", "prompts/operators"])
def test_the_shipped_prompts_read(root: Path, folder: str) -> None:
    prompts = Prompts.read(root / folder)
    for name in ("policy", "solo"):
        assert "17 apples" in prompts.render(name, question="17 apples")
        assert "{{" not in prompts.render(name, question="17 apples")


def test_values_are_never_parsed_again(tmp_path: Path) -> None:
    prompts = write(tmp_path, policy="\\boxed{{}} {question}\n")
    assert prompts.render("policy", question="{transcript} {0} {") == "\\boxed{} {transcript} {0} {"


def test_fields_that_are_not_given_are_blank(tmp_path: Path) -> None:
    assert write(tmp_path, verify="{query}|{transcript}").render("verify", query="1=1") == "1=1|"


@pytest.mark.parametrize("field", ["query: what is asked", "query!z", "answer", "question.__class__", "question[0]", "", "0"])
def test_an_unknown_field_is_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.md: unknown field .*known are question, query, transcript"):
        write(tmp_path, policy=f"{{{field}}}")


@pytest.mark.parametrize("text", ["a { b", "a } b", "\\boxed{"])
def test_a_stray_brace_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.md: .*(brace|unknown field)"):
        write(tmp_path, policy=text)


def test_a_prompt_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "policy.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        Prompts.read(tmp_path)


def test_a_missing_prompt_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no prompt 'plan' in .*add plan\.md \(there are: policy\)"):
        write(tmp_path, policy="{question}").render("plan")
