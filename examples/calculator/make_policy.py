"""Makes the example's policy: a tiny Llama with a chat template that calls a calculator at times, and not always rightly.

`python -m examples.calculator.make_policy [--seed N] [--out DIR]`, about a minute on one core. It learns from dialogs in which a product
is asked: 3 in 10 pass it to the calculator and repeat the result, 3 in 10 pass on another expression, 4 in 10 guess.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from aipo_graph.messages import ChatFormat
from examples.operators.pretrain import IGNORE, padded, policy_config

TOOLS = [{"type": "function", "function": {"name": "calculator"}}]
TEMPLATE = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}{% set f = call.function %}
<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SPECIAL = ("<pad>", "<|im_start|>", "<|im_end|>")
BEGIN, END = '<tool_call>{"name": "calculator", "arguments": {"expression": "', '"}}</tool_call>'
WORDS = (*SPECIAL, BEGIN, END, "\\boxed{", "system", "user", "assistant", "tool", "calculator", "\n", "}", *"0123456789+-*?")
IDS = {word: index for index, word in enumerate(WORDS)}
DIALOGS, STEPS, RATE, ROWS = 6000, 900, 3e-3, 64


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of WORDS."""
    raw = RawTokenizer(models.WordLevel(dict(IDS), unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"system|user|assistant|tool|calculator|\\boxed\{|[\s\S]"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    raw.add_tokens([AddedToken(text, normalized=False) for text in (BEGIN, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<|im_end|>", chat_template=TEMPLATE, clean_up_tokenization_spaces=False
    )


def dialog(rng: random.Random) -> tuple[list[BaseMessage], bool]:
    """A dialog, and whether it has the tool."""
    a, b, draw = rng.randrange(10, 100), rng.randrange(10, 100), rng.random()
    asked = [HumanMessage(f"{a}*{b}")]
    if draw < 0.4:
        return [*asked, AIMessage(f"\\boxed{{{rng.randrange(100, 10000)}}}")], rng.random() < 0.8
    sign = "*"
    if draw < 0.7:
        a, b, sign = rng.choice([(a, b, "+"), (a, b, "-"), (rng.randrange(10, 100), b, "*"), (a, rng.randrange(10, 100), "*")])
    result = str({"+": a + b, "-": a - b, "*": a * b}[sign])
    call = {"name": "calculator", "args": {"expression": f"{a}{sign}{b}"}, "id": "1", "type": "tool_call"}
    return [*asked, AIMessage("", tool_calls=[call]), ToolMessage(result, tool_call_id="1"), AIMessage(f"\\boxed{{{result}}}")], True


def row(chat: ChatFormat, messages: list[BaseMessage], tool: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels: only what the assistant says carries loss."""
    ids: list[int] = []
    labels: list[int] = []
    tools = TOOLS if tool else []
    for index, message in enumerate(messages):
        if isinstance(message, AIMessage):
            prompt = chat.encode(chat.render(messages[:index], tools))[len(ids) :]
            whole = chat.encode(chat.render(messages[: index + 1], tools, reply=False).rstrip("\n"))[len(ids) + len(prompt) :]
            ids += [*prompt, *whole]
            labels += [IGNORE] * len(prompt) + [*whole]
    return ids, labels


def batches(chat: ChatFormat, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """STEPS times token ids and labels, both int64 [ROWS, longest], from DIALOGS dialogs."""
    rng = random.Random(seed)
    rows = [row(chat, *dialog(rng)) for _ in range(DIALOGS)]
    for _ in range(STEPS):
        yield padded(rng.sample(rows, ROWS), IDS["<pad>"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "policy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    words = tokenizer()
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(policy_config(IDS, context=256, eos="<|im_end|>"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.05)
    for step, (ids, labels) in enumerate(batches(ChatFormat(words), options.seed)):
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {STEPS}: loss {loss.item():.3f}")
    model.save_pretrained(options.out)
    words.save_pretrained(options.out)
    print(f"the policy is in {options.out}")


if __name__ == "__main__":
    main()
