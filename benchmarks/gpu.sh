#!/usr/bin/env bash
# Everything that needs one GPU, in under 8 minutes: benchmarks/gpu.sh [FOLDER]; results in FOLDER/gpu.json (default runs/gpu-DATE).
#   quick start   training on CUDA with the embedded engine, both evaluations
#   learner       a step of a Qwen3-1.7B-shaped model with random weights: tokens/s, peak memory, MFU
#   vllm          three steps with vLLM in the same process, weights by IPC: seconds to publish, gap of the probe; where vLLM is installed
# A part that fails or runs out of time is a line in the results; the others run. PYTHON chooses the interpreter, which for vLLM is
# .venv-vllm/bin/python. DRY=1 runs the same on a CPU with tiny sizes: no figure of it means anything.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python} dry=${DRY:-0} folder=${1:-runs/gpu-$(date +%F)}
device=cuda shape=Qwen3-1.7B sizes=()
if [ "$dry" = 1 ]; then
    device=cpu shape=--tiny
    sizes=(--train.steps 2 --rollout.problems 4 --rollout.traces 4 --evaluate.problems 0)
fi
rm -rf "$folder" && mkdir -p "$folder" || exit 2

part() { # NAME SECONDS COMMAND...: its output in NAME.log, how it ended in NAME.end
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout --kill-after 10 "$limit" "$@" >"$folder/$name.log" 2>"$folder/$name.errors"
    echo "$? $((SECONDS - started))" >"$folder/$name.end"
    echo "$name: ended with $(cut -d' ' -f1 "$folder/$name.end") after $((SECONDS - started)) s"
}

train=("$python" -m aipo_graph.train --run.device "$device" --run.dir "$folder")
part quickstart 180 "${train[@]}" --run.name quickstart "${sizes[@]}"
part learner 150 "$python" benchmarks/learner_memory.py "$shape"
if "$python" -c "import vllm" 2>/dev/null && [ "$dry" != 1 ]; then
    part vllm 110 "${train[@]}" --run.name vllm --engine.kind vllm --train.steps 3 --evaluate.problems 0
fi

"$python" - "$folder" <<'END'
import json
import platform
import sys
from datetime import date
from pathlib import Path

import torch

folder = Path(sys.argv[1])


def rows(name: str) -> list[dict]:
    path = folder / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


found = {}
for path in sorted(folder.glob("*.end")):
    code, seconds = map(int, path.read_text().split())
    found[path.stem] = {"exit_code": code, "seconds": seconds}
    if code:
        found[path.stem]["error"] = (folder / f"{path.stem}.errors").read_text().strip()[-300:]
if (summary := folder / "quickstart" / "summary.json").exists():
    found["quickstart"]["summary"] = json.loads(summary.read_text())
if "learner" in found and not found["learner"]["exit_code"]:
    found["learner"]["report"] = json.loads((folder / "learner.log").read_text())
if steps := rows("vllm"):
    keys = ("seconds/publish", "seconds/sample", "seconds/learn", "sync_gap", "sync_gap_max", "tokens_per_second")
    found["vllm"]["steps"] = [{key: step.get(key) for key in keys} for step in steps]
device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"no GPU, {platform.machine()}"
report = {"date": date.today().isoformat(), "device": device, "torch": torch.__version__, "parts": found}
(folder / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
sys.exit(any(part["exit_code"] for part in found.values()))
END
status=$?
echo "$folder/gpu.json"
exit $status
