"""What all tests share. One torch thread per process, set before anything imports torch: more are slower beside other load."""

import contextlib
import gc
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright
from started import run_module, share
from warm import warm
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when it is imported: who may connect, at which priority, and how long it takes to notice that a node or its head is gone.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
os.environ |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "10", "RAY_health_check_period_ms": "500"}
gc.set_threshold(50_000)  # of what thousands of tests are made of, none is garbage

collect_ignore = ["hasty.py", "vllm_quiet.py"]
TOGETHER = (
    ("vllm_server", "vllm_train", "vllm_in_process", "chat_agents"),
    ("view", "view_browser", "dashboard", "docs"),
)
"""Test files that share what is slow to make: a vLLM server, a trained run."""
LONG = ("vllm_server", "train", "cluster", "study", "ranks", "view", "packaging", "site", "jail", "pretrain", "api", "benchmarks")
"""Files that take longest, begun first, so that no process is left alone with one at the end."""


class Files(LoadScopeScheduling):
    """Side by side (`pytest -n 2`), a process takes a whole file, or all that share something."""

    def _split_scope(self, nodeid: str) -> str:
        name = Path(nodeid.partition("::")[0]).stem.removeprefix("test_")
        return next((names[0] for names in TOGETHER if name in names), name)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Files:
    config.option.loadscopereorder = False
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": index for index, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_configure(config: pytest.Config) -> None:
    """Side by side, all fork from one process that has the imports, the processes that take the tests first."""
    if config.option.numprocesses:
        server = contextlib.ExitStack()
        python = os.environ["WARM_PYTHON"] = server.enter_context(warm(sys.executable, ("preloaded",)))
        config.add_cleanup(server.close)
        spawn.set_executable(python)
        config.option.tx = [f"popen//python={python}"] * len(config.option.tx)
    elif "WARM_PYTHON" in os.environ:
        sys.executable = f"{sys.prefix}/bin/python"
    if "WARM_PYTHON" in os.environ:
        share()


def pytest_unconfigure() -> None:
    gc.freeze()  # pytest looks through all there is five times more


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def warm_python() -> Iterator[str]:
    """A stand-in (warm.py) for this Python."""
    if path := os.environ.get("WARM_PYTHON"):
        yield path
        return
    with warm(sys.executable, ("preloaded",)) as python:
        yield python


VLLM = (
    "vllm_quiet",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)


@pytest.fixture(scope="session")
def vllm_python(root: Path) -> Iterator[str]:
    """A stand-in for the Python of the environment that has vLLM."""
    python = root / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv-vllm: run `make vllm`")
    with warm(python, ("preloaded", *VLLM)) as stand_in:
        yield stand_in


@pytest.fixture(scope="session")
def vllm_server(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one real vLLM server with the shipped policy, started as `engine.launch` does, for all tests that need one."""
    import vllm_world

    from aipo_graph.engines.launch import serving

    config = vllm_world.settings(
        policy={"lora_rank": vllm_world.RANK}, engine={"max_context": vllm_world.CONTEXT, "max_batch": 64}, rollout={"max_tokens": 64}
    )
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    with serving(config, vllm_world.OPERATORS, log, python=vllm_python) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The machine's Chromium, headless. Not for a module with asynchronous tests: Playwright's loop runs as long as the browser."""
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")  # the first takes a third of the others' time
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        line = "no Chromium: run `make browser`"
        pytest.fail(line) if os.environ.get("CI_BROWSER") == "1" else pytest.skip(line)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0)
        yield browser
        browser.close()


def _trained(folder: Path, name: str, **settings: object) -> Path:
    small = {
        "train.steps": 4, "rollout.problems": 4, "rollout.traces": 4, "run.trace_groups": 4,
        "evaluate.problems": 2, "evaluate.problems_with_agents": 2, "evaluate.samples": 1, "engine.workers": 1,
    }  # fmt: skip
    words = [word for key, value in {**small, "run.name": name, **settings}.items() for word in (f"--{key}", str(value))]
    done = run_module("aipo_graph.train", words, folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / name


@pytest.fixture(scope="session")
def viewed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the quick start by the real trainer: 4 steps of 4 problems with 4 traces each. Not to be changed."""
    return _trained(tmp_path_factory.mktemp("viewed"), "quickstart")


@pytest.fixture(scope="session")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another such run, of 3 steps, which does not train on agent tokens."""
    return _trained(tmp_path_factory.mktemp("other"), "mask", **{"train.steps": 3, "loss.agent": "mask"})
