"""The graph as Mermaid and as a picture, and langgraph.json as LangGraph's server reads it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aipo_graph import cli, draw
from aipo_graph.load import load
from aipo_graph.rollout.collect import open_graph


def test_mermaid_names_every_node(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(draw.command, []) == 0
    text = capsys.readouterr().out
    assert {"policy(policy)", "verify(verify)", "knowledge(knowledge)", "reasoning(reasoning)"} <= set(text.split())
    assert "policy -.-> knowledge;" in text
    assert "knowledge --> policy;" in text


def test_pictures_hold_every_node_and_repeat_bit_for_bit(tmp_path: Path) -> None:
    for name in ("one", "two"):
        args = ["graphs/two_threads.py:build", "--png", str(tmp_path / f"{name}.png"), "--svg", str(tmp_path / f"{name}.svg")]
        assert cli.main(draw.command, args) == 0
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    svg = (tmp_path / "one.svg").read_text()
    assert all(f"<!-- {name} -->" in svg for name in ("start", "end", "planner", "hand_over", "policy", "verify", "knowledge", "reasoning"))


def test_layout_gives_each_node_a_place_of_its_own_and_no_edge_skips_a_column() -> None:
    drawing = open_graph("graphs/two_threads.py:build").get_graph()
    boxes = draw.boxes(drawing)
    assert len({(box.column, box.y) for box in boxes.values()}) == len(drawing.nodes)
    assert all(boxes[edge.target].column <= boxes[edge.source].column + 1 for edge in drawing.edges)


@pytest.mark.parametrize("spec", ["graphs/aipo.py:build", "graphs/solo.py:build", "graphs/two_threads.py:build"])
def test_layout_holds_the_picture_as_numbers(spec: str) -> None:
    drawing = open_graph(spec).get_graph()
    agents = frozenset({"verify", "knowledge", "reasoning"})
    found = json.loads(json.dumps(draw.layout(drawing, agents)))
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


def test_layout_is_the_picture_upside_down() -> None:
    """Numbers of a page grow downwards; those of a figure upwards."""
    drawing = open_graph("graphs/aipo.py:build").get_graph()
    places = {node["name"]: node for node in draw.layout(drawing, frozenset())["nodes"]}
    boxes = draw.boxes(drawing)
    order = sorted(boxes, key=lambda name: (boxes[name].column, -boxes[name].y))
    assert order == sorted(places, key=lambda name: (places[name]["x"], places[name]["y"]))


def test_a_loop_back_over_several_columns_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(
        "from langgraph.graph import END, START, StateGraph\n"
        "from aipo_graph.rollout import Context, State, policy_node\n"
        "graph = StateGraph(State, context_schema=Context)\n"
        "for name in 'abcd':\n    graph.add_node(name, policy_node())\n"
        "for one, two in [(START, 'a'), ('a', 'b'), ('b', 'c'), ('a', 'd'), ('d', 'b')]:\n    graph.add_edge(one, two)\n"
        "graph.add_conditional_edges('c', lambda state: END, ['a', END])\n"
    )
    assert cli.main(draw.command, [f"{tmp_path / 'loop.py'}:graph", "--svg", str(tmp_path / "loop.svg")]) == 0
    assert (tmp_path / "loop.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["graphs/nosuch.py:build"], "graphs/nosuch.py"),
        (["graphs/aipo.py:AGENTS"], "not a LangGraph graph"),
        (["--png", "picture.jpg"], "must end in .png"),
        (["--svg", "nosuch/picture.svg"], "folder that exists"),
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
        graph = load(path.removeprefix("./"), base=root)()
        assert graph.get_graph().nodes, name
        for schema in (graph.get_input_jsonschema(), graph.get_output_jsonschema(), graph.get_context_jsonschema()):
            json.dumps(schema)
        assert {"problem", "segments"} <= set(graph.get_input_jsonschema()["properties"])


def test_langgraph_cli_accepts_langgraph_json(root: Path) -> None:
    pytest.importorskip("langgraph_cli", reason="langgraph-cli is not installed")
    done = subprocess.run([sys.executable, "-m", "langgraph_cli", "validate"], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
