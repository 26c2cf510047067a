"""The quick start through vLLM, beside the embedded engine: `python benchmarks/quickstart_vllm.py [--seeds 0] [--only local server …]`.

Each run is `python -m aipo_graph.train configs/quickstart.yaml` with another engine, adapter or helper, one after the other, resumable:
`local` and `server` train all weights, `local_lora` and `server_lora` adapters. In `lm_helper` a small language model that vLLM serves
(`python -m examples.operators.pretrain --expert`) replaces the rule book; its recorded logprobs are the mu of its tokens. Needs a Python
with vLLM (`make vllm` makes .venv-vllm). Writes docs/results/vllm.json and docs/results/vllm.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from aipo_graph import cli
from aipo_graph.config import Agents, Config
from aipo_graph.engines.launch import serving
from aipo_graph.log import read_metrics

RUNS, DOCS = Path("runs"), Path("docs/results")
EXPERT = RUNS / "operators_expert"
EVALUATION = ["--evaluate.problems", "128", "--evaluate.problems_with_agents", "32", "--evaluate.samples", "16"]
SERVER = ["--engine.kind", "server", "--engine.launch", "true", "--engine.max_batch", "256"]
LORA = ["--policy.lora_rank", "16", "--optimizer.lr", "4e-3"]
METHODS = {
    "local": ("embedded engine", []),
    "server": ("vLLM server", SERVER),
    "local_lora": ("embedded engine, LoRA", LORA),
    "server_lora": ("vLLM server, LoRA", [*SERVER, *LORA]),
    "lm_helper": ("embedded engine, Knowledge is a language model", []),
}
COLUMNS = {
    "alone pass@1": lambda run: run["trained"]["alone"]["pass@1"],
    "alone greedy": lambda run: run["trained"]["alone"]["greedy"],
    "with agents pass@1": lambda run: run["trained"]["with_agents"]["pass@1"],
    "largest gap after a sync": lambda run: run["series"].get("sync_gap_max"),
    "largest ratio": lambda run: run["series"]["mismatch_ratio_max"],
    "mismatch KL": lambda run: run["series"]["mismatch_kl"],
    "rho of Knowledge": lambda run: run["series"].get("agent_ratio_mean/knowledge"),
    "sampled tokens": lambda run: run["train_tokens"]["policy"],
    "seconds per step": lambda run: run["series"]["seconds"],
}
Summary = dict[str, Any]


def train(method: str, seed: int, python: str) -> Summary:
    """One run's summary, with the largest or mean value over its steps of what the engine has to answer for."""
    name = f"vllm-{method}-{seed}"
    folder = RUNS / name
    if not (folder / "summary.json").exists():
        command = [python, "-m", "aipo_graph.train", "configs/quickstart.yaml", "--run.name", name, "--run.seed", str(seed)]
        with ExitStack() as stack:
            extra = [*METHODS[method][1], *EVALUATION]
            if method == "lm_helper":
                extra += ["--agents.models", json.dumps({"knowledge": f"vllm:{stack.enter_context(expert_server(python))}"})]
                extra += ["--agents.use", json.dumps(Agents().use | {"knowledge": ""}), "--agents.temperature", "1"]
            subprocess.run([*command, *extra], check=True)
    values: Summary = json.loads((folder / "summary.json").read_text())
    for policy in ("base", "trained"):
        for place in ("model", "protocol"):  # where it lay on this machine
            values[policy].pop(place, None)
    rows = read_metrics(folder / "metrics.jsonl")
    found = {name: [row[name] for row in rows if row.get(name) is not None] for name in rows[-1]}
    values["series"] = {name: max(found[name]) for name in ("sync_gap_max", "mismatch_ratio_max") if found.get(name)}
    values["series"] |= {name: statistics.mean(found[name]) for name in ("mismatch_kl", "agent_ratio_mean/knowledge") if found.get(name)}
    values["series"]["seconds"] = statistics.mean(sum(row[f"seconds/{part}"] for part in ("sample", "learn", "publish")) for row in rows)
    return values


@contextmanager
def expert_server(python: str) -> Iterator[str]:
    """The URL of a vLLM server of the expert, for as long as the context lasts."""
    if not EXPERT.exists():
        subprocess.run([python, "-m", "examples.operators.pretrain", "--expert", "--out", str(EXPERT)], check=True)
    config = Config.model_validate({"engine": {"kind": "server", "launch": True}})
    with serving(config, str(EXPERT), RUNS / "operators_expert.log", python=python) as url:
        yield url


def table(results: dict[str, dict[int, Summary]]) -> str:
    """A row per method: the mean over seeds, and each seed's figure where there are several."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for method, runs in results.items():
        cells = []
        for read in COLUMNS.values():
            values = [value for value in map(read, runs.values()) if value is not None]
            each = f" ({' '.join(_number(value) for value in values)})" if len(values) > 1 else ""
            cells.append(f"{_number(statistics.mean(values))}{each}" if values else "–")
        lines.append(f"| {METHODS[method][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e5 else f"{value:.1e}" if 0 < abs(value) < 5e-3 else f"{value:.3f}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="a Python with aipo_graph and vLLM (default: %(default)s)")
    options = parser.parse_args(argv)
    results = {method: {seed: train(method, seed, options.python) for seed in options.seeds} for method in options.only}
    hardware = f"{os.cpu_count()} cores, {platform.machine()}"
    command = " ".join(["python benchmarks/quickstart_vllm.py", *argv])
    report = {"date": date.today().isoformat(), "hardware": hardware, "command": command, "results": results}
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "vllm.json").write_text(json.dumps(report, indent=1) + "\n")
    (DOCS / "vllm.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.main(main))
