"""README.md and docs/: every code block is run or parsed, and the names, metrics and messages on the pages are real."""

import ast
import importlib
import importlib.util
import math
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
from tiny_learner import group, random_groups, segment, tiny_learner, trace

from aipo_graph import Run, cli, errors
from aipo_graph.config import Config, Loss
from aipo_graph.learn.advantage import ESTIMATORS
from aipo_graph.learn.batch import pack
from aipo_graph.learn.loss import COEFFICIENTS, SURROGATES
from aipo_graph.load import data
from aipo_graph.log import read_metrics
from aipo_graph.rollout.stream import SyncCheck, rollout_metrics
from aipo_graph.tasks.datasets import MAPPINGS
from aipo_graph.tasks.open import open_task

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md")) if "results" not in str(path))]
FENCE = re.compile(r"^(?:<!-- no-run: (.+) -->\n)?```(\w*) *(?:title=\"(\S+)\")?(.*)\n((?s:.*?))^```$", re.M)
OTHERS = {"aipo-graph", "vllm", "tensorboard", "hf", "ray", "."}
"""Programs of others that pages name."""


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str
    title: str
    no_run: str
    """Why it is not run."""


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str = "") -> list[Block]:
    found = [Block(page, kind, text, title, reason) for reason, kind, title, _, text in FENCE.findall(read(page))]
    return [block for block in found if language in ("", block.language)]


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the tables with this first column."""
    bodies = re.findall(rf"^\| {heading} \|.*\n\| -.*\n((?:\|.*\n)+)", read(page), re.M)
    assert bodies
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for body in bodies for line in body.splitlines()]


def quoted(page: str, heading: str) -> list[str]:
    return [name for first, *_ in table(page, heading) for name in re.findall(r"`([^`]+)`", first)]


def with_language(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture
def folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages' commands expect: configs, prompts, examples and finished runs."""
    for name in ("configs", "prompts", "examples"):
        shutil.copytree(root / name, tmp_path / name)
    for name in ("calculator", "expert", "legs"):
        shutil.copytree(data("operators"), tmp_path / "examples" / name / "policy", dirs_exist_ok=True)
    (tmp_path / "gpqa_diamond.csv").touch()
    for name, config in (("qwen3_1p7b_lora", "qwen3_1p7b_lora_1gpu"), ("quickstart", "quickstart"), ("masked", "quickstart")):
        shutil.copytree(data("operators"), tmp_path / "runs" / name / "policy")
        settings, _ = cli.parse([str(root / f"configs/{config}.yaml")], Config, prog="test")
        (tmp_path / "runs" / name / "config.yaml").write_text(cli.write_yaml(settings))
        (tmp_path / "runs" / name / "traces.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- code blocks


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        assert read(page).count("\n```") == 2 * len(blocks(page)), f"{page}: a fence that is not closed, or not at the line's start"
        for block in blocks(page):
            assert block.language in ("python", "sh", "yaml", "json"), block
    for page in set(PAGES) - {"README.md"}:
        assert not re.search(r"^```\w+ (?!title=)", read(page), re.M), f"{page}: the site would show this block as text"


@pytest.mark.parametrize("page", with_language("python"))
def test_python_runs(page: str, folder: Path) -> None:
    """From top to bottom in one namespace; of a block that says why it is not run, the imports."""
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page, "python"):
        tree = ast.parse(block.text)
        if block.no_run:
            tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(tree, f"<{page}>", "exec"), names)


@pytest.mark.parametrize("page", with_language("yaml"))
def test_yaml_is_a_config(page: str, folder: Path) -> None:
    for block in blocks(page, "yaml"):
        Path("block.yaml").write_text(block.text)
        cli.parse(["block.yaml"], Config, prog="test")


def test_blocks_with_a_title_are_the_shipped_files(root: Path) -> None:
    titled = [block for page in PAGES for block in blocks(page) if block.title]
    assert len(titled) >= 4
    for block in titled:
        assert (root / block.title).read_text(encoding="utf-8") == block.text, block.title


@pytest.mark.parametrize("page", with_language("sh"))
def test_commands_are_accepted(page: str, root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = re.findall(r"^([\w-]+):.*##", (root / "Makefile").read_text(), re.M)
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for words in (words for block in blocks(page, "sh") for words in commands(block.text)):
        match words:
            case ["make", target, *_]:
                assert target in targets, words
            case ["pip", "install", *rest]:
                named = [name for word in rest for found in re.findall(r"\[(.+)\]", word) for name in found.split(",")]
                assert set(named) <= set(extras), words
            case ["python", "-m", "pytest", path, *_]:
                assert (root / path).exists(), words
            case ["python", "-m", "venv", *_]:
                pass
            case ["python", "-m", module, *argv]:
                accept(module, argv, words)
            case ["python", path, *_]:
                assert (root / path).is_file(), words
            case [program, *_]:
                assert program in OTHERS, words
    capsys.readouterr()


def accept(module: str, argv: list[str], words: list[str]) -> None:
    """Passes the words to the command's own reading of them. Raises what it raises for a wrong one."""
    match module.partition(".")[2], argv:
        case "train", _:
            importlib.import_module(module).main([*argv, *([] if "--dry-run" in argv else ["--dry-run"])])
        case "evaluate", ["--compare", *folders]:
            assert len(folders) == 2, words
        case "evaluate", _:
            importlib.import_module(module).main([*argv, "--dry-run"])
        case "demo", _:
            assert importlib.import_module("aipo_graph.demo").settings(argv).model, words
        case "view", _:
            given, _ = cli.parse(argv, importlib.import_module("aipo_graph.view.__main__").View, prog="view")
            assert Path(given.run).is_dir(), words
        case "draw", _:
            importlib.import_module(module).command(argv)
        case _:
            assert importlib.util.find_spec(module), words


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page: str, root: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)
    for module in set(re.findall(r"`python -m ((?:aipo_graph|experiments|examples)[\w.]*)", text)):
        assert importlib.util.find_spec(module), module
    for path in set(re.findall(r"`python ([\w/]+\.py)", text)):
        assert (root / path).is_file(), path


# --- what the pages say is so


@pytest.mark.parametrize("page", PAGES)
def test_settings_named_on_a_page_exist(page: str) -> None:
    """But for what a run says of an agent: `agents.knowledge: μ recorded`."""
    sections = {name: {*field.annotation.model_fields} for name, field in Config.model_fields.items()}  # type: ignore[union-attr]
    named = re.findall(rf"(?<![\w/.-])({'|'.join(sections)})\.(\w+)\b(?![\w.]*/|: μ)", read(page))
    sections["run"] = {*sections["run"], *vars(Run)}  # and the attributes of what `train` returns
    assert {f"{section}.{key}" for section, key in named if key not in (*sections[section], "py", "md")} == set()


def test_links_of_the_readme_lead_to_files(root: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", read("README.md")):
        assert (root / target).exists(), target


def test_every_choice_of_the_loss_has_its_formula() -> None:
    assert quoted("docs/loss.md", "name") == [*ESTIMATORS, *SURROGATES, *COEFFICIENTS]
    assert set(quoted("docs/loss.md", "baseline")) == set(get_args(Loss.model_fields["baseline"].annotation))


def test_every_error_class_is_in_the_faq() -> None:
    ours = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(quoted("docs/failures.md", "class")) >= ours


def test_messages_in_the_faq_are_ours(root: Path) -> None:
    """The fixed words of each message stand in the source: what is between numbers, quoted names and ellipses."""
    files = [path for path in sorted((root / "aipo_graph").rglob("*.[pj][ys]")) if "vendor" not in path.parts]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    source = re.sub(r'"\s*\n\s*f?r?"', "", source).replace("{{", "{").replace("}}", "}")
    messages = [text for text in quoted("docs/failures.md", "message") if not text.startswith("Couldn't reach")]  # `datasets` says that
    assert len(messages) > 40
    for text in messages:
        parts = [part.strip(" ():,") for part in re.split(r"\d+(?:\.\d+)?|'[\w/.]+'|\(…\)|\{…\}|…", text)]
        assert max(map(len, parts)) >= 8, f"nothing fixed in {text!r}"
        for part in parts:
            assert part in source, f"{text!r}: nothing says {part!r}"


@pytest.mark.slow
def test_metrics_on_the_page_are_those_that_are_logged(viewed_run: Path, tmp_path: Path) -> None:
    """A real run's, and those of what such a run need not meet: failures, redraws, KL, a skipped step, a server."""
    failed = group(trace(segment("policy", 1), status="timeout"), trace(segment("policy", 1), status="failed"))
    ended = [group(trace(segment("policy", 1), status=status)) for status in ("length", "budget", "leaked")]
    rewritten = trace(segment("policy", 1))
    object.__setattr__(rewritten, "scores", {"reward": 1.0, "rewrites": 2.0, "invalid_calls": 1.0, "misfits": 1.0, "short": 0.5})
    learner = tiny_learner(tmp_path, loss={"kl_weight": 0.1})
    wrong = pack(random_groups(1), learner.config.loss)
    wrong.advantages[0] = math.nan
    logged = {"step": 0.0}
    for row in read_metrics(viewed_run / "metrics.jsonl"):
        logged |= row
    logged |= rollout_metrics([failed, *ended, group(rewritten)], [], 0, [failed], [failed])
    logged |= learner.step(pack(random_groups(0), learner.config.loss)) | learner.step(wrong)
    logged |= SyncCheck("float32")((-1.0,), (-1.0,), 1)
    logged |= {"restarts/worker": 0.0, "wait/worker": 0.0, "wait/worker_max": 0.0}  # test_cluster.py sees them logged
    names = {plain(name) for name in logged if name != "step"}
    on_page = set(quoted("docs/metrics.md", "metric"))
    assert names - on_page == set(), "not on the page"
    assert on_page - names == set(), "on the page, but never logged"


def plain(name: str) -> str:
    """The name as the page has it: a word in capitals for the names of agents, kinds, reasons and bounds."""
    name = re.sub(r"^(agent_ratio_below)/[^/]+(/\w+)?$", r"\1/BOUND", name)
    name = re.sub(r"^(agent_\w+|floor_hit|ceiling_hit)/(?!BOUND)\w+$", r"\1", name)
    name = re.sub(r"^(restarts|wait)/[a-z]+", r"\1/KIND", name)
    name = re.sub(r"^(consults)/\w+$", r"\1/AGENT", name)
    name = re.sub(r"^(reward/alone)/\w+$", r"\1/KIND", name)
    name = re.sub(r"^(score)/\w+$", r"\1/NAME", name)
    name = re.sub(r"^(ended/failed)/\w*$", r"\1/ERROR", name)
    return re.sub(r"^(skipped)/\w+$", r"\1/REASON", name)


# --- docs/train-your-model.md

GUIDE = "docs/train-your-model.md"


def test_the_data_file_of_the_guide_is_read_with_its_settings(folder: Path) -> None:
    (rows,) = blocks(GUIDE, "json")
    Path("mine.jsonl").write_text(rows.text)
    Path("mine_test.jsonl").write_text('{"problem": "What is 2 + 2?", "solution": "4", "topic": "sums"}')
    settings = next(block.text for block in blocks(GUIDE, "yaml") if "columns" in block.text)
    Path("mine.yaml").write_text(settings)
    task = open_task(cli.parse(["mine.yaml"], Config, prog="test")[0])
    problems = {p.question: p for p in (task.train(i) for i in range(2))}
    assert {p.answer for p in problems.values()} == {"391", "2"}
    assert {p.kind for p in problems.values()} == {"products", "remainders"}


def test_the_comparison_of_the_guide_is_accepted(root: Path) -> None:
    (words,) = re.findall(r"`(--rollout\.with_agents 0 [^`]+)`", read(GUIDE))
    config, _ = cli.parse([str(root / "configs/qwen3_1p7b_lora_1gpu.yaml"), *words.replace(" N", " 900").split()], Config, prog="test")
    assert (config.rollout.traces_with_agents, config.train.tokens) == (0, 900)


def test_the_helper_is_served_as_the_config_says(root: Path) -> None:
    text = (root / "configs/qwen3_1p7b_lora_1gpu.yaml").read_text()
    (served,) = re.findall(r"#\s+(vllm serve .*?) \\\n#\s+(.*)\n", text)
    assert shlex.split(" ".join(served)) in [words for block in blocks(GUIDE, "sh") for words in commands(block.text)]


def test_every_ready_data_set_is_in_the_guide() -> None:
    assert {cells[0].strip("`") for cells in table(GUIDE, "`task.name`")} == set(MAPPINGS) - {"word_problems"}
    for name, layout in MAPPINGS.items():
        if name not in ("word_problems", "dataset"):
            assert layout.data.partition(":")[0] in read(GUIDE)


def test_every_large_config_is_in_the_guide(root: Path) -> None:
    small = {"quickstart", "word_problems"}
    assert {path.stem for path in (root / "configs").glob("*.yaml")} - small == {cells[0].strip("`") for cells in table(GUIDE, "config")}
