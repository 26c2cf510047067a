"""Run by test_vllm_in_process.py with the Python that has vLLM: `FOLDER` holds the weights to load, `found.json` gets what was sampled."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from aipo_graph.config import Config
from aipo_graph.engines import open_engine
from aipo_graph.errors import EngineError

RUN: dict[str, Any] = {"run": {"device": "cpu"}, "rollout": {"max_tokens": 64}}


async def sample(folder: Path, model: str, prompt: list[int], rank: int) -> dict[str, Any]:
    """Before and after a load: completions, and logprobs of one text."""
    engine_settings = {"kind": "vllm", "max_context": 384, "max_batch": 16}
    config = Config.model_validate(RUN | {"engine": engine_settings, "policy": {"lora_rank": rank}})
    engine = await open_engine(config, model)
    found: dict[str, Any] = {"takes": engine.takes, "in_flight": engine.in_flight, "eos_ids": sorted(engine.eos_ids)}
    for version in (0, 1):
        if version:
            await engine.sleep()
            await engine.load_weights(load_file(folder / f"rank{rank}.safetensors").items(), version)
        crowd = await asyncio.gather(*(engine.generate(prompt, seed=seed, max_tokens=20, temperature=2.0) for seed in (1, 2, 1)))
        found[f"version{version}"] = {
            "completions": [(c.token_ids, c.logprobs, c.stop, c.version, c.updates) for c in crowd],
            "logprobs": await engine.logprobs(prompt + prompt),
        }
    stopped = await engine.generate(prompt, seed=1, max_tokens=20, stop=((crowd[0].token_ids[1],),), temperature=2.0)
    found["stopped"] = (stopped.token_ids, stopped.stop)
    waiting = asyncio.create_task(engine.generate(prompt, seed=1, max_tokens=300, temperature=2.0))
    await asyncio.sleep(0)
    try:
        await engine.load_weights([], 2)
    except EngineError as error:
        found["while_sampling"] = str(error)
    await waiting
    try:
        await engine.generate([9999], seed=0, max_tokens=2)
    except EngineError as error:
        found["foreign"] = str(error)
    await engine.close()
    return found


def main(folder: Path, model: str, *prompt: str) -> None:
    ids = [int(token) for token in prompt]
    found = {rank: asyncio.run(sample(folder, model, ids, rank)) for rank in (0, 8)}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
