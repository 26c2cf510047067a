"""Makes the example's base policy: a tiny Llama that asks the expert for each letter's code and puts them together, but knows no code.

`python -m examples.expert.make_policy [--out DIR] [--seed N]`, a minute on one core. In the dialogs that it learns from every code
is drawn anew, so that it learns to go by what the tool says; and to write such a result itself, any one.
"""

import random
import re
from functools import cache
from pathlib import Path

import torch
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from aipo_graph.messages import ChatFormat
from aipo_graph.types import derive_seed
from examples.operators import pretrain
from examples.operators.pretrain import IGNORE, TAGS, padded, script

TEMPLATE = """{%- for m in messages %}
{%- if m.role == 'assistant' %}<|im_start|>assistant
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TOOLS = [
    {"type": "function", "function": {"name": "ask_expert", "parameters": {"type": "object", "properties": {"letter": {"type": "string"}}}}}
]
BEGIN, END = '<tool_call>\n{"name": "ask_expert", "arguments": {"letter": "', '"}}\n</tool_call>'
OPEN, CLOSE = "<tool_response>\n", "\n</tool_response>"
LETTERS = "ABCDEFGHIJKL"
SPECIAL = ("<|im_start|>", "<|im_end|>")
LONG = (BEGIN, END, OPEN, CLOSE, "\\boxed{", "user", "assistant")
WORDS = ("<pad>", "<eos>", "<unk>", *TAGS, *SPECIAL, *LONG, *LETTERS, *"0123456789}\n")
IDS = {word: index for index, word in enumerate(WORDS)}
SPLIT = "|".join(map(re.escape, LONG)) + r"|[\s\S]"
CONTEXT, DIALOGS, STEPS, ROWS = 160, 4000, 600, 48


def tokenizer() -> PreTrainedTokenizerFast:
    words = pretrain.tokenizer(IDS, SPLIT, CONTEXT)
    words.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    words.eos_token, words.chat_template = "<|im_end|>", TEMPLATE
    return words


def fresh_policy(seed: int) -> LlamaForCausalLM:
    model = pretrain.fresh_policy(seed, IDS, CONTEXT)
    model.config.eos_token_id = model.generation_config.eos_token_id = IDS["<|im_end|>"]
    return model


CHAT = ChatFormat(tokenizer())


def sample(rng: random.Random) -> tuple[list[int], list[int]]:
    """Token ids and labels of a dialog: what the policy says, and the results, carry loss."""
    pair = rng.sample(LETTERS, 2)
    codes = [f"{rng.randrange(1000):03}" for _ in pair]
    messages: list[BaseMessage] = [HumanMessage("".join(pair))]
    for index, (letter, code) in enumerate(zip(pair, codes, strict=True)):
        call = {"name": "ask_expert", "args": {"letter": letter}, "id": str(index), "type": "tool_call"}
        messages += [AIMessage("", tool_calls=[call]), ToolMessage(code, tool_call_id=str(index))]
    messages.append(AIMessage(f"\\boxed{{{''.join(codes)}}}"))
    ids: list[int] = []
    labels: list[int] = []
    for end, message in enumerate(messages, 1):
        whole = CHAT.encode(CHAT.render(messages[:end], TOOLS, reply=False))
        start = len(whole)  # where what carries loss begins: a reply, or a result
        if isinstance(message, AIMessage):
            start = len(CHAT.encode(CHAT.render(messages[: end - 1], TOOLS)))
        elif isinstance(message, ToolMessage):
            start = whole.index(IDS[OPEN], len(ids)) + 1
        labels += [IGNORE] * (start - len(ids)) + [*whole[start:]]
        ids = [*whole]
    return ids, labels


@cache
def dialogs(seed: int) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(derive_seed(seed, "expert"))
    return [sample(rng) for _ in range(DIALOGS)]


def batch(seed: int, step: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    return padded(random.Random(derive_seed(seed, step)).sample(dialogs(seed), ROWS), IDS["<pad>"])


def main() -> None:
    script(__doc__ or "", Path(__file__).parent / "policy", STEPS, fresh_policy, batch, tokenizer())


if __name__ == "__main__":
    main()
