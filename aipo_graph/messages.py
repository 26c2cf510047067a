"""LangChain messages to tokens and back, as one chat template writes them."""

import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

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
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from aipo_graph import calls
from aipo_graph.errors import ConfigError, first_line
from aipo_graph.types import derive_seed

THINK, END_THINK = "<think>", "</think>"
TAGS = (THINK, END_THINK, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""What templates build assistant and tool turns with, whether or not each is a token of its own; a template's own marks come on top."""
THOUGHTS = (
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    (THINK, END_THINK),
)
"""What opens and closes reasoning; all but the last count where a template speaks of them."""
CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)\s+to=([^\s<]+)")
"""gpt-oss writes a call's recipient after its channel, its template before it."""
ANALYSIS = re.compile(
    r"<\|channel\|>\s*analysis\b[^<]*<\|message\|>(.*?)(?:<\|end\|>|<\|call\|>|<\|return\|>|(?=<\|start\|>)|\Z)", re.DOTALL
)
HEADER = re.compile(r"(?:<\|start\|>\s*assistant\s*)?<\|channel\|>[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>|<\|start\|>\s*assistant\b")
READ = frozenset({"text", "reasoning", "thinking", "tool_call", "tool_use", "invalid_tool_call"})
"""Content blocks that hold nothing but text, or what a message says elsewhere, too."""
DAY = datetime(2024, 7, 26)
DATE = DAY.strftime("%d %b %Y")
"""The day on which every prompt is written: a prompt must not depend on the clock, or no run could be repeated."""


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """Text of token ids, control tokens included, nothing tidied."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def read_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Raises ConfigError where the directory or hub name has no tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"policy.model: {str(path)!r} has no tokenizer that loads ({first_line(error)}); save one beside the model"
        ) from error
    if isinstance(tokenizer.chat_template, str):  # an editor's byte order mark would open every prompt
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
    return tokenizer


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
            text = str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=False, **settings(False)))
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


def settings(thinking: bool) -> dict[str, Any]:
    """What every chat template gets: whether to think, and the time, which templates would else take from the clock."""
    return {"enable_thinking": thinking, "date_string": DATE, "strftime_now": DAY.strftime}


def after_reasoning(text: str, before: str = "") -> str:
    """What of a reply stands after its reasoning, in any manner; nothing while a part of it, perhaps begun in ``before``, is not closed."""
    text = ANALYSIS.sub("", text)
    for opening, closing in THOUGHTS:
        _, closed, after = text.rpartition(closing)
        if opening in after or (not closed and before.rfind(opening) > before.rfind(closing)):
            return ""
        text = after
    return text


class Manner(NamedTuple):
    """What a template expects of a message with tool calls."""

    encoded: bool = False
    """The arguments as JSON text."""
    silent: bool = False
    """None for a text that is empty."""
    named: bool = False
    """Ids that hold the tool's name, as the only place where it is (Kimi K2)."""


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
        self._template = str(tokenizer.chat_template)
        self._harmony = "<|channel|>" in self._template and "<|message|>" in self._template
        self._thoughts = [pair for pair in THOUGHTS if pair[0] in self._template or pair[0] in specials or pair[0] == THINK]
        self._place = "reasoning_content"
        """Where the template looks for reasoning: a key of the message, or `content`, in blocks."""
        self._manner = Manner()
        self._calls: calls.Manner | None = None
        self._unread = ""
        """Why calls could not be read, if so."""
        self._noise = self._specials
        """What is no part of what a reply says."""
        question = [HumanMessage("?")]
        self.opening = self.render(question)[len(self.render(question, reply=False)) :]
        """What the template writes before a reply."""
        inside, closed, _ = self.opening.partition(THINK)[2].partition(END_THINK)
        self._unthought = inside if closed else ""
        """What stands there for reasoning that was not asked for: two line breaks in Qwen3's."""
        self._learn(set(specials))

    def decode(self, token_ids: Sequence[int]) -> str:
        return decode(self._tokenizer, token_ids)

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of the template's text; special tokens in it become their own."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def pieces(self, text: str, words: Sequence[tuple[str, int, int]]) -> list[tuple[tuple[int, ...], str, str | None]]:
        """The ids of the template's text as (ids, their text, whose words): a token counts as a word where all of it stands inside.

        ``words``: a helper's name, and where its words begin and end. Raises ConfigError for a tokenizer that does not say where its
        tokens stand.
        """
        try:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError:
            name = self._tokenizer.name_or_path or "the tokenizer"
            remedy = "use a model with tokenizer.json"
            raise ConfigError(f"{name} does not say where its tokens stand, which rollout.helpers needs: {remedy}") from None
        tokens: list[tuple[int, int, int, str | None]] = []
        start = 0  # some offsets leave a token's blank out: it begins where the last one ended
        for token, (_, reached) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            end = max(start, reached)
            whose = next((who for who, first, last in words if first <= start and first < end <= last), None)
            tokens.append((token, start, end, whose))
            start = end
        runs = (list(run) for _, run in groupby(tokens, key=itemgetter(3)))
        return [(tuple(token for token, *_ in run), text[run[0][1] : run[-1][2]], run[0][3]) for run in runs]

    def places(
        self, text: str, messages: Sequence[BaseMessage], heard: Sequence[int], write: Callable[[Sequence[BaseMessage]], str | None]
    ) -> list[tuple[int, int]] | None:
        """Where in ``text``, which ``write`` makes of the messages, the words of those numbered ``heard`` begin and end.

        None where the template writes them in a way of its own.
        """
        mark = "heard"
        while mark in text:
            mark += "x"
        marks = {index: f"{mark}{index:04}" for index in heard}
        frame = write([m.model_copy(update={"content": marks[i]}) if i in marks else m for i, m in enumerate(messages)])
        between = _between(frame or "", marks.values())
        if between is None or not text.startswith(between[0]):
            return None
        found, at = [], len(between[0])
        for index, after in zip(heard, between[1:], strict=True):
            said = [form for blanked in (self._neutralise_tags, self._neutralise) for form in [blanked(str(messages[index].text))]]
            forms = [f for each in said for f in (each, each.strip(), each.rstrip(), each.lstrip(), each.lstrip("\n"), each.strip("\n"))]
            forms += [json.dumps(form, ensure_ascii=False)[1:-1] for form in forms]
            end = next((at + len(form) for form in forms if text.startswith(form + after, at)), None)
            if end is None:
                return None
            found.append((at, end))
            at = end + len(after)
        return found if at == len(text) else None

    def cut(self, text: str, limit: int) -> str:
        """The text's first tokens."""
        ids = self.encode(text[: 64 * limit])
        return text if len(ids) <= limit and len(text) <= 64 * limit else self.decode(ids[:limit]).rstrip("\ufffd")

    def turn_of(
        self, messages: Sequence[BaseMessage], results: Sequence[ToolMessage], seen: str, sampled: str, tools: Sequence[Mapping[str, Any]]
    ) -> list[str] | None:
        """What the template writes before, between and after the results of a reply's calls, ``messages[-1]``; see `follow`.

        None where it writes them in a way of its own.
        """
        marks = [f"heard{i:04}" for i in range(len(results))]
        marked = [result.model_copy(update={"content": mark}) for result, mark in zip(results, marks, strict=True)]
        frame = self.follow([*messages, *marked], len(messages) - 1, seen, sampled, tools)
        if frame is None:  # a history would leave its reasoning out; here its exact tokens stay
            before, now = self.render(messages, tools, reply=False), self.render([*messages, *marked], tools)
            frame = before[self._end(before, sampled) :] + now[len(before) :] if now.startswith(before) else ""
        return _between(frame, marks)

    def closing(self, after: str) -> str:
        """The first mark in what the template writes after a tool's result: where the policy ends one that it writes itself."""
        found = re.search(f"{self._specials.pattern}|{calls.TAG}", after)
        return found.group() if found else next(filter(None, map(str.strip, after.splitlines())), "")

    def written(self, text: str, after: str, end: str) -> tuple[str, str]:
        """Of a result that the policy wrote, what it says, and what is left to write of ``after``, the template's text behind a result."""
        said, ended, over = text.partition(end)
        *_, last = ["", *self._specials.findall(text)]
        mark = end if ended else last if last and last in after else ""
        before, _, rest = after.partition(mark) if mark else ("", "", after)
        return self._specials.sub("", said).strip().removesuffix(before.strip()).rstrip(), rest.removeprefix(over)

    def _learn(self, specials: set[str]) -> None:
        """Finds out how the template writes calls, what it expects for that, and what else it puts around a reply."""
        for manner in (Manner(), Manner(silent=True), Manner(encoded=True), Manner(encoded=True, silent=True), Manner(named=True)):
            self._manner = manner
            try:
                self._calls = calls.learn(self._write, self._write((), calls.WORD), self._specials.pattern)
                break
            except ValueError as error:
                self._unread = self._unread or str(error)
        else:
            self._manner = Manner()
        marks = re.compile(f"{self._specials.pattern}|{calls.TAG}")
        made = [(calls.NAME, {calls.KEY: calls.WORD})] if self._calls else []
        try:
            plain = self._write((), calls.WORD)
            whole = self._write(made, "" if made else calls.WORD, result=True)
        except ValueError:
            return
        before, _, after = plain.partition(calls.WORD)
        frame = before.removeprefix(self.opening).strip()
        noise = [re.escape(text) for text in ([frame] if marks.search(frame) else []) + [m.group() for m in marks.finditer(after)]]
        self._noise = re.compile("|".join([*([HEADER.pattern] if self._harmony else []), *noise, self._specials.pattern]))
        self._learn_reasoning(made, plain, marks)
        own = set(re.findall(r"</?[\w|\uff5c:.\u2581-]+(?:[=>]|(?=\s))|\[/?[A-Z_]{3,}\]", whole))
        quote = self._calls.quote if self._calls else ""
        thoughts = {mark for pair in self._thoughts for mark in pair}
        self._neutralise_tags = blank(specials | set(TAGS) | own | thoughts | ({quote} if len(quote) > 1 else set()))[1]

    def _learn_reasoning(self, made: Sequence[calls.Call], plain: str, marks: re.Pattern[str]) -> None:
        """Finds out where the template looks for reasoning, and what it puts around it."""
        for place in ("reasoning_content", "thinking", "reasoning", "content"):
            self._place = place
            try:
                text = self._write(made, "" if made else calls.WORD, thought=calls.MORE)
            except ValueError:
                continue
            before, shown, after = text.partition(calls.MORE)
            if shown and "'type'" not in before and '"type"' not in before:
                opening, closing = [m.group() for m in marks.finditer(before)][-1:], marks.search(after)
                if opening and closing and opening[0] not in plain and closing.group() not in plain and not self._harmony:
                    self._thoughts.insert(0, (opening[0], closing.group()))
                return
        self._place = "reasoning_content"

    def _write(self, made: Sequence[calls.Call], text: str = "", *, thought: str = "", result: bool = False) -> str:
        """The template's text of a reply, and of what follows it. Raises ValueError for what it refuses."""
        shown = {"description": "?", "parameters": dict(calls.SCHEMA)}
        tools = [{"type": "function", "function": {"name": name, **shown}} for name in (calls.NAME, calls.OTHER)]
        given = [ToolCall(type="tool_call", name=name, args=args, id=f"probe{i:04}") for i, (name, args) in enumerate(made)]
        asked: list[BaseMessage] = [HumanMessage("?")]
        reply = AIMessage(text, tool_calls=given, additional_kwargs={"reasoning_content": thought} if thought else {})
        answers = [ToolMessage("!", tool_call_id=call["id"], name=call["name"]) for call in given] if result else []
        try:
            before = self._render(asked, tools, reply=False)
            after = self._render([*asked, reply, *answers], tools, reply=result)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        if any(str(args) in after for _, args in made if args):
            raise ValueError("it writes arguments as Python does")
        return re.sub(r"probe\d{4}", calls.ID, after.removeprefix(before))

    def render(self, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]] = (), *, reply: bool = True) -> str:
        """The template's text of the messages.

        Control tokens in what the messages say are replaced by blanks; in assistant and tool messages so are the tags of tool calls and
        reasoning, so that neither can pose as another turn. Raises ConfigError for messages that the template refuses.

        Args:
            tools: OpenAI function schemas.
            reply: end with the opening of an assistant turn.
        """
        if tools:
            self.check_tools()
        return self._render(messages, tools, reply=reply)

    def check_tools(self) -> None:
        """Raises ConfigError where the template writes no calls that could be read back: no tool would ever run."""
        if self._calls is None:
            raise ConfigError(
                f"the chat template of {self._tokenizer.name_or_path or 'the tokenizer'} writes no tool calls that can be read back "
                f"({self._unread}): use a model whose template knows tools, or write `tool_calls` in its chat_template.jinja"
            )

    def _render(self, messages: Sequence[BaseMessage], tools: Sequence[Mapping[str, Any]] = (), *, reply: bool = True) -> str:
        replies = [message for message in messages if isinstance(message, AIMessage)]
        made = [call for reply in replies for call in reply.tool_calls]
        ids = {call["id"] or "": f"functions.{call['name']}:{i}" for i, call in enumerate(made)} if self._manner.named else {}
        # The template has not written a call that could not be read, and some refuse a result without a call.
        unread = {call["id"] for reply in replies for call in reply.invalid_tool_calls}
        said = [HumanMessage(m.text) if isinstance(m, ToolMessage) and m.tool_call_id in unread else m for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                [self._plain(message, ids) for message in said],
                tools=[_each(dict(tool), self._neutralise) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=reply,
                **settings(self._thinking),
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            kinds = ", ".join(message.type for message in messages)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(f"the policy's chat template refuses these messages ({kinds}): {reason}; send what it knows") from error
        return str(text)

    def _plain(self, message: BaseMessage, ids: Mapping[str, str]) -> dict[str, Any]:
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
                call = self._neutralise_tags(ids.get(message.tool_call_id, message.tool_call_id))
                name = self._neutralise_tags(message.name or "")
                return {"role": "tool", "name": name, "tool_call_id": call, "content": self._neutralise_tags(text)}
            case AIMessage():
                return self._plain_reply(message, text, ids)
            case ChatMessage():
                return {"role": self._neutralise_tags(message.role), "content": self._neutralise_tags(text)}
        raise ConfigError(f"a {message.type} message has no place in the policy's chat template: send system, human, ai and tool messages")

    def _plain_reply(self, message: AIMessage, text: str, ids: Mapping[str, str]) -> dict[str, Any]:
        content = self._neutralise_tags("\n".join(filter(None, [text, *(str(call["args"]) for call in message.invalid_tool_calls)])))
        plain: dict[str, Any] = {"role": "assistant", "content": content or (None if self._manner.silent and message.tool_calls else "")}
        # Told that there was none, Qwen3's template leaves the empty part out of the next prompt, and every tool call opens a new row.
        if reasoning := message.additional_kwargs.get("reasoning_content") or self._unthought:
            thought = self._neutralise_tags(str(reasoning))
            if self._place == "content":
                plain["content"] = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": content}]
            elif not (self._harmony and content and message.tool_calls):  # gpt-oss's template refuses both
                plain[self._place] = thought
        if message.tool_calls:
            plain["tool_calls"] = [
                {
                    "id": self._neutralise_tags(ids.get(call["id"] or "", call["id"] or "")),
                    "type": "function",
                    "function": self._plain_call(call),
                }
                for call in message.tool_calls
            ]
        return plain

    def _plain_call(self, call: ToolCall) -> dict[str, Any]:
        function = _each({"name": call["name"], "arguments": call["args"]}, self._neutralise_tags)
        if self._manner.encoded:
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return function

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
        return written[self._end(written, sampled) :] + now[len(before) :]

    def _end(self, written: str, sampled: str) -> int:
        """Where in what the template writes of a reply the sampled text ends."""
        *_, last = ["", *self._specials.findall(sampled)]
        if last and sampled.endswith(last) and last in written:
            return written.rindex(last) + len(last)
        # cut short, or ended in a way that the template does not know
        *_, end = [len(written.rstrip()), *(match.start() for match in self._specials.finditer(written))]
        return end

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]] = (), *, seed: int = 0) -> AIMessage:
        """A sampled reply as a message: content, tool calls, and the reasoning apart. Never raises; linear in the text's length.

        Calls are read as the template writes them. A malformed one goes to `invalid_tool_calls` with its text as a JSON string, which
        LangChain's lenient parser of streams cannot mistake for arguments; so does one more than the template can write.

        Args:
            tools: OpenAI function schemas, which give the types of arguments that are written as bare text.
            seed: of the turn: equal calls in two turns get different ids.
        """
        reasoning, content = self._split_reasoning(text)
        read: list[calls.Call | calls.Fault] = []
        if self._calls is not None:
            functions = [tool.get("function") or tool for tool in tools]
            content, read = self._calls.read(content, {str(f.get("name")): f.get("parameters") or {} for f in functions})
        valid: list[ToolCall] = []
        invalid: list[InvalidToolCall] = []
        origin = derive_seed(seed, ascii(text))
        for index, call in enumerate(read):
            name = f"{derive_seed(origin, index):016x}"[-9:]  # nine letters and digits: some templates refuse anything else
            if valid and self._calls and not self._calls.several and not isinstance(call, calls.Fault):
                call = calls.Fault(json.dumps({"name": call[0], "arguments": call[1]}), "the chat template knows one call per reply")
            if isinstance(call, calls.Fault):
                args = json.dumps(self._noise.sub("", call.text))
                invalid.append(InvalidToolCall(type="invalid_tool_call", name=None, args=args, id=name, error=call.reason))
            else:
                valid.append(ToolCall(type="tool_call", name=call[0], args=call[1], id=name))
        kwargs = {"reasoning_content": reasoning} if reasoning else {}
        content = self._noise.sub("", content).strip()
        return AIMessage(content, tool_calls=valid, invalid_tool_calls=invalid, additional_kwargs=kwargs)

    def said(self, text: str, *, calls: bool = False) -> str:
        """What a reply says of which `after_reasoning` took the reasoning off: its content without control tokens.

        Args:
            calls: of one that says nothing else, the arguments of its first call, as JSON.
        """
        closing = next((closing for opening, closing in self._thoughts if self.opening.rstrip().endswith(opening)), "")
        message = self.parse(closing + text)
        made = [json.dumps(call["args"], ensure_ascii=False) for call in message.tool_calls if calls]
        return str(message.content) or next(iter(made), "")

    def _split_reasoning(self, text: str) -> tuple[str, str]:
        """The reasoning and what follows it; all is reasoning while it is not closed."""
        if self._harmony:
            text = CHANNEL.sub(r" to=\2<|channel|>commentary", text)
            reasoning = "\n".join(self._specials.sub("", found).strip() for found in ANALYSIS.findall(text))
            return reasoning.strip(), ANALYSIS.sub("", text)
        for opening, closing in self._thoughts:
            opened = self.opening.rstrip().endswith(opening) or text.lstrip().startswith(opening)
            before, closed, after = text.rpartition(closing)
            if closed or opened:
                inside = (before if closed else text).strip().removeprefix(opening)
                return self._specials.sub("", inside).strip(), after if closed else ""
        return "", text


def _between(frame: str, marks: Collection[str]) -> list[str] | None:
    """What stands before, between and after the marks; None unless each stands there once."""
    found = re.split("|".join(marks), frame)
    return found if len(found) == len(marks) + 1 else None


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
