"""`from aipo_graph import train, evaluate, view`: objects as well as paths, in scripts, threads, running loops and a notebook's kernel."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import yaml
from langchain.agents import create_agent
from langgraph.graph import START, MessagesState, StateGraph
from langsmith.utils import get_env_var, tracing_is_enabled
from nbclient import NotebookClient
from rollout_world import save_tiny
from test_chat_graph import tokenizer
from test_messages import QWEN

from aipo_graph import Agent, Config, PolicyChatModel, Run, evaluate, loops, train, view
from aipo_graph.errors import AipoError, ConfigError, GraphError, TrainError
from aipo_graph.log import read_traces
from aipo_graph.rollout import Context, State

ROWS = [{"question": f"{a}*{b}?", "answer": str(a * b)} for a in range(2, 9) for b in range(2, 9)]
SMALL: dict[str, dict[str, Any]] = {
    "run": {"device": "cpu", "trackers": ()},
    "rollout": {"problems": 2, "traces": 4, "max_tokens": 32},
    "evaluate": {"problems": 1, "problems_with_agents": 1, "samples": 1},
}
BARE = SMALL | {"evaluate": {"problems": 0}}


def calculator(expression: str) -> str:
    """Works out a product."""
    return "42"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random policy with a chat template."""
    return save_tiny(tmp_path_factory.mktemp("policy"), tokenizer(QWEN))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def odd(reply: str) -> float:
    return len(reply) % 2


def trained(policy: str, config: Mapping[str, Any] = BARE, **given: Any) -> Run:
    graph = create_agent(PolicyChatModel(), tools=[calculator])
    return train(policy, config, **{"graph": graph, "data": ROWS, "reward": odd, "steps": 1, "name": "mine", **given})


def test_objects_train_and_are_evaluated_in_this_process(
    policy: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, str, str]] = []

    def reward(question: str, answer: str, reply: str) -> float:
        seen.append((threading.current_thread().name, question, answer))
        return odd(reply)

    run = trained(policy, SMALL, reward=reward, steps=2, data=[*ROWS, {"question": "", "answer": "1"}])
    assert sum("rows left out" in record.message for record in caplog.records) == 1, "said once"
    assert {(question, answer) for _, question, answer in seen} <= {(row["question"], row["answer"]) for row in ROWS}
    said = capsys.readouterr().out
    assert max(map(len, said[said.index("held-out problems, 95 %") : said.index("with agents, the trained")].splitlines())) <= 80
    assert "the trained policy is not shown to differ from the base: pass@1" in said
    assert said.rstrip().endswith("look at it: python -m aipo_graph.view runs/mine")
    assert run.finished
    assert run.summary["steps"] == len(run.metrics) == 2
    assert set(run.summary["trained"]) >= {"with_agents", "kinds"} - {"alone"}, "alone it is the same graph"
    groups, _ = read_traces(run.dir / "traces.jsonl")
    assert all(trace.with_agents for logged in groups for trace in logged.group.traces)
    assert run.view(open=False).stat().st_size > 100_000
    again = evaluate(run.dir, graph=create_agent(PolicyChatModel(), tools=[]), data=ROWS[:3], reward={"odd": odd}, modes=["alone"])
    assert again["alone"]["problems"] == 1, "as the run's settings say"
    assert (Path(again["folder"]) / "evaluation.json").is_file()
    before = len(seen)
    other = evaluate(run.policy, graph=create_agent(PolicyChatModel(), tools=[calculator]), data=ROWS[:3], reward=reward)
    assert (len(seen) > before, other["with_agents"]["problems"]) == (True, 1), "an earlier call's samples are not taken for this one's"


def test_a_callback_logs_and_stops_and_the_same_call_goes_on(policy: str) -> None:
    seen: list[float] = []

    def first(step: int, metrics: Mapping[str, float]) -> bool:
        seen.append(metrics["reward"])
        return step == 1

    run = trained(policy, steps=3, on_step=first)
    assert (len(seen), run.finished) == (1, False)
    with pytest.raises(ConfigError, match="the run has not ended; the same call goes on"):
        _ = run.summary
    with pytest.raises(ConfigError, match="has no policy yet"):
        _ = run.policy
    assert trained(policy, steps=3).summary["steps"] == 3


def test_a_run_that_cannot_be_saved_says_so_at_its_start(
    policy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    trained(policy, steps=1)
    said = " ".join(capsys.readouterr().out.split())
    assert 0 <= said.find("this run cannot be saved") < said.find("step 1/1")


def test_an_asynchronous_callback_is_awaited_and_what_tracers_had_set_is_as_before(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    for name in ("LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING", "LANGCHAIN_TRACING_V2"):  # other tests' runs in this process have set them
        monkeypatch.delenv(name, raising=False)
    get_env_var.cache_clear()  # type: ignore[attr-defined]
    assert tracing_is_enabled()
    seen: list[tuple[int, str | None]] = []

    async def logs(step: int, metrics: Mapping[str, float]) -> None:
        seen.append((step, os.environ.get("LANGSMITH_TRACING")))

    assert trained(policy, steps=2, on_step=logs).finished
    assert seen == [(1, "false"), (2, "false")]
    assert (os.environ["LANGSMITH_TRACING"], os.environ.get("LANGCHAIN_TRACING_V2"), tracing_is_enabled()) == ("true", None, True)


def test_a_runs_policy_in_another_graph_runs_alone_in_that_one(policy: str) -> None:
    """Which is what the run did, without another solo graph of its own; and no limit of training's is the evaluation's."""
    Path("mine.py").write_text(
        "from langchain.agents import create_agent\nfrom aipo_graph import PolicyChatModel\n\n\n"
        "def build():\n    return create_agent(PolicyChatModel(), tools=[])\n"
    )
    run = trained(policy, graph="mine.py:build")
    text = (run.dir / "config.yaml").read_text().replace("micro_batch_tokens: 4096", "micro_batch_tokens: 16")
    assert "micro_batch_tokens: 16" in text
    (run.dir / "config.yaml").write_text(text)
    asked: list[str] = []

    async def asks(state: MessagesState) -> dict[str, Any]:
        asked.append(str(state["messages"][-1].text))
        return {"messages": [await PolicyChatModel().ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState).add_node(asks).add_edge(START, "asks")
    short = SMALL["evaluate"]
    settings = Config.model_validate(yaml.safe_load(text) | {"evaluate": short})
    values = evaluate(run.dir, settings, graph=graph, data=ROWS[:1], reward=odd, modes=("alone",))
    assert (values["alone"]["problems"], set(asked)) == (1, {"2*2?"})


def test_another_reward_under_the_same_name_is_noticed(policy: str) -> None:
    trained(policy)
    trained(policy, reward=lambda reply: len(reply) % 2, force=True)
    with pytest.raises(ConfigError, match="task.reward has changed"):
        trained(policy, steps=2, reward=lambda reply: len(reply) % 3)
    assert trained(policy, steps=2, reward=lambda reply: len(reply) % 2).summary["steps"] == 2


def test_in_a_thread(policy: str) -> None:
    runs: list[Run] = []
    thread = threading.Thread(target=lambda: runs.append(trained(policy, SMALL)))
    thread.start()
    thread.join()
    assert runs[0].finished


async def test_within_a_running_loop_and_evaluated_otherwise(policy: str) -> None:
    """A finished run, called again with another evaluation, has that one, and trains nothing."""
    first = trained(policy, SMALL)
    spent = first.summary["wall_seconds"]
    again = trained(policy, SMALL | {"evaluate": SMALL["evaluate"] | {"samples": 2}})
    assert (again.summary["trained"]["with_agents"]["samples"], again.summary["wall_seconds"], len(again.metrics)) == (2, spent, 1)
    assert asyncio.get_running_loop().is_running()


async def test_an_interrupt_in_a_notebook_lets_the_step_under_way_end() -> None:
    """There the first one asks the run to stop; without anything to ask, it cancels."""
    asked: list[bool] = []
    main = threading.main_thread().ident
    assert main is not None

    async def step() -> str:
        await asyncio.sleep(0.5)  # until the main thread waits
        signal.pthread_kill(main, signal.SIGINT)
        while not asked:
            await asyncio.sleep(0.01)
        return "saved"

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a notebook's kernel has this one
    try:
        assert loops.run(step(), interrupted=lambda: asked.append(True)) == "saved"
        asked.clear()
        with pytest.raises(KeyboardInterrupt):
            loops.run(step())
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_a_notebook(policy: str, warm_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", warm_python)  # the kernel's
    cells = [
        "from langchain.agents import create_agent\nfrom aipo_graph import train, evaluate, view, Config, Agent, PolicyChatModel",
        f"run = train({policy!r}, {SMALL!r}, graph=create_agent(PolicyChatModel(), tools=[]), data={ROWS!r},\n"
        "            reward=lambda question, answer, reply: float(len(reply) % 2), steps=1)",
        "print(run.summary['steps'], run.policy.is_dir(), run.view(open=False).name)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    done = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "1 True view.html" in "".join(output.get("text", "") for output in done.cells[-1].outputs)


def test_a_plain_script_without_a_guard_samples_in_other_processes(warm_python: str, tmp_path: Path) -> None:
    """Paths alone: their evaluation is the command's, in workers, which do not run the script again."""
    script = tmp_path / "mine.py"
    script.write_text(f"from aipo_graph import evaluate\nprint('once')\nprint(evaluate('operators', {SMALL!r})['alone']['problems'])\n")
    done = subprocess.run([warm_python, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("once"), done.stdout.splitlines()[-1]) == (0, 1, "1"), done.stderr


def test_agents_that_are_objects_in_the_shipped_graph() -> None:
    async def rule(query: str) -> str:
        return "2695-"

    agents = [Agent(name, tools=(rule,)) for name in ("verify", "knowledge", "reasoning")]
    config = Config.model_validate(BARE | {"rollout": {"problems": 8, "traces": 4}})
    run = train("operators", config, agents=agents, steps=1)
    assert run.dir == Path("runs/operators")
    groups, _ = read_traces(run.dir / "traces.jsonl")
    said = {s.text for logged in groups for trace in logged.group.traces for s in trace.segments if s.source == "agent"}
    assert said == {"2695-"}
    with pytest.raises(ConfigError, match=r"agents.use.verify: object:agents.verify is the agent 'knowledge'"):
        train("operators", config, agents={"verify": agents[1]}, name="other")
    with pytest.raises(ConfigError, match="agents.use.*<function"):
        train("operators", config, agents=[lambda config: agents[0]], name="other")


class Words:
    """A task that gives texts."""

    kinds = ("",)

    def train(self, index: int) -> Any:
        return "how many?"

    def heldout(self, count: int, kind: str = "") -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": [1, 2]}, "data: a row is a int, no mapping of columns to values"),
        ({"data": [{"q": "1"}]}, "no column 'question'; the columns there: q"),
        ({"reward": 3}, "a int is no function"),
        ({"graph": 3}, "a int is not a LangGraph graph"),
        ({"config": {"rollout": {"problemz": 3}}}, "no setting 'rollout.problemz'; did you mean 'rollout.problems'?"),
        ({"config": "nowhere.yaml"}, "no file 'nowhere.yaml'"),
        ({"steps": 0}, "train.steps = 0"),
        ({"config": {"run": {"device": "cuda:99"}}}, "run.device = 'cuda:99': torch sees"),
        ({"config": {"run": {"dir": "/proc/nowhere"}}}, "run folder /proc/nowhere/mine: "),
        ({"task": Words(), "data": None}, "gave 'how many?' as a problem; return aipo_graph.types.Problem(id, question, answer)"),
    ],
)
def test_what_cannot_be_used_is_one_line(policy: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trained(policy, **{"config": BARE, **given})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_node_that_raises_is_one_line_with_its_place() -> None:
    async def broken(state: Any, runtime: Any) -> Any:
        return state["nope"]

    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", broken)
    graph.add_edge(START, "policy")
    with pytest.raises(GraphError, match=r"the graph raised KeyError in .*test_api\.py:\d+: 'nope'; see its nodes and routes"):
        train("operators", BARE, graph=graph)


def test_a_run_that_learns_nothing_from_violations_says_so() -> None:
    """A graph in which the policy writes the helpers' part in traces with agents."""
    rollout = {"problems": 2, "traces": 4, "with_agents": 1}
    config = BARE | {"rollout": rollout, "task": {"options": {"easy_share": 0}}, "train": {"patience": 1}}
    with pytest.raises(
        TrainError, match=r"nothing to train on for 1 steps .*% of the last step's traces with agents got 0 since the policy"
    ):
        train("operators", config, graph="graphs/solo.py:build")


def test_an_object_that_is_not_given_again_is_asked_for(policy: str) -> None:
    run = trained(policy, SMALL)
    with pytest.raises(ConfigError, match=r"'object:\w+' stands for an object that a call from Python gave: give it again"):
        evaluate(run.dir)
    with pytest.raises(ConfigError, match="no run 'nowhere'"):
        view("nowhere")


def test_the_chat_model_outside_of_a_run_names_the_way_in() -> None:
    with pytest.raises(GraphError, match="aipo_graph.train"):
        PolicyChatModel().invoke("1+1?")


def test_importing_the_package_is_fast_and_brings_no_torch(warm_python: str) -> None:
    fast = "import sys, aipo_graph; assert not {'torch', 'langgraph', 'pydantic', 'transformers'} & {*sys.modules}; print(dir(aipo_graph))"
    names = "import aipo_graph.train, aipo_graph.view.read; from aipo_graph import train, view; print(callable(train), callable(view))"
    for python, code, said in ((sys.executable, fast, "'train'"), (warm_python, names, "True True")):
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


@pytest.mark.parametrize(("preset", "said"), [("gsm8k", "openai/gsm8k"), ("gsm9k", "no such preset; did you mean 'gsm8k'")])
def test_a_preset_is_laid_over_the_settings_as_by_the_command(preset: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data set is asked for, which is not here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AipoError, match=said):
        evaluate("operators", preset=preset)
