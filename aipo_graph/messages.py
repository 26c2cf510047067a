"""LangChain messages to tokens and back, as one chat template writes them."""

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    InvalidToolCall,
    SystemMessage,
    ToolCall,
    ToolMessage,
)
from transformers import PreTrainedTokenizerBase

from aipo_graph.errors import ConfigError
from aipo_graph.types import derive_seed

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_THINK, CALL, END_CALL, "<tool_response>", "</tool_response>")
"""What templates build assistant and tool turns with, whether or not each is a token of its own."""
READ = frozenset({"text", "reasoning", "thinking", "tool_call", "tool_use", "invalid_tool_call"})
"""Content blocks that hold nothing but text, or what a message says elsewhere, too."""
MAX_DEPTH = 32
"""Nesting of a tool call's arguments."""
DATE = "26 Jul 2024"
"""What templates get as `date_string`, which Llama 3.2's would else take from the clock: a prompt must not depend on the day."""


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of token ids, control tokens included, nothing tidied."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def special_ids(tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int] = ()) -> frozenset[int]:
    """Ids of control tokens. Not all_special_ids alone: header and end-of-turn tokens of many models are special without being named."""
    added = tokenizer.added_tokens_decoder
    return frozenset({*tokenizer.all_special_ids, *eos_ids, *(i for i, token in added.items() if token.special)})


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The control token with which the chat template ends a reply, or else opens the turn after it, found by rendering one.

    None without a template or such a token.
    """
    said, specials = "aipo", special_ids(tokenizer)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    for conversation in (turns, [*turns, turns[0]]):
        try:
            text = str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False, date_string=DATE))
        except (TemplateError, TypeError, ValueError, KeyError):
            return None
        _, found, after = text.rpartition(said)
        ids = tokenizer.encode(after, add_special_tokens=False) if found else ()
        if (end := next((token for token in ids if token in specials), None)) is not None:
            return int(end)
    return None


def blank(words: Iterable[str]) -> tuple[re.Pattern[str], Callable[[str], str]]:
    """A pattern that finds the words, and a function that replaces them in a text by a blank, NFKC look-alikes included."""
    pattern = re.compile("|".join(map(re.escape, sorted(set(words) - {""}, key=len, reverse=True))) or "(?!)")

    def neutralise(text: str) -> str:
        folded = unicodedata.normalize("NFKC", text)
        return pattern.sub(" ", folded if pattern.search(folded) else text)

    return pattern, neutralise


class ChatFormat:
    """How one tokenizer's chat template writes messages, and how its model's replies read. Raises ConfigError without a template.

    Args:
        thinking: asks templates that know `enable_thinking` for a reasoning part.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool = False) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template, which chat messages need: "
                "use an instruction-tuned model, or add chat_template.jinja beside its tokenizer"
            )
        self._tokenizer = tokenizer
        self._thinking = thinking
        self.special_ids = special_ids(tokenizer)
        specials = {*tokenizer.all_special_tokens, *(self.decode([i]) for i in self.special_ids)}
        self._specials, self._neutralise = blank(specials)
        self._neutralise_tags = blank(specials | set(TAGS))[1]
        question = [HumanMessage("?")]
        self.opening = self.render(question)[len(self.render(question, reply=False)) :]
        """What the template writes before a reply."""
        inside, closed, _ = self.opening.partition(THINK)[2].partition(END_THINK)
        self._unthought = inside if closed else ""
        """What stands there for reasoning that was not asked for: two line breaks in Qwen3's."""
        template = str(tokenizer.chat_template)
        self._bare_calls = CALL not in template and '"parameters": ' in template

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode(self._tokenizer, token_ids)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of the template's text; special tokens in it become their own."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def render(self, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]] = (), *, reply: bool = True) -> str:
        """The template's text of the messages.

        Control tokens in what the messages say are replaced by blanks; in assistant and tool messages so are the tags of tool calls and
        reasoning, so that neither can pose as another turn. Raises ConfigError for messages that the template refuses.

        Args:
            tools: OpenAI function schemas.
            reply: end with the opening of an assistant turn.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [self._plain(message) for message in messages],
                tools=[_each(dict(tool), self._neutralise) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=reply,
                enable_thinking=self._thinking,
                date_string=DATE,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            kinds = ", ".join(message.type for message in messages)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"the policy's chat template refuses these messages ({kinds}): {reason}; send what it knows") from error
        return str(text)

    def _plain(self, message: BaseMessage) -> dict[str, Any]:
        """A message as templates read it, its text neutralised."""
        kinds = {str(block.get("type")) for block in message.content if isinstance(block, dict)}
        if unread := sorted(kinds - READ):
            raise ConfigError(f"a {message.type} message holds a content block of type {unread[0]!r}: the policy reads text alone")
        text = str(message.text)
        match message:
            case SystemMessage():
                return {"role": "system", "content": self._neutralise(text)}
            case HumanMessage():
                return {"role": "user", "content": self._neutralise(text)}
            case ToolMessage():
                name, call = self._neutralise_tags(message.name or ""), self._neutralise_tags(message.tool_call_id)
                return {"role": "tool", "name": name, "tool_call_id": call, "content": self._neutralise_tags(text)}
            case AIMessage():
                return self._plain_reply(message, text)
            case ChatMessage():
                return {"role": self._neutralise_tags(message.role), "content": self._neutralise_tags(text)}
        raise ConfigError(f"a {message.type} message has no place in the policy's chat template: send system, human, ai and tool messages")

    def _plain_reply(self, message: AIMessage, text: str) -> dict[str, Any]:
        content = "\n".join(filter(None, [text, *(str(call["args"]) for call in message.invalid_tool_calls)]))
        plain: dict[str, Any] = {"role": "assistant", "content": self._neutralise_tags(content)}
        # Told that there was none, Qwen3's template leaves the empty part out of the next prompt, and every tool call opens a new row.
        if reasoning := message.additional_kwargs.get("reasoning_content") or self._unthought:
            plain["reasoning_content"] = self._neutralise_tags(str(reasoning))
        if message.tool_calls:
            plain["tool_calls"] = [
                {
                    "id": self._neutralise_tags(call["id"] or ""),
                    "type": "function",
                    "function": _each({"name": call["name"], "arguments": call["args"]}, self._neutralise_tags),
                }
                for call in message.tool_calls
            ]
        return plain

    def follow(
        self, messages: Sequence[BaseMessage], reply: int, seen: str, sampled: str, tools: Sequence[Mapping[str, Any]]
    ) -> str | None:
        """What the template writes after a sampled reply, up to the next one: its end, results, questions, the next opening.

        None where the reply does not follow just what it was sampled from, or the template now writes it, or what came before it, in
        another way: with its reasoning left out, say.

        Args:
            messages: the conversation so far; ``messages[reply]`` is the reply as `parse` read it.
            seen: `render` of what the reply was sampled from.
            sampled: the reply's text, control tokens included.
        """
        if self.render(messages[:reply], tools) != seen:
            return None
        before, now = self.render(messages[: reply + 1], tools, reply=False), self.render(messages, tools)
        if not before.startswith(seen) or not now.startswith(before):
            return None
        written = before[len(seen) :]
        reasoning = messages[reply].additional_kwargs.get("reasoning_content")
        if reasoning and self._neutralise_tags(reasoning) not in written:
            return None
        *_, last = ["", *self._specials.findall(sampled)]
        if last and sampled.endswith(last) and last in written:
            end = written.rindex(last) + len(last)
        else:  # cut short, or ended in a way that the template does not know
            *_, end = [len(written.rstrip()), *(match.start() for match in self._specials.finditer(written))]
        return written[end:] + now[len(before) :]

    def parse(self, text: str) -> AIMessage:
        """A sampled reply as a message: content, tool calls, and the reasoning apart. Never raises.

        Reads `<tool_call>{"name", "arguments"}</tool_call>` (Hermes, Qwen) and, where the template speaks of it, a reply that is one
        JSON object with `name` and `parameters` (Llama 3). A malformed call goes to `invalid_tool_calls` with its text as a JSON string,
        which LangChain's lenient parser of streams cannot mistake for arguments. Linear in the text's length.
        """
        reasoning, content = self._split_reasoning(text)
        content = self._specials.sub("", content)
        bodies: list[str] = []
        if self._bare_calls and re.match(r'\s*\{\s*"', content):  # not a set: {1, 2}
            bodies, content = [content], ""
        elif not self._bare_calls:
            first, *turns = content.split(CALL)
            outside = [first]
            for turn in turns:
                body, _, after = turn.partition(END_CALL)
                bodies.append(body)
                outside.append(after)
            content = "".join(outside)
        calls: list[ToolCall] = []
        invalid: list[InvalidToolCall] = []
        origin = derive_seed(ascii(text))
        for index, body in enumerate(bodies):
            name = f"{derive_seed(origin, index):016x}"[-9:]  # nine letters and digits: some templates refuse anything else
            try:
                calls.append(_call(body, name))
            except (ValueError, RecursionError) as error:
                reason = str(error).partition("\n")[0][:200]
                invalid.append(InvalidToolCall(type="invalid_tool_call", name=None, args=json.dumps(body), id=name, error=reason))
        kwargs = {"reasoning_content": reasoning} if reasoning else {}
        return AIMessage(content.strip(), tool_calls=calls, invalid_tool_calls=invalid, additional_kwargs=kwargs)

    def _split_reasoning(self, text: str) -> tuple[str, str]:
        """The reasoning and what follows it; all is reasoning while it is not closed."""
        opened = self.opening.rstrip().endswith(THINK) or text.lstrip().startswith(THINK)
        before, closed, after = text.rpartition(END_THINK)
        if not closed and not opened:
            return "", text
        reasoning = self._specials.sub("", before if closed else text).strip()
        return reasoning.removeprefix(THINK).strip(), after if closed else ""


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every string in it changed."""
    match value:
        case str():
            return change(value)
        case dict():
            return {_each(key, change): _each(entry, change) for key, entry in value.items()}
        case list() | tuple():
            return [_each(entry, change) for entry in value]
    return value


def _call(body: str, call_id: str) -> ToolCall:
    """Raises ValueError or RecursionError for what is not exactly one call."""
    call = json.loads(body, object_pairs_hook=_object, parse_constant=_number, parse_float=_number)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        raise ValueError("not an object with a name")
    if call.get("type") == "function":  # Llama 3 often copies it from the schema
        del call["type"]
    arguments = call.get("arguments", call.get("parameters"))
    if not isinstance(arguments, dict) or len(call) != 2:
        raise ValueError("not an object of a name and arguments")
    _check(arguments, MAX_DEPTH)
    return ToolCall(type="tool_call", name=call["name"], args=arguments, id=call_id)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no JSON number")
    return number


def _check(value: Any, depth: int) -> None:
    """Raises ValueError for arguments nested too deeply, or with half a surrogate pair, which no encoder takes."""
    if depth == 0:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        value.encode()
    for entry in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check(entry, depth - 1)
