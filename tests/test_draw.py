"""The graph as Mermaid and as the pages draw it, and langgraph.json as LangGraph's server reads it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aipo_graph import cli, draw
from aipo_graph.load import load
from aipo_graph.rollout.collect import open_graph
from aipo_graph.view.read import layout


def test_mermaid_names_every_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(draw.command, []) == 0
    text = capsys.readouterr().out
    assert {"policy(policy)", "verify(verify)", "knowledge(knowledge)", "reasoning(reasoning)"} <= set(text.split())
    assert "policy -.-> knowledge;" in text
    assert "knowledge --> policy;" in text


@pytest.mark.parametrize("spec", ["graphs/aipo.py:build", "graphs/solo.py:build", "graphs/two_threads.py:build"])
def test_layout_holds_the_picture_as_numbers(spec: str) -> None:
    drawing = open_graph(spec).get_graph()
    agents = frozenset({"verify", "knowledge", "reasoning"})
    found = json.loads(json.dumps(draw.picture(drawing, agents)))
    nodes = {node["name"]: node for node in found["nodes"]}
    assert set(nodes) == set(drawing.nodes)
    assert {name for name, node in nodes.items() if node["role"] == "agent"} == agents & set(nodes)
    assert {name: nodes[name]["label"] for name, node in nodes.items() if node["role"] == "end"} == {"__start__": "start", "__end__": "end"}
    for node in nodes.values():
        assert node["width"] / 2 <= node["x"] <= found["width"] - node["width"] / 2
        assert node["height"] / 2 <= node["y"] <= found["height"] - node["height"] / 2
    assert {(edge["source"], edge["target"], edge["conditional"]) for edge in found["edges"]} == {
        (edge.source, edge.target, edge.conditional) for edge in drawing.edges
    }
    for edge in found["edges"]:
        for name, (x, y) in ((edge["source"], edge["points"][0]), (edge["target"], edge["points"][-1])):
            node = nodes[name]
            assert abs(x - node["x"]) <= node["width"] / 2 + 0.2
            assert abs(y - node["y"]) <= node["height"] / 2 + 0.2
        assert all(0 <= x <= found["width"] for x, _ in edge["points"])


def test_no_edge_to_the_right_skips_a_column_and_none_of_its_boxes_is_another() -> None:
    drawing = open_graph("graphs/two_threads.py:build").get_graph()
    found = draw.picture(drawing, frozenset())
    columns = {name: place for place, name in enumerate(sorted({node["x"] for node in found["nodes"]}))}
    places = {node["name"]: (columns[node["x"]], node["y"]) for node in found["nodes"]}
    assert len(set(places.values())) == len(drawing.nodes)
    assert all(places[edge.target][0] <= places[edge.source][0] + 1 for edge in drawing.edges)


def test_a_loop_a_long_way_back_and_a_node_that_nothing_leads_to_are_drawn() -> None:
    roles = {"__start__": "end", **dict.fromkeys("abcd", "policy"), "__end__": "end"}
    edges = [("__start__", "a"), ("a", "b"), ("b", "b"), ("b", "c"), ("a", "d"), ("d", "b"), ("c", "a")]
    found = layout(roles, dict.fromkeys(edges, True))
    places = {node["name"]: node["x"] for node in found["nodes"]}
    assert max(places, key=places.__getitem__) == "__end__"
    curves = {(edge["source"], edge["target"]): edge["points"] for edge in found["edges"]}
    assert curves.keys() == set(edges)
    bottom = max(node["y"] + node["height"] / 2 for node in found["nodes"])
    assert all(bottom < y <= found["height"] for _, y in curves["c", "a"][1:3])
    assert all(0 <= x <= found["width"] and 0 <= y <= found["height"] for points in curves.values() for x, y in points)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["graphs/nosuch.py:build"], "graphs/nosuch.py"),
        (["graphs/aipo.py:AGENTS"], "not a LangGraph graph"),
        (["--png", "picture.png"], "no setting --png"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(draw.command, args) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error


def test_langgraph_json_names_graphs_that_the_server_can_open(root: Path) -> None:
    """The server imports each file, calls the factory without arguments, and asks for its schemas as JSON."""
    settings = json.loads((root / "langgraph.json").read_text())
    assert settings["dependencies"] == ["."]
    for name, path in settings["graphs"].items():
        graph = load(str(root / path))()
        assert graph.get_graph().nodes, name
        for schema in (graph.get_input_jsonschema(), graph.get_output_jsonschema(), graph.get_context_jsonschema()):
            json.dumps(schema)
        assert {"problem", "segments"} <= set(graph.get_input_jsonschema()["properties"])


def test_langgraph_cli_accepts_langgraph_json(root: Path) -> None:
    pytest.importorskip("langgraph_cli", reason="langgraph-cli is not installed")
    done = subprocess.run([sys.executable, "-m", "langgraph_cli", "validate"], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
