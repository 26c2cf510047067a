"""docs/train-your-model.md: its settings parse, its data file is read, its commands exist, its metrics and error messages are real."""

import importlib
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.load import data
from aipo_graph.tasks.datasets import MAPPINGS
from aipo_graph.tasks.open import open_task

COMPUTED = {"ended", "consults", "skipped", "seconds"}
"""Metrics whose name is put together in the code; what stands before the slash is looked for."""


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs/train-your-model.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


def commands(page: str) -> Iterator[list[str]]:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line)


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the table with this first column."""
    (body,) = re.findall(rf"^\| {heading} \|.*\n\| -.*\n((?:\|.*\n)+)", page, re.M)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body.splitlines()]


@pytest.fixture
def folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with what the page's commands expect: configs/ and a finished run."""
    shutil.copytree(root / "configs", tmp_path / "configs")
    run = tmp_path / "runs" / "qwen3_1p7b_lora"
    shutil.copytree(data("operators"), run / "policy")
    config, _ = cli.parse([str(root / "configs/qwen3_1p7b_lora_1gpu.yaml")], Config, prog="test")
    (run / "config.yaml").write_text(cli.write_yaml(config))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_yaml_block_parses(page: str) -> None:
    found = [Config.model_validate(yaml.safe_load(text)) for text in blocks(page, "yaml")]
    assert len(found) == 2


def test_the_data_file_on_the_page_is_read_with_the_settings_on_the_page(page: str, folder: Path) -> None:
    (rows,) = blocks(page, "json")
    Path("mine.jsonl").write_text(rows)
    Path("mine_test.jsonl").write_text('{"problem": "What is 2 + 2?", "solution": "4", "topic": "sums"}')
    settings = next(text for text in blocks(page, "yaml") if "columns" in text)
    Path("mine.yaml").write_text(settings)
    task = open_task(cli.parse(["mine.yaml"], Config, prog="test")[0])
    problems = {p.question: p for p in (task.train(i) for i in range(2))}
    assert {p.answer for p in problems.values()} == {"391", "2"}
    assert {p.kind for p in problems.values()} == {"products", "remainders"}


def test_our_commands_on_the_page_are_accepted(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = [words for words in commands(page) if words[:2] == ["python", "-m"] and words[2].startswith("aipo_graph.")]
    assert {words[2] for words in ours} == {"aipo_graph.train", "aipo_graph.evaluate", "aipo_graph.demo"}
    for _, _, module, *argv in ours:
        command = importlib.import_module(module)
        if module == "aipo_graph.demo":
            assert command.settings(argv).question
            continue
        command.main([*argv, *([] if "--dry-run" in argv else ["--dry-run"])])
        assert "rollout:" in capsys.readouterr().out, argv


def test_the_comparison_on_the_page_is_accepted(page: str, root: Path) -> None:
    (words,) = re.findall(r"`(--rollout\.with_agents 0 [^`]+)`", page)
    config, _ = cli.parse([str(root / "configs/qwen3_1p7b_lora_1gpu.yaml"), *words.replace(" N", " 900").split()], Config, prog="test")
    assert (config.rollout.traces_with_agents, config.train.tokens) == (0, 900)


def test_the_helper_is_served_as_the_config_says(page: str, root: Path) -> None:
    text = (root / "configs/qwen3_1p7b_lora_1gpu.yaml").read_text()
    (served,) = re.findall(r"#\s+(vllm serve .*?) \\\n#\s+(.*)\n", text)
    assert shlex.split(" ".join(served)) in list(commands(page))


def test_the_python_on_the_page_runs(page: str, folder: Path) -> None:
    names: dict[str, object] = {}
    for text in blocks(page, "python"):
        exec(compile(text, "docs/train-your-model.md", "exec"), names)
    assert {"model", "tokenizer"} <= set(names)


def test_settings_named_on_the_page_exist(page: str) -> None:
    sections = {name: field.annotation.model_fields for name, field in Config.model_fields.items()}  # type: ignore[union-attr]
    named = set(re.findall(rf"(?<![\w/.-])({'|'.join(sections)})\.(\w+)(?!\.?\w*/)", page))
    assert len(named) > 30
    assert {f"{section}.{key}" for section, key in named if key not in (*sections[section], "py", "md")} == set()


def test_metrics_on_the_page_are_logged(page: str, root: Path) -> None:
    sources = "".join(
        (root / "aipo_graph" / name).read_text()
        for name in ("rollout/metrics.py", "rollout/sync.py", "learn/loss.py", "learn/learner.py", "train.py")
    )
    names = [name for first, *_ in table(page, "metric") for name in re.findall(r"`([^`]+)`", first)]
    assert len(names) >= 35
    for name in names:
        stem = name.partition("/")[0]
        computed = stem in COMPUTED or stem.removesuffix("_mean") != stem
        wanted = stem.removesuffix("_mean") if computed else name.removesuffix("/NAME")
        assert re.search(rf'"{re.escape(wanted)}["/_]' if computed else f'"{re.escape(wanted)}"', sources), name


def test_errors_on_the_page_are_ours(page: str, root: Path) -> None:
    """Each quoted message stands in the source, numbers and names aside."""
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((root / "aipo_graph").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?r?"', "", source)
    quoted = [text for first, *_ in table(page, "error") for text in re.findall(r"`([^`]+)`", first)]
    assert len(quoted) > 12
    for text in quoted:
        if text.startswith("Couldn't reach"):  # what `datasets` says
            continue
        parts = re.split(r"\d+|'\w+'|…|\(…\)", text)
        longest = max((part.strip(" ()") for part in parts), key=len)
        assert longest in source, text


def test_every_ready_data_set_is_on_the_page(page: str) -> None:
    assert {cells[0].strip("`") for cells in table(page, "`task.name`")} == set(MAPPINGS) - {"word_problems"}
    for name, layout in MAPPINGS.items():
        if name not in ("word_problems", "dataset"):
            assert layout.data.partition(":")[0] in page


def test_every_large_config_is_on_the_page(page: str, root: Path) -> None:
    small = {"quickstart", "word_problems"}
    assert {path.stem for path in (root / "configs").glob("*.yaml")} - small == {cells[0].strip("`") for cells in table(page, "config")}
