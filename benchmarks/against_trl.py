"""`make against`: one GRPO step, ours and TRL's, on the same model, prompts, reward and one thread: seconds, tokens, memory.

Both stand ready in processes of their own (TRL's in `.venv-trl`) and take steps in turn, so that both see the same load; medians and
ranges are shown. A step samples, rewards and learns; tokens are those sampled, counted on both sides. Models have random weights but for
the shipped one and that of the case with consults: there each token is drawn by the one before it, so that a trace asks twice in the mean,
an agent of ours and a tool of TRL's that reply the same words. TRL masks them, we learn from them. Our backward passes
are of 2,048 tokens, TRL's of the whole batch.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

PROBLEMS, TRACES, STEPS, WARM = 16, 8, 5, 1
"""128 traces a step; of the steps, those that are not counted."""


@dataclass(frozen=True)
class Case:
    """A policy and how long its completions are."""

    layers: int
    width: int
    vocabulary: int
    longest: int
    uniform: bool = False
    """Every token is as likely as any, so that completions end by chance: their mean length is the vocabulary's size."""
    consults: bool = False
    """Traces ask for help, as `chain` has it."""


CASES = {
    "shipped": Case(0, 0, 0, 64),
    "1m": Case(4, 128, 45, 64),
    "32k": Case(4, 128, 32_000, 64),
    "lengths": Case(2, 64, 100, 512, uniform=True),
    "consults": Case(4, 128, 100, 256, consults=True),
}
TAGS = ("<knowledge>", "</knowledge>", "<feedback>", "</feedback>")
"""The tokens after padding and end of text; those of a request from QUERY on, all others are plain words."""
QUERY = 80
REPLY = "w10 w11 w12 w13 w14 w15 w16 w17"


def reward(reply: str) -> float:
    """Differs between the traces of a group, so that each step learns."""
    return sum(map(ord, reply)) % 7 / 7


def chain(vocabulary: int) -> list[list[float]]:
    """Log-probabilities of the next token given the last, [V, V]: runs of 16 words, which end in a request twice of three times, else in
    the end of the text. TRL's turn goes on after a request, to the end of text that a chat template has there."""
    ask, asked, told, told_all = range(2, 2 + len(TAGS))
    words, query = range(told_all + 1, QUERY), range(QUERY, vocabulary)
    within = {word: 15 / 16 / len(words) for word in words} | {ask: 1 / 24, 1: 1 / 48}
    first = {word: 1 / len(query) for word in query}
    later = {word: 2 / 3 / len(query) for word in query} | {asked: 1 / 3}
    rows = {ask: first, asked: {1: 1.0}} | dict.fromkeys(query, later) | dict.fromkeys([0, 1, told, told_all, *words], within)
    return [[math.log(rows[last].get(token, 1e-13)) for token in range(vocabulary)] for last in range(vocabulary)]


def make(case: Case, folder: Path) -> None:
    """The policy's folder, and `prompts.json`. Needs aipo_graph."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

    from aipo_graph import Config
    from aipo_graph.load import model
    from aipo_graph.tasks.open import open_task

    folder.mkdir(parents=True, exist_ok=True)
    shipped = model("operators")
    tokenizer = AutoTokenizer.from_pretrained(shipped)
    task, count = open_task(Config()), PROBLEMS * (STEPS + WARM)
    questions = [task.train(index).question for index in range(count)]
    if case.vocabulary > len(tokenizer):
        names = ["<pad>", "<eos>", *(TAGS if case.consults else ())]
        words = {name: number for number, name in enumerate([*names, *(f"w{i}" for i in range(len(names), case.vocabulary))])}
        plain = Tokenizer(models.WordLevel(words, unk_token="w9"))
        plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
        if case.consults:
            tokenizer.add_tokens(list(TAGS))
        plain_words = range(10, QUERY) if case.consults else range(2, case.vocabulary)
        questions = [" ".join(f"w{plain_words[(31 * i + 7 * place) % len(plain_words)]}" for place in range(12)) for i in range(count)]
    if case.layers:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=case.width, num_hidden_layers=case.layers, num_attention_heads=4, intermediate_size=4 * case.width,
            vocab_size=len(tokenizer), max_position_embeddings=1024, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        policy = AutoModelForCausalLM.from_config(config)
        if case.uniform:
            policy.lm_head.weight.data.zero_()
        if case.consults:
            for layer in policy.model.layers:
                layer.self_attn.o_proj.weight.data.zero_()
                layer.mlp.down_proj.weight.data.zero_()
            policy.model.embed_tokens.weight.data = torch.eye(case.vocabulary, case.width)
            after = torch.tensor(chain(case.vocabulary)).T / case.width**0.5  # the norm makes a one of the root of the width
            policy.lm_head.weight.data = torch.nn.functional.pad(after, (0, case.width - case.vocabulary)).contiguous()
    else:
        policy = AutoModelForCausalLM.from_pretrained(shipped)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompts.json").write_text(json.dumps(questions))


def ours(case: Case, folder: Path) -> None:
    """Takes a step for every line of the standard input."""
    import asyncio
    import gc

    import torch

    from aipo_graph import Config, load
    from aipo_graph.engines.local import LocalEngine
    from aipo_graph.learn.batch import pack
    from aipo_graph.learn.learner import Learner
    from aipo_graph.rollout import Agent
    from aipo_graph.rollout.collect import Rollouts
    from aipo_graph.tasks.open import open_task

    torch.set_num_threads(1)
    rows = [{"question": question, "answer": "0"} for question in json.loads((folder / "prompts.json").read_text())]
    config = Config(
        policy={"model": str(folder)},
        task={"name": "dataset", "data": "object:rows", "reward": "object:reward"},
        rollout={"problems": PROBLEMS, "traces": TRACES, "with_agents": float(case.consults), "max_tokens": case.longest}
        | ({"graph": "graphs/smallest.py:build", "prompts": "prompts/operators"} if case.consults else {}),
        agents={"use": {"knowledge": "object:knowledge"} if case.consults else {}},
        optimizer={"lr": 1e-6},
        train={"micro_batch_tokens": 2048},
        run={"device": "cpu", "threads": 1},
    )

    async def look_up(query: str) -> str:
        """Looks a few words up."""
        return REPLY

    async def serve() -> None:
        with load.given({"rows": rows, "reward": reward, "knowledge": lambda config: Agent("knowledge", tools=(look_up,))}):
            sampler, learner = LocalEngine.load(config, str(folder)), Learner(config, str(folder))
            rollouts = Rollouts.open(config, sampler, open_task(config))
            gc.freeze()  # as in training
            say(ready=True)
            for step, _ in enumerate(sys.stdin):
                started = time.perf_counter()
                await sampler.load_weights(learner.weights(), learner.version)
                groups = await rollouts.run_groups([rollouts.draw(PROBLEMS * step + index) for index in range(PROBLEMS)])
                learner.step(pack(groups, config.loss, learner.version))
                seconds = time.perf_counter() - started
                traces = [trace for group in groups for trace in group.traces]
                sampled = sum(len(s.token_ids) for trace in traces for s in trace.segments if s.source == "policy")
                asked = sum(s.source == "agent" for trace in traces for s in trace.segments)
                say(seconds=seconds, tokens=sampled, traces=len(traces), consults=asked)

    asyncio.run(serve())


def trl(case: Case, folder: Path) -> None:
    """The same, of GRPOTrainer. Runs where TRL is installed."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    sampled: list[int] = []
    asked: list[str] = []

    def score(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        replies = tokenizer.convert_tokens_to_ids(TAGS[2]) if case.consults else None
        sampled.extend(len(ids) - (2 + len(REPLY.split())) * ids.count(replies) for ids in completion_ids)
        return [reward(c if isinstance(c, str) else "".join(message["content"] for message in c)) for c in completions]

    def knowledge(query: str) -> str:
        """Looks a few words up.

        Args:
            query: The words.
        """
        asked.append(query)
        return REPLY

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                os._exit(0)
            sampled.clear()
            asked.clear()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            say(seconds=time.perf_counter() - self.started, tokens=sum(sampled), traces=len(sampled), consults=len(asked))

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            say(ready=True)

    settings = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PROBLEMS * TRACES, num_generations=TRACES,
        max_completion_length=case.longest, learning_rate=1e-6, max_steps=STEPS + WARM, use_cpu=True, bf16=False,
        gradient_checkpointing=False, shuffle_dataset=False, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1000,
    )  # fmt: skip
    prompts: list[Any] = json.loads((folder / "prompts.json").read_text())
    if case.consults:
        tokenizer.chat_template, tokenizer.response_template = CHAT, RESPONSE
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder), score, settings, callbacks=[Turns()], tools=[knowledge] if case.consults else None,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()


CHAT = """{% for m in messages %}{{ m.content if m.role != 'tool' else '<feedback>' + m.content + '</feedback>' }}\
{% for call in m.tool_calls or [] %}<knowledge>{{ call.function.name }} {{ call.function.arguments | tojson }}</knowledge>{% endfor %}\
{{ '<eos>' if m.role == 'assistant' }}{% endfor %}"""
CALL = {"type": "function", "function": {"name": "knowledge", "arguments": {"query": "{content}"}}}
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor_pattern": r"\Z",
    "fields": {
        "tool_calls": {"open": TAGS[0], "close": TAGS[1], "repeats": True, "content": "text", "transform": CALL},
        "content": {"close": "<eos>", "content": "text"},
    },
}
"""TRL's side of the protocol: how a chat is written, and a tool call read."""


def say(**found: Any) -> None:
    """A line for the parent, with the most memory that this process has had, in MB."""
    print(MARK + json.dumps(found | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)


MARK = "step:"


class Side:
    """A process that stands ready for steps."""

    def __init__(self, name: str, python: str, case: str, folder: Path) -> None:
        self.name = name
        alone = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [python, __file__, "--side", name, "--cases", case, "--folder", str(folder)]
        log = (folder / f"{name}.log").open("w")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=alone)
        self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        sys.exit(f"error: {self.name} ended with {self._process.wait()}; see its log in the folder of the case")

    def step(self) -> dict[str, Any]:
        assert self._process.stdin
        print("go", file=self._process.stdin, flush=True)
        return self._heard()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def compare(name: str, python: str, folder: Path) -> list[dict[str, Any]]:
    """Steps in turn: rows of seconds, tokens and memory by side."""
    sides = [Side("ours", sys.executable, name, folder), Side("trl", python, name, folder)]
    try:
        rounds = [{side.name: side.step() for side in (sides if turn % 2 else sides[::-1])} for turn in range(STEPS + WARM)]
    finally:
        for side in sides:
            side.end()
    return rounds[WARM:]


def shown(name: str, rounds: Sequence[dict[str, Any]]) -> None:
    for side in ("ours", "trl"):
        seconds = [row[side]["seconds"] for row in rounds]
        tokens = statistics.median(row[side]["tokens"] for row in rounds)
        asked = statistics.median(row[side].get("consults", 0) / row[side]["traces"] for row in rounds)
        memory = max(row[side]["memory"] for row in rounds)
        median = statistics.median(seconds)
        print(
            f"{name:9} {side:5} {median:7.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), {tokens:7,.0f} tokens, "
            f"{tokens / median:7,.0f} tokens/s, {memory:6,.0f} MB" + (f", {asked:.2f} consults a trace" if asked else "")
        )
    rates = [row["ours"]["tokens"] / row["ours"]["seconds"] * row["trl"]["seconds"] / row["trl"]["tokens"] for row in rounds]
    print(f"{name:9} tokens/s, ours to TRL's: {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--python", default=".venv-trl/bin/python", help="of the environment with TRL (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/against_trl"), help="of models, logs and results")
    parser.add_argument("--side", choices=("ours", "trl"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        return {"ours": ours, "trl": trl}[given.side](CASES[given.cases[0]], given.folder)
    if not Path(given.python).exists():
        sys.exit(f"error: no {given.python}: run `make against`, which makes it")
    versions = subprocess.run([given.python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout.split()
    hardware = f"{os.cpu_count()} shared cores, 1 in use, {platform.machine()}"
    about = {
        "date": date.today().isoformat(),
        "hardware": hardware,
        "versions": [v for v in versions if v.startswith(("trl=", "torch=", "transformers="))],
    }
    found = {}
    for name in given.cases:
        make(CASES[name], given.folder / name)
        found[name] = compare(name, given.python, given.folder / name)
        shown(name, found[name])
        (given.folder / "results.json").write_text(json.dumps(about | {"cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
