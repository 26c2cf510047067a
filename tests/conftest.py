"""One torch thread per process, set before anything imports torch: more are slower beside other load."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def vllm_python(root: Path) -> str:
    """The Python of the environment that has vLLM."""
    python = root / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv-vllm: run `make vllm`")
    return str(python)


@pytest.fixture(scope="session")
def vllm_server(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one real vLLM server with the shipped policy, started as `engine.launch` does, for all tests that need one."""
    import vllm_world

    from aipo_graph.engines.launch import launch

    config = vllm_world.settings(
        policy={"lora_rank": vllm_world.RANK}, engine={"max_context": vllm_world.CONTEXT, "max_batch": 64}, rollout={"max_tokens": 64}
    )
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    server = asyncio.run(launch(config, vllm_world.OPERATORS, log, python=vllm_python))
    yield server.url
    asyncio.run(server.stop())
