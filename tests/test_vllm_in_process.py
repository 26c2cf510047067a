"""vLLM inside the process, in a process of its own with the Python that has vLLM."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm_world import OPERATORS, PROMPT, RANK, ROOT, adapted, base, exact, gap, perturbed, settings

from aipo_graph.engines.vllm import VllmEngine
from aipo_graph.errors import ConfigError

CLOSE = 1e-3


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    torch.set_num_threads(1)
    return {0: perturbed(5), RANK: adapted(1)}


@pytest.fixture(scope="module")
def found(vllm_python: str, models: dict[int, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("in_process")
    save_file({name: tensor.detach() for name, tensor in models[0].named_parameters()}, folder / "rank0.safetensors")
    save_file(dict(models[RANK][1]), folder / f"rank{RANK}.safetensors")
    command = [vllm_python, str(ROOT / "tests" / "vllm_in_process.py"), str(folder), OPERATORS, *map(str, PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("rank", [0, RANK])
def test_ids_and_logprobs_are_those_of_the_weights_in_use(found: dict[str, Any], models: dict[int, Any], rank: int) -> None:
    got = found[str(rank)]
    assert (got["takes"], got["in_flight"]) == ("adapter" if rank else "weights", False)
    assert got["eos_ids"] == [base().config.eos_token_id]
    for version, model in enumerate((base(), models[rank][0] if rank else models[0])):
        one, two, again = got[f"version{version}"]["completions"]
        assert one == again != two
        for ids, logprobs, _, number, updates in (one, two):
            assert gap(logprobs, exact(model, [*PROMPT, *ids], 2.0)[len(PROMPT) - 1 :]) < CLOSE
            assert (number, updates) == (version, [])
        assert gap(got[f"version{version}"]["logprobs"], exact(model, [*PROMPT, *PROMPT])) < CLOSE
    assert gap(got["version0"]["logprobs"], got["version1"]["logprobs"]) > 0.1
    assert got["stopped"] == [got["version1"]["completions"][0][0][:2], "stop"]
    assert "while 1 requests" in got["while_sampling"]
    assert "own tokenizer" in got["foreign"]


@pytest.mark.slow
@pytest.mark.vllm
def test_an_evaluation_samples_in_its_own_process(vllm_python: str, tmp_path: Path) -> None:
    """vLLM has processes of its own, which not every process may start."""
    sizes = ["--problems", "2", "--evaluate.problems_with_agents", "2", "--samples", "1", "--alone-only", "--out", str(tmp_path / "out")]
    engine = ["--engine.kind", "vllm", "--engine.max_context", "384", "--engine.max_batch", "16", "--run.device", "cpu"]
    command = [vllm_python, "-m", "aipo_graph.evaluate", "operators", *sizes, *engine]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["alone"]["failed"] == {}


async def test_without_vllm_the_remedy_is_named() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'vllm==0.32\.\*'"):
        await VllmEngine.open(settings(), OPERATORS)
