"""`python -m aipo_graph.train` as a user runs it: in a process of its own, on the shipped policy, with few and small steps."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from started import Started, run_module

import aipo_graph
from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.errors import EngineError
from aipo_graph.load import data
from aipo_graph.log import read_metrics

TINY: dict[str, int] = {
    "run.checkpoint_every": 2,
    "run.trace_groups": 4,
    "rollout.problems": 4,
    "rollout.traces": 4,
    "train.steps": 5,
    "train.patience": 100,
    "evaluate.problems": 0,
    "engine.workers": 1,
}
EVALUATED = {"evaluate__problems": 2, "evaluate__problems_with_agents": 2, "evaluate__samples": 1}


def words_of(**settings: Any) -> list[str]:
    words = []
    for key, value in {**TINY, **{key.replace("__", "."): value for key, value in settings.items()}}.items():
        words += [f"--{key}", str(value)]
    return words


def run(folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    return run_module("aipo_graph.train", words_of(**settings), folder)


def start(folder: Path, **settings: Any) -> Started:
    return Started("aipo_graph.train", words_of(**settings), folder)


def bits(folder: Path) -> dict[str, str]:
    """Digests of all that two equal runs must share: weights, optimizer, RNG and counters of the last checkpoint, traces, policy."""
    last = max((folder / "checkpoints").glob("step-*"), key=lambda path: path.name)
    files = [*sorted(last.iterdir()), folder / "policy" / "model.safetensors", folder / "traces.jsonl"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The metrics without those that a clock makes."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith("seconds") and k != "tokens_per_second"} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(folder, **EVALUATED)
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout)
    return folder / "runs" / "quickstart"


def test_a_reader_of_the_output_knows_which_policy_is_evaluated(undisturbed: Path) -> None:
    said = (undisturbed.parents[1] / "said").read_text()
    assert 0 < said.index("base policy: evaluated ") < said.index("trained policy: evaluated ")


def test_a_run_leaves_all_that_it_promises(undisturbed: Path) -> None:
    written = {path.name for path in undisturbed.iterdir()}
    assert {
        "config.yaml", "metrics.jsonl", "traces.jsonl", "tensorboard", "checkpoints", "policy", "summary.json",
    } <= written  # fmt: skip
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["wall_seconds"] > 0
    assert summary["train_tokens"]["policy"] > 0
    for policy in ("base", "trained"):
        for mode in ("alone", "with_agents"):
            assert 0 <= summary[policy][mode]["pass@1"] <= 1
            assert 0 <= summary[policy][mode]["greedy"] <= 1


def test_sampler_and_learner_agree_on_every_policy_token(undisturbed: Path) -> None:
    rows = read_metrics(undisturbed / "metrics.jsonl")
    seen = [row["mismatch_max"] for row in rows if row["trainable_tokens"]]
    assert seen
    assert max(seen) <= 1e-4


def test_two_runs_of_one_config_are_equal_bit_for_bit(undisturbed: Path, tmp_path: Path) -> None:
    """The second by the command itself; all others are forked (started.py)."""
    command = [sys.executable, "-m", "aipo_graph.train", *words_of()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    again = tmp_path / "runs" / "quickstart"
    assert bits(again) == bits(undisturbed)
    assert timeless(again) == timeless(undisturbed)
    assert set(json.loads((again / "summary.json").read_text())) == {"wall_seconds", "steps", "train_tokens"}  # TINY evaluates nothing


def test_a_finished_run_can_be_extended_and_is_evaluated_anew(undisturbed: Path, tmp_path: Path) -> None:
    """With other limits, too. It is the undisturbed run up to there, and what was found of the earlier policy is kept beside."""
    folder = tmp_path / "runs" / "quickstart"
    shutil.copytree(undisturbed, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[0]["seconds/publish"] = 1000.0  # of some large policy
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(tmp_path, train__steps=6, train__micro_batch_tokens=2048, **EVALUATED | {"evaluate__samples": 2})
    assert done.returncode == 0, done.stderr
    assert {line for line in done.stdout.splitlines() if line.startswith("note: ")} == {
        "note: train.steps = 6 from here on, 5 before",
        "note: the learning rate's cosine ends at step 6 now: from here on it is another one",
        "note: train.micro_batch_tokens = 2048 from here on, 4096 before",
        "note: evaluate.samples = 2 from here on, 1 before",
        "note: goes on after step 5",
    }
    assert timeless(folder)[:5] == timeless(undisturbed)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == len(timeless(folder)) == 6
    assert summary["wall_seconds"] > 1000
    assert json.loads((folder / "changes.jsonl").read_text())["step"] == 5
    for part in ("base", "trained"):
        assert len(list((folder / "evaluation" / part).glob("samples*.jsonl"))) == 2
    digests = [hashlib.sha256((path / "policy" / "model.safetensors").read_bytes()).digest() for path in (folder, undisturbed)]
    assert digests[0] != digests[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"rollout__max_lag": 1}, {"rollout__redraws": 2}, {"rollout__max_lag": 1, "engine__workers": 2}],
    ids=["plain", "lag", "redraws", "workers"],
)
def test_a_run_killed_at_random_moments_ends_in_the_same_bits(undisturbed: Path, tmp_path: Path, settings: dict[str, int]) -> None:
    expected = undisturbed
    if settings:
        assert run(tmp_path / "..", run__dir=str(tmp_path / "whole"), **settings).returncode == 0
        expected = tmp_path / "whole" / "quickstart"
    if "rollout__redraws" in settings:  # the cursor cannot be told from the step
        last = max((expected / "checkpoints").glob("step-*"), key=lambda path: path.name)
        assert json.loads((last / "state.json").read_text())["cursor"]["drawn"] > TINY["train.steps"] * TINY["rollout.problems"]
    rng, folder = random.Random(str(settings)), tmp_path / "runs" / "quickstart"
    for _ in range(2 if settings else 3):
        process = start(tmp_path, **settings)
        began = len(read_metrics(folder / "metrics.jsonl"))
        while len(read_metrics(folder / "metrics.jsonl")) <= began and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert run(tmp_path, **settings).returncode == 0
    assert bits(folder) == bits(expected)
    assert timeless(folder) == timeless(expected)


def sampled(folder: Path) -> list[Any]:
    """The tokens of each trace that was kept, by step."""
    rows = map(json.loads, (folder / "traces.jsonl").read_text().splitlines())
    return [(row["step"], [[segment["token_ids"] for segment in trace["segments"]] for trace in row["group"]["traces"]]) for row in rows]


def test_workers_beside_sample_what_one_process_does(undisturbed: Path, tmp_path: Path) -> None:
    """Weights that come to them late, or not, would show in the second step's tokens."""
    done = run(tmp_path, engine__workers=3)
    assert done.returncode == 0, done.stderr
    assert sampled(tmp_path / "runs" / "quickstart") == sampled(undisturbed)
    mismatches = [row["mismatch_max"] for row in timeless(tmp_path / "runs" / "quickstart") if row["trainable_tokens"]]
    assert max(mismatches) <= 1e-4


def test_a_worker_that_is_killed_ends_the_run_with_one_line_and_it_goes_on(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = cli.parse(["configs/quickstart.yaml", *words_of(engine__workers=2)], Config, prog="train", doc="")

    def kill(step: int, metrics: Mapping[str, float]) -> None:
        if step == 3:
            multiprocessing.active_children()[0].kill()

    with pytest.raises(EngineError, match=r"^a worker ended with exit code -9 \(out of memory\?\); run the same command to go on$"):
        aipo_graph.train(config=config, on_step=kill)
    assert not multiprocessing.active_children()
    aipo_graph.train(config=config)
    assert sampled(tmp_path / "runs" / "quickstart") == sampled(undisturbed)


def test_a_stopped_run_saves_and_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    process.wait_for("\nstep 1/")
    assert process.end() == 0
    assert "note: stops once the step under way is done and saved" in process.out.read_text()
    assert "the same command goes on" in process.out.read_text()
    assert run(tmp_path).returncode == 0
    assert bits(tmp_path / "runs" / "quickstart") == bits(undisturbed)


def _without_tokenizer(folder: Path) -> dict[str, Any]:
    shutil.copytree(data("operators"), folder / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    return {"policy__model": "model"}


def _short_context(folder: Path) -> dict[str, Any]:
    shutil.copytree(data("operators"), folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    return {"policy__model": "model"}


def _malformed_data(folder: Path) -> dict[str, Any]:
    (folder / "mine.jsonl").write_text('{"question": "1+1?", "answer": "2 #### 2"}\n{"question": 3\n')
    return {"task__name": "word_problems", "task__data": "mine.jsonl"}


def _empty_data(folder: Path) -> dict[str, Any]:
    (folder / "mine.jsonl").write_text("")
    return {"task__name": "word_problems", "task__data": "mine.jsonl"}


def _broken_graph(folder: Path) -> dict[str, Any]:
    (folder / "mine.py").write_text("import no_such_module\n")
    return {"rollout__graph": "mine.py:build"}


def _editing_graph(folder: Path) -> dict[str, Any]:
    (folder / "mine.py").write_text(
        "from dataclasses import replace\n"
        "from langgraph.graph import END, START, StateGraph\n"
        "from aipo_graph.rollout import Context, State, append, policy_node\n"
        "def build():\n"
        "    sample = policy_node()\n"
        "    async def shortened(state, runtime):\n"
        "        *before, last = (await sample(state, runtime))['segments']\n"
        "        return append(*before, replace(last, token_ids=last.token_ids[:-1], logprobs=last.logprobs[:-1]))\n"
        "    graph = StateGraph(State, context_schema=Context)\n"
        "    graph.add_node('policy', shortened)\n"
        "    graph.add_edge(START, 'policy')\n"
        "    graph.add_edge('policy', END)\n"
        "    return graph\n"
    )
    return {"rollout__graph": "mine.py:build"}


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: {"policy__model": "nowhere/at/all"}, "nowhere"),
        (_without_tokenizer, "tokenizer"),
        (_short_context, "context"),
        (_malformed_data, "mine.jsonl:2"),
        (_empty_data, "mine.jsonl"),
        (_broken_graph, "no_such_module"),
        (_editing_graph, "not what the engine sampled"),
        (lambda folder: {"train__stepz": 3}, "train.steps"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, prepare: Any, said: str) -> None:
    done = run(tmp_path, **prepare(tmp_path))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in done.stderr


def test_a_second_run_in_the_same_folder_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    first = start(tmp_path, train__steps=1000)
    first.wait_for("\n")
    second = run(tmp_path, train__steps=1000)
    assert second.returncode == 2
    assert "is in use by" in second.stderr
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()


def test_helpers_that_never_answer_end_the_run(tmp_path: Path) -> None:
    """With half of the traces alone, not more than half fail: the share alone would let the run go on for ever without help."""
    (tmp_path / "broken.py").write_text(
        "from aipo_graph.rollout import Agent\n"
        "async def refuse(query: str) -> str:\n    raise PermissionError('no key')\n"
        + "".join(f"def {name}(config):\n    return Agent({name!r}, tools=(refuse,))\n" for name in ("verify", "knowledge", "reasoning"))
    )
    use = json.dumps({name: f"broken.py:{name}" for name in ("verify", "knowledge", "reasoning")})
    done = run(tmp_path, agents__use=use, train__patience=2)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "8 of 16 traces failed, every one with agents for 2 steps in a row (train.patience); the first: AgentError: agent" in last
    assert "PermissionError: no key" in last
    lost = [json.loads(line) for line in (tmp_path / "runs" / "quickstart" / "excluded.jsonl").read_text().splitlines()]
    assert [(line["step"], line["lost"], line["of"], line["reasons"]) for line in lost] == [
        (step, 2, 4, {"failed/AgentError": 2}) for step in (1, 2) for _ in range(4)
    ]
    assert done.stdout.count("lost 8 traces of 4 problems as failed/AgentError") == 1


class Closed(BaseHTTPRequestHandler):
    """A provider that knows no model."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(404)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"error": {"message": "The model `helper` does not exist", "code": "model_not_found"}}')

    def log_message(self, *_: object) -> None: ...


def test_a_wrong_model_name_ends_the_run_at_the_first_consult(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Closed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = {"OPENAI_API_KEY": "none", "OPENAI_API_BASE": f"http://127.0.0.1:{server.server_port}/v1", "NO_PROXY": "127.0.0.1"}
        use = json.dumps({**Config().agents.use, "knowledge": ""})
        words = words_of(agents__use=use, agents__models='{"knowledge": "openai:helper"}')
        done = run_module("aipo_graph.train", words, tmp_path, address)
        server.shutdown()
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: agent 'knowledge': ")
    assert "the provider has no such model or address: correct agents.models.knowledge" in last
    assert read_metrics(tmp_path / "runs" / "quickstart" / "metrics.jsonl") == []


def test_ctrl_c_while_libraries_are_imported_ends_the_command_without_a_word(tmp_path: Path) -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", "aipo_graph.train"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs the tests may ignore it
    )
    while "libtorch" not in Path(f"/proc/{command.pid}/maps").read_text():
        assert command.poll() is None
        time.sleep(0.01)
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=100)
    assert (command.returncode, said) == (-signal.SIGINT, "")
    assert not (tmp_path / "runs").exists()
