"""What of a problem reaches a graph, and what of a graph is scored."""

import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain.tools import ToolRuntime
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Send
from pydantic import BaseModel
from rollout_world import settings, world
from test_chat_graph import CALL, build
from typing_extensions import TypedDict

from aipo_graph.errors import ConfigError
from aipo_graph.rollout import Graph, PolicyChatModel, State
from aipo_graph.rollout.collect import Rollouts
from aipo_graph.rollout.inputs import Inputs
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Problem, Trace

PROBLEM = Problem("p", "how warm?", "warm", meta={"city": "Bo", "users": ["ann"], "gold": "warm"})


class Report(TypedDict):
    city: str
    users: list[str]
    drafts: Annotated[list[str], operator.add]
    vote: str


@dataclass
class Who:
    name: str = "nobody"


async def write(state: Report, runtime: Runtime[Who], config: RunnableConfig) -> dict[str, Any]:
    said = await PolicyChatModel().ainvoke([HumanMessage(f"{state['city']} {runtime.context.name}")])
    state["users"].append("changed")
    return {"drafts": [f"{state['city']}/{runtime.context.name}/{config['configurable']['db']}", said.content]}


async def vote(state: Report) -> dict[str, Any]:
    return {"vote": f"{len(state['drafts'])} drafts, {state['users'][0]}"}


def report(last: Callable[..., Any] = vote) -> Graph:
    graph = StateGraph(Report, context_schema=Who)
    graph.add_node("write", write)
    graph.add_node("vote", last)
    for edge in ((START, "write"), ("write", "vote"), ("vote", END)):
        graph.add_edge(*edge)
    return graph.compile()


INPUTS = {"city": "city", "users": "users", "context.name": "id", "configurable.db": "city"}


async def traced(folder: Path, graph: Graph, reward: Callable[..., Any], **rollout: Any) -> Trace:
    rollouts = build(folder, graph, **rollout)
    rollouts.task.reward = reward  # type: ignore
    return await rollouts.run_trace(PROBLEM, seed=1, with_agents=True)


async def test_a_graph_of_its_own_state_works_by_the_mapping_and_its_vote_is_scored(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def reward(reply: str, state: Mapping[str, Any]) -> float:
        seen.update(state)
        return float(reply == "2 drafts, ann")

    trace = await traced(tmp_path, report(), reward, inputs=INPUTS, output="vote", max_tokens=200)
    assert (trace.status, trace.reply, trace.reward) == ("done", "2 drafts, ann", 1.0), trace.error
    assert seen["drafts"][0] == "Bo/p/Bo"
    assert "Bo p" in trace.segments[0].text
    assert PROBLEM.meta["users"] == ["ann"]  # what a graph changes is its own copy
    assert "gold" not in seen
    assert "warm" not in str(seen)


async def test_a_vote_after_a_fan_out_counts_and_not_the_last_workers_text(tmp_path: Path) -> None:
    async def worker(state: dict[str, Any]) -> dict[str, Any]:
        await PolicyChatModel().ainvoke([HumanMessage(f"draft {state['number']}")])
        return {"drafts": [str(state["number"] % 2)]}

    async def majority(state: Report) -> dict[str, Any]:
        return {"vote": max(state["drafts"], key=state["drafts"].count)}

    graph = StateGraph(Report)
    graph.add_node("worker", worker)
    graph.add_node("majority", majority)
    graph.add_conditional_edges(START, lambda state: [Send("worker", {"number": n}) for n in (1, 3, 4)], ["worker"])
    graph.add_edge("worker", "majority")
    trace = await traced(tmp_path, graph.compile(), lambda reply: reply == "1", inputs={"city": "city"}, output="vote", max_tokens=200)
    assert (trace.reply, trace.reward, len(trace.threads)) == ("1", 1.0, 3)


@pytest.mark.parametrize(("output", "expected"), [("messages", "42"), ("structured_response", '{"degrees":3}')])
async def test_the_last_message_or_what_is_no_text(output: str, expected: str, tmp_path: Path) -> None:
    class Weather(BaseModel):
        degrees: int

    class Talk(TypedDict):
        messages: list[Any]
        structured_response: Weather

    async def answer(state: Talk) -> dict[str, Any]:
        await PolicyChatModel().ainvoke(state["messages"])
        return {"messages": [HumanMessage("42")], "structured_response": Weather(degrees=3)}

    graph = StateGraph(Talk)
    graph.add_node("answer", answer)
    graph.add_edge(START, "answer")
    trace = await traced(tmp_path, graph.compile(), lambda reply: 1.0, output=output, max_tokens=200)
    assert trace.reply == expected


async def test_a_graph_that_ends_without_its_output_has_no_score(tmp_path: Path) -> None:
    async def forgets(state: Report) -> dict[str, Any]:
        return {"drafts": []}

    trace = await traced(tmp_path, report(forgets), lambda reply: 1.0, inputs=INPUTS, output="vote", max_tokens=200)
    assert (trace.status, trace.trained, dict(trace.scores).get("reward")) == ("failed", False, None)
    assert trace.error == "NoOutput: the graph ended without 'vote' in its state (rollout.output); see its routes"


async def test_tools_see_the_problem_through_langgraphs_runtime(tmp_path: Path) -> None:
    seen = []

    @tool
    async def calculator(expression: str, runtime: ToolRuntime[Who]) -> str:
        """Works an expression out."""
        seen.append((runtime.context.name, runtime.config["configurable"]["db"]))
        return "42"

    graph = create_agent(PolicyChatModel(), tools=[calculator], context_schema=Who)
    rollouts = build(
        tmp_path, graph, write=(CALL, "<|im_end|>"), max_tokens=12, inputs={"context.name": "city", "configurable.db": "users"}
    )
    for seed in range(8):
        await rollouts.run_trace(PROBLEM, seed=seed, with_agents=True)
    assert set(map(str, seen)) == {"('Bo', ['ann'])"}


async def test_a_graph_of_segments_takes_further_keys(root: Path) -> None:
    """The solo graph, whose state lacks the key, goes without."""

    class Wider(State):
        city: str

    seen = []
    shipped = world(root, lambda text: "\\boxed{42}", [])
    graph = StateGraph(Wider)

    async def look(state: Wider) -> dict[str, Any]:
        seen.append((state["city"], state["problem"].answer, dict(state["problem"].meta)))
        return {"segments": ()}

    graph.add_node("look", look)
    graph.add_edge(START, "look")
    rollouts = replace(shipped, graph=graph.compile(), config=settings(rollout={"inputs": {"city": "city"}}))
    trace = await rollouts.run_trace(PROBLEM, seed=0, with_agents=True)
    assert seen == [("Bo", "", {"city": "Bo", "users": ["ann"]})]
    assert (trace.error or "").startswith("NoTokens")
    assert (await rollouts.run_trace(PROBLEM, seed=0, with_agents=False)).status == "done"


@pytest.mark.parametrize(
    ("rollout", "said"),
    [
        ({"inputs": {}}, r"mine: its state has neither `messages` nor `segments`; say which of its keys .*\(city, users, drafts, vote\)"),
        ({"inputs": {"town": "city"}}, r"rollout.inputs.town: mine: its input has no 'town'; there is city, drafts, users, vote"),
        ({"inputs": {"city": "city", "context.nam": "id"}}, r"context.nam: mine: its context_schema has no 'nam'; did you mean 'name'\?"),
        ({"inputs": {"city": "city"}, "output": "votes"}, r"rollout.output: the state of mine has no 'votes'; did you mean 'vote'\?"),
        ({"inputs": {"city": "town"}}, r"rollout.inputs: problem 'p' has no field 'town'; there is answer, city, gold, id, kind, question"),
    ],
)
async def test_what_does_not_fit_is_one_line(rollout: dict[str, Any], said: str, root: Path) -> None:
    graph = report()
    config = settings(rollout=rollout | {"graph": "mine", "solo": "mine"})
    rollouts: Rollouts = replace(world(root, lambda text: "x", []), config=config, graph=graph, solo=graph)
    with pytest.raises(ConfigError, match=said):
        rollouts.inputs[0].of(PROBLEM)


@pytest.mark.parametrize(
    ("inputs", "warned"),
    [
        ({"city": "city", "context.name": "question"}, []),
        ({"city": "answer"}, ["rollout.inputs.city = 'answer' may give the answer away: the graph, its tools and a tracer see it"]),
        ({"city": "city", "context.name": "gold"}, ["rollout.inputs.context.name = 'gold' may give"]),
    ],
)
def test_gold_that_is_mapped_on_purpose_is_said(inputs: dict[str, str], warned: list[str]) -> None:
    found = Inputs.open(inputs, report(), "mine").warnings(PROBLEM)
    assert len(found) == len(warned)
    assert all(line.startswith(start) for line, start in zip(found, warned, strict=True))


def test_rows_that_differ_in_a_mapped_column_are_problems_of_their_own(tmp_path: Path) -> None:
    rows = [{"question": "fix the bug", "answer": "", "repo": f"r{i}"} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "dataset", "data": str(tmp_path / "rows.jsonl"), "reward": "text"}
    found = open_task(settings(task=task, rollout={"inputs": {"configurable.repo": "repo"}}))
    trained, heldout = {found.train(i).meta["repo"] for i in range(200)}, {p.meta["repo"] for p in found.heldout(200)}
    assert (len(trained | heldout), trained & heldout) == (200, set())
