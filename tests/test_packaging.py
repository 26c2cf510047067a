"""The wheel carries all that a run needs, and works in an empty folder."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_world import save_tiny
from test_chat_graph import tokenizer
from test_messages import QWEN
from warm import warm

from aipo_graph import __version__
from aipo_graph.config import Config
from aipo_graph.load import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def cold(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel in it, beside the dependencies that are installed here: no network is needed."""
    folder = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A path added by a .pth file comes after the site-packages themselves, and its own .pth files (this checkout's) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def python(cold: Path) -> Iterator[str]:
    """Its stand-in (warm.py)."""
    with warm(cold, ("preloaded",), environment()) as path:
        yield path


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(python: str | Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(python), *argv], cwd=folder, env=environment(), capture_output=True, text=True, check=False)


def test_wheel_carries_graphs_prompts_configs_and_data(wheel: Path, root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("graphs", "prompts", "configs"):
        files = [p for p in (root / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert files
        missing = {f"aipo_graph/shipped/{p.relative_to(root).as_posix()}" for p in files} - names
        assert missing == set()
    files = [p for p in (root / "aipo_graph").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {p.relative_to(root).as_posix() for p in files} - names == set()
    assert {"aipo_graph/py.typed", "aipo_graph/data/operators/model.safetensors", "aipo_graph/data/operators/tokenizer.json"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    vendor = {"htm-preact.umd.js", "uplot.iife.min.js", "uplot.css", "LICENSE-htm.txt", "LICENSE-preact.txt", "LICENSE-uplot.txt"}
    assert {f"aipo_graph/view/static/vendor/{name}" for name in vendor} <= names
    assert {"aipo_graph/view/static/viewer.js", "aipo_graph/view/static/style.css", "aipo_graph/demo/static/demo.js"} <= names


def test_wheel_carries_nothing_else(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    tops = {name.partition("/")[0] for name in archive.namelist()}
    assert tops == {"aipo_graph", f"aipo_graph-{__version__}.dist-info"}
    assert [name for name in archive.namelist() if "__pycache__" in name or name.endswith((".pyc", ".tmp"))] == []
    assert sum(info.compress_size for info in archive.infolist()) < 5_000_000


def test_the_tree_that_is_imported_is_the_wheels(python: str, cold: Path, tmp_path: Path) -> None:
    done = run(
        python,
        tmp_path,
        "-c",
        "import aipo_graph.load as l; print(l.__file__); print(l.find('graphs/aipo.py')); l.load('graphs/aipo.py:build')",
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(cold.parents[1])) for line in done.stdout.splitlines())


SCRIPT = """
from langchain.agents import create_agent
from aipo_graph import train, evaluate, view, Config, Agent, PolicyChatModel

def calculator(expression: str) -> str:
    "Works out a product."
    return "42"

run = train(
    {policy!r},
    {{"rollout": {{"problems": 2, "traces": 4, "max_tokens": 32}}, "evaluate": {{"problems": 1, "samples": 1, "problems_with_agents": 1}}}},
    graph=create_agent(PolicyChatModel(), tools=[calculator]),
    data="sums.jsonl",
    reward=lambda question, answer, reply: float(len(reply) % 2),
    steps=1,
)
print(run.summary["steps"], run.policy.is_dir(), run.view(open=False))
"""


def test_a_script_of_a_few_lines_in_an_empty_folder(python: str, tmp_path: Path) -> None:
    policy = save_tiny(tmp_path / "policy", tokenizer(QWEN))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sums.jsonl").write_text("".join(f'{{"question": "{n}+1", "answer": "{n + 1}"}}\n' for n in range(9)))
    (tmp_path / "mine" / "script.py").write_text(SCRIPT.format(policy=policy))
    done = run(python, tmp_path / "mine", "script.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 True runs/policy/view.html"


def test_the_console_script_is_the_commands(wheel: Path, cold: Path, tmp_path: Path) -> None:
    (entry,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt"))
    assert "aipo-graph = aipo_graph.__main__:main" in zipfile.ZipFile(wheel).read(entry).decode()
    done = run(cold, tmp_path, "-m", "aipo_graph", "train", "--dry-run", "--train.steps", "3")
    assert (done.returncode, "  steps: 3\n" in done.stdout) == (0, True), done.stderr
    done = run(cold, tmp_path, "-m", "aipo_graph", "trian")
    assert (done.returncode, done.stderr) == (2, "error: no command 'trian'; did you mean 'train'?\n")


def test_dry_run_in_an_empty_folder(python: str, tmp_path: Path) -> None:
    done = run(python, tmp_path, "-m", "aipo_graph.train", "--dry-run", "--train.steps", "3")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^train:\n  steps: 3$", done.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_the_viewer_in_an_empty_folder(python: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "metrics.jsonl").write_text('{"step": 1}\n')
    done = run(python, tmp_path, "-m", "aipo_graph.view", "mine", "--no-open")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mine" / "view.html").stat().st_size > 100_000


def test_a_user_error_is_one_line_and_exit_code_2(python: str, tmp_path: Path) -> None:
    done = run(python, tmp_path, "-m", "aipo_graph.train", "--train.stepz", "3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "did you mean '--train.steps'?" in done.stderr


def test_constraints_pin_every_direct_dependency_within_its_range(root: Path) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"] + project["optional-dependencies"]["dev"]]
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name != "aipo-graph":
            assert name in pins
            assert requirement.specifier.contains(pins[name]), f"{name} {pins[name]} is outside {requirement.specifier}"


@pytest.mark.parametrize("target", ["train", "test", "lint", "types", "demo", "evaluate", "bench", "help"])
def test_make_targets_have_a_help_line(root: Path, target: str) -> None:
    done = subprocess.run(["make", "--no-print-directory"], cwd=root, capture_output=True, text=True, check=True)
    assert re.search(rf"^  make {target} +\S", done.stdout, re.MULTILINE)


def test_a_bench_writes_past_the_results_that_the_docs_quote(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quoted = root / "benchmarks" / "results" / "bench.json"
    before = quoted.read_bytes()
    monkeypatch.chdir(tmp_path)
    bench = load(f"{root}/benchmarks/bench.py:report")
    bench(Config(), {key: [1.0] for key in ("graph", "engine", "ratio", "learner", "superstep")}, quoted.name)
    assert json.loads((tmp_path / "runs" / "bench" / quoted.name).read_text())["rows"]["ratio"] == [1.0]
    assert quoted.read_bytes() == before
