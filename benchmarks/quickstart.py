"""The quick start beside its baselines: `python benchmarks/quickstart.py [--seeds 0 1 2] [--baseline-seeds 0 1] [--only aipo mask grpo]`.

Each run is `python -m aipo_graph.train configs/quickstart.yaml` with another seed or loss, one after the other, resumable. `grpo` is plain
GRPO: agents off, every trace alone. The baselines stop at as many sampled tokens as the AIPO run of their seed (`train.tokens`). Writes
docs/results/quickstart.json, docs/results/quickstart.md and docs/img/quickstart.png.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import torch

from aipo_graph import cli
from aipo_graph.log import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    "aipo": ("AIPO", []),
    "mask": ("agent tokens masked", ["--loss.agent", "mask"]),
    "grpo": ("GRPO without agents", ["--rollout.with_agents", "0"]),
}
FIGURES = [
    ("alone", "pass@1"),
    ("alone", "pass@64"),
    ("alone", "greedy"),
    ("with_agents", "pass@1"),
    ("easy", "pass@1"),
]
RUNS, DOCS = Path("runs"), Path("docs")
Summary = dict[str, Any]


def train(method: str, seed: int, tokens: float) -> Summary:
    """One run's summary, trained or gone on with if need be. ``tokens``: the budget, 0 for none."""
    name = f"quickstart-{method}-{seed}"
    summary = RUNS / name / "summary.json"
    if not summary.exists():
        evaluated = RUNS / f"quickstart-aipo-{seed}" / "evaluation" / "base"
        if method != "aipo" and not (RUNS / name).exists():
            shutil.copytree(evaluated, RUNS / name / "evaluation" / "base")  # the same samples: no need to draw them again
        command = [sys.executable, "-m", "aipo_graph.train", "configs/quickstart.yaml", "--run.name", name, "--run.seed", str(seed)]
        budget = ["--train.tokens", str(int(tokens)), "--train.patience", "1000"] if tokens else []
        subprocess.run([*command, *METHODS[method][1], *budget], check=True)
    values: Summary = json.loads(summary.read_text())
    for policy in ("base", "trained"):
        for place in ("model", "protocol"):  # where it lay on this machine
            values[policy].pop(place, None)
    return values


def figure(evaluation: Summary, place: str, name: str) -> float:
    part = evaluation["kinds"]["easy"]["alone"] if place == "easy" else evaluation[place]
    return float(part[name])


def table(results: dict[str, dict[int, Summary]]) -> str:
    """A row per method: the mean over seeds and each seed's figure. The base policy is one, sampled with each seed."""
    heads = [f"{place.replace('_', ' ')} {name}" for place, name in FIGURES]
    lines = ["| | " + " | ".join(heads) + " | sampled tokens | seconds |", "| --- |" + " ---: |" * (len(heads) + 2)]
    first = next(iter(results.values()))
    lines.append(f"| base | {_cells([run['base'] for run in first.values()])} | | |")
    for method, runs in results.items():
        tokens = statistics.mean(run["train_tokens"]["policy"] for run in runs.values()) / 1e6
        seconds = statistics.mean(run["wall_seconds"] for run in runs.values())
        lines.append(f"| {METHODS[method][0]} | {_cells([run['trained'] for run in runs.values()])} | {tokens:.2f} M | {seconds:.0f} |")
    return "\n".join(lines)


def _cells(evaluations: list[Summary]) -> str:
    cells = []
    for place, name in FIGURES:
        values = [figure(evaluation, place, name) for evaluation in evaluations]
        cells.append(f"**{statistics.mean(values):.3f}** ({' '.join(f'{value:.3f}' for value in values)})")
    return " | ".join(cells)


def picture(results: dict[str, dict[int, Summary]], path: Path) -> None:
    """Left: reward of hard training problems alone, over sampled tokens, mean and range of seeds. Right: pass@k on held-out problems."""
    figure_, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for method, runs in results.items():
        curves = [read_metrics(RUNS / f"quickstart-{method}-{seed}" / "metrics.jsonl") for seed in runs]
        length = min(map(len, curves))
        rewards = [[row.get("reward/alone/hard") or 0.0 for row in curve[:length]] for curve in curves]
        tokens = [sum(row["tokens/policy"] for row in curves[0][: step + 1]) / 1e6 for step in range(length)]
        low, high = [min(values) for values in zip(*rewards, strict=True)], [max(values) for values in zip(*rewards, strict=True)]
        (line,) = left.plot(tokens, [statistics.mean(values) for values in zip(*rewards, strict=True)], label=METHODS[method][0])
        left.fill_between(tokens, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        ks = [1, 4, 16, 64]
        passes = [[figure(run["trained"], "alone", f"pass@{k}") for run in runs.values()] for k in ks]
        right.plot(ks, [statistics.mean(values) for values in passes], "o-", color=line.get_color(), label=METHODS[method][0])
    base = next(iter(next(iter(results.values())).values()))["base"]
    right.plot(ks, [figure(base, "alone", f"pass@{k}") for k in ks], "s--", color="0.5", label="base")
    left.set(xlabel="sampled policy tokens, millions", ylabel="reward alone, hard", title="training", ylim=(-0.02, 1.02))
    right.set(xlabel="k", ylabel="pass@k alone", title="held-out hard problems, no helpers", xscale="log", ylim=(-0.02, 1.02))
    right.set_xticks(ks, [str(k) for k in ks])
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, dpi=130)
    plt.close(figure_)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--baseline-seeds", type=int, nargs="+", help="seeds of the baselines (default: those of --seeds)")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args(argv)
    aipo = {seed: train("aipo", seed, tokens=0) for seed in options.seeds}
    results = {
        method: aipo
        if method == "aipo"
        else {s: train(method, s, aipo[s]["train_tokens"]["policy"]) for s in options.baseline_seeds or options.seeds}
        for method in options.only
    }
    hardware = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    command = " ".join(["python benchmarks/quickstart.py", *argv])
    report = {"date": date.today().isoformat(), "hardware": hardware, "command": command, "results": results}
    (DOCS / "results").mkdir(parents=True, exist_ok=True)
    (DOCS / "results" / "quickstart.json").write_text(json.dumps(report, indent=1) + "\n")
    (DOCS / "results" / "quickstart.md").write_text(table(results) + "\n")
    picture(results, DOCS / "img" / "quickstart.png")
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.main(main))
