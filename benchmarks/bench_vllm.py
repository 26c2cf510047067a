"""`python benchmarks/bench_vllm.py`: tokens/s of bare vLLM, and of the same requests as traces through the graph.

The policy is a Llama of 25 M random weights with the quick start's tokenizer: large enough that vLLM takes the time, not what is around
it. It neither asks nor ends, so the graph offers it a fact after every SEGMENT tokens. Needs vLLM beside aipo_graph (`make vllm` makes
.venv-vllm).
"""

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench import measure, report
from langgraph.graph import END, START, StateGraph
from transformers import LlamaConfig, LlamaForCausalLM

from aipo_graph import cli
from aipo_graph.config import Config
from aipo_graph.engines.launch import launched
from aipo_graph.load import find, load
from aipo_graph.rollout import Context, Graph, State, agent_node, by_confidence, policy_node

SEGMENT = 64
AGENTS = '{"knowledge": "graphs/operators_agents.py:knowledge"}'
pretrain = sys.modules[load("examples/operators/pretrain.py:tokenizer").__module__]
POLICY = "random Llama, 8 layers of width 512"


def build() -> Graph:
    graph = StateGraph(State, context_schema=Context)
    graph.add_node("policy", policy_node(segment_tokens=SEGMENT))
    graph.add_node("knowledge", agent_node("knowledge"))
    graph.add_edge(START, "policy")
    graph.add_conditional_edges("policy", by_confidence(threshold=0.0, agent="knowledge"), ["policy", "knowledge", END])
    graph.add_edge("knowledge", "policy")
    return graph.compile()


def random_policy(folder: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(**{**pretrain.policy_config().to_dict(), **shape, "head_dim": 64, "initializer_range": 0.02})
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():  # column 0 is the same at every token, for the head to tell tags and the end of text from the rest
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[[pretrain.IDS[word] for word in ("<eos>", *pretrain.TAGS)], 0] = -10.0
    model.save_pretrained(folder)
    pretrain.tokenizer().save_pretrained(folder)


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        random_policy(Path(folder))
        graph = ["--rollout.graph", f"{__file__}:build", "--rollout.max_tokens", "256", "--agents.use", AGENTS, "--policy.model", folder]
        server = ["--engine.kind", "server", "--engine.launch", "true", "--engine.max_batch", "128"]
        words = [str(find("configs/quickstart.yaml")), *graph, *server, *argv]
        config, _ = cli.parse(words, Config, prog="python benchmarks/bench_vllm.py", doc=__doc__ or "")
        torch.set_num_threads(config.run.threads)
        with launched(config, folder, Path(folder)) as served:
            rows = asyncio.run(measure(served))
    report(config.model_copy(update={"policy": config.policy.model_copy(update={"model": POLICY})}), rows, "bench_vllm.json")


if __name__ == "__main__":
    sys.exit(cli.main(main))
