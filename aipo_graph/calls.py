"""Tool calls as one chat template writes them: learned from what it makes of calls that are known, then read out of replies.

There are as many manners as families of models, and each says its own in its template. A manner is marks around four shapes: one JSON
value with the name in it, a name and a JSON object, a name and arguments as in Python, and a name and a mark before and after each value.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal

from aipo_graph.load import STRICT, number

Call = tuple[str, dict[str, Any]]
Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each tool's arguments, by the tool's name."""
NAME, KEY, WORD = "probe_tool", "probe_key", "probeword"
OTHER, NEXT, MORE = "other_tool", "next_key", "moreword"
NUMBER = 73519
ID = "probe0000"
SCHEMA = {"type": "object", "properties": {KEY: {"type": ["string", "integer"]}, NEXT: {"type": "string"}}}
TAG = r"</?[^\s<>=\"'()]+[=>]?|\[/?[A-Z_]{2,}\]|```\w*"
"""What looks like a mark although it may be no token of its own."""
WORDS = r"[^\s<>{}\[\]()|\"'`=,:;]+"
"""A tool's name."""
LONG = 16
"""Calls of a reply in whose values marks of calls may stand: each is read twice."""
NEXT_JSON = re.compile(r"[\s,;]*(?=[{\[])")


@dataclass(frozen=True)
class Fault:
    """A call that cannot be read: its text, and why."""

    text: str
    reason: str


class _Other(ValueError):
    """JSON that is no call."""


@dataclass(frozen=True)
class Manner:
    """How a template writes calls."""

    shape: Literal["json", "object", "literal", "pairs"]
    start: re.Pattern[str]
    """What opens a call, or a list of them."""
    weak: bool
    """Nothing but the shape itself says that it is a call, so only a reply's beginning can be one."""
    close: re.Pattern[str]
    """What may stand after a call."""
    last: str
    """The last mark of that, if any."""
    name: re.Pattern[str]
    """The tool's name and what stands between it and the arguments; with the name inside, nothing."""
    keys: tuple[str | None, str] = ("name", "arguments")
    """Where a JSON value has the name (None: it is the key) and the arguments."""
    pair: re.Pattern[str] | None = None
    """What opens one value, with its key."""
    stop: re.Pattern[str] | None = None
    quote: str = ""
    assign: str = "="
    closing: str = ")"
    several: bool = True
    """Whether the template writes more than one call in a reply."""

    def read(self, text: str, schemas: Schemas) -> tuple[str, list[Call | Fault]]:
        """The text without its calls, and these. Never raises; linear in the text's length."""
        outside: list[str] = []
        found: list[Call | Fault] = []
        starts = list(self.start.finditer(text))
        ends = [*(match.start() for match in starts), len(text)]
        at, again = 0, LONG
        for match, end in zip(starts, ends[1:], strict=True):
            if match.start() < at:
                continue  # inside the value of a call before it
            outside.append(text[at : match.start()])
            try:
                try:
                    calls, length = self._body(text[match.end() : end], schemas)
                except (ValueError, RecursionError):
                    if end == len(text) or again == 0:
                        raise
                    again -= 1
                    calls, length = self._body(text[match.end() :], schemas, whole=False)
                found += calls
                at = match.end() + length
            except (ValueError, RecursionError) as error:
                if self.weak and isinstance(error, _Other):
                    outside.append(text[match.start() : end])
                    at = end
                    continue
                # The text goes on after the last mark of a call that cannot be read, or nowhere.
                before, closed, _ = text[match.end() : end].partition(self.last) if self.last else (text[match.end() : end], "", "")
                found.append(Fault(before, str(error).partition("\n")[0][:200]))
                at = match.end() + len(before) + len(closed)
        outside.append(text[at:])
        return "".join(outside), found

    def _body(self, body: str, schemas: Schemas, whole: bool = True) -> tuple[list[Call], int]:
        """The calls that a text begins with, and where it goes on. Raises ValueError or RecursionError.

        Args:
            whole: it holds no further calls, so that nothing of these may be left.
        """
        calls: list[Call] = []
        at = 0
        if self.shape == "json" or (self.shape == "object" and body[:1] in ("{", "[")):  # older models of a family write all in JSON
            while following := NEXT_JSON.match(body, at):
                value, at = decode(body, following.end())
                calls += [self._entry(entry) for entry in (value if isinstance(value, list) else [value])]
        else:
            while (named := self.name.match(body, at)) and (not calls or self.shape == "literal"):
                name, at = named["name"], named.end()
                arguments, at = self._values(body, at, schemas.get(name, {}))
                calls.append((name, arguments))
        if not calls:
            raise ValueError("no call")
        for _, arguments in calls:
            check(arguments)
        end = self.close.match(body, at)
        stop = end.end() if end else at
        if whole and self.last and self.last in body[stop:]:
            raise ValueError("text after the arguments")
        return calls, stop

    def _values(self, body: str, at: int, schema: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """The arguments that follow a name, and where they end."""
        match self.shape:
            case "literal":
                return Literals(body, self.quote, self.assign).arguments(at, self.closing, schema)
            case "pairs":
                return self._pairs(body, at, schema)
        value, at = decode(body, at)
        return _arguments(value), at

    def _entry(self, value: Any) -> Call:
        name_key, arguments_key = self.keys
        if isinstance(value, dict) and name_key is None and len(value) == 1:
            ((name, arguments),) = value.items()
            return name, _arguments(arguments)
        if isinstance(value, dict) and isinstance(value.get("function"), dict):
            value = value["function"]
        if not isinstance(value, dict) or name_key is None or name_key not in value:
            raise _Other("not an object with a name")
        given = [key for key in dict.fromkeys((arguments_key, "arguments", "parameters")) if key in value]
        extra = value.keys() - {name_key, *given, "type", "id", "index", "tool_call_id"}
        if not isinstance(value[name_key], str) or not value[name_key] or len(given) != 1 or extra:
            raise ValueError("not an object of a name and arguments")
        return value[name_key], _arguments(value[given[0]])

    def _pairs(self, body: str, at: int, schema: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        assert self.pair
        assert self.stop
        found: dict[str, Any] = {}
        while pair := self.pair.match(body, at):
            stop = self.stop.search(body, pair.end())
            if stop is None or pair["key"] in found:
                raise ValueError("a value without end" if stop is None else "a key twice")
            text = body[pair.end() : stop.start()]
            found[pair["key"]] = coerce(text, schema, pair["key"], quoted=self.quote == '"')
            at = stop.end()
        if self.last and not self.close.match(body, at).group().strip():  # type: ignore[union-attr] # it matches nothing, too
            raise ValueError("not closed, or not a list of arguments")
        return found, at


def _arguments(value: Any) -> dict[str, Any]:
    """Raises ValueError for anything but an object; one that is encoded twice is one."""
    if isinstance(value, str):
        value = decode(value)[0]
    if value is not None and not isinstance(value, dict):
        raise ValueError("the arguments are no object")
    return value or {}


def learn(write: Callable[[Sequence[Call]], str], plain: str, specials: str) -> Manner:
    """The manner in which ``write`` writes calls. Raises ValueError where they cannot be read back.

    Args:
        write: the template's text of a reply with these calls and without text; ids are `ID`.
        plain: the same of a reply of text alone.
        specials: a pattern of control tokens.
    """
    marks = re.compile(f"(?:{specials})|{TAG}")
    one = _inside(write([(NAME, {KEY: WORD})]), plain, marks)
    try:
        two = write([(NAME, {KEY: WORD}), (OTHER, {NEXT: MORE})])
    except ValueError:
        two = ""
    manner = _json(one, two, marks) or _named(one, two, write, plain, marks)
    schemas = {NAME: SCHEMA, OTHER: SCHEMA}
    for call in ((NAME, {KEY: WORD}), (NAME, {KEY: NUMBER})):
        text = _inside(write([call]), plain, marks)
        if manner.read(text, schemas)[1] != [call]:
            raise ValueError(f"{' '.join(text.split())[:100]!r} cannot be read back")
    both: list[Call | Fault] = [(NAME, {KEY: WORD}), (OTHER, {NEXT: MORE})]
    return replace(manner, several=bool(two) and manner.read(_inside(two, plain, marks), schemas)[1] == both)


def _json(one: str, two: str, marks: re.Pattern[str]) -> Manner | None:
    """One JSON value holds name and arguments."""
    at = one.find(NAME)
    for start, value, end in _values(one, at):
        keys = _keys(value)
        if end <= at or keys is None:
            continue
        head = one[:start]
        second = two.find(OTHER)
        begins = max(two.rfind("{", 0, second), 0)
        lead = _shared_end(head, two[two.find(WORD) + 1 : begins], marks)
        return _manner("json", head, lead, one[end:], "", marks, ahead=r"(?=\{\s*\"|\[\s*\{)", keys=keys)
    return None


def _values(text: str, stop: int) -> Iterator[tuple[int, Any, int]]:
    """The JSON lists and objects that begin before a place: where, what, and where they end."""
    for opening in re.finditer(r"[\[{]", text[: max(stop, 0)]):
        with suppress(ValueError):
            yield opening.start(), *decode(text, opening.start())


def _keys(value: Any) -> tuple[str | None, str] | None:
    """The keys of name and arguments in a decoded call."""
    if isinstance(value, list):
        return _keys(value[0]) if value else None
    if not isinstance(value, dict):
        return None
    if value.get(NAME) == {KEY: WORD}:
        return None, ""
    names = [key for key, entry in value.items() if entry == NAME]
    arguments = [key for key, entry in value.items() if entry == {KEY: WORD} or entry == json.dumps({KEY: WORD})]
    if names and arguments:
        return names[0], arguments[0]
    return next((found for entry in value.values() if isinstance(entry, dict) and (found := _keys(entry))), None)


def _named(one: str, two: str, write: Callable[[Sequence[Call]], str], plain: str, marks: re.Pattern[str]) -> Manner:
    """The name stands before the arguments."""
    head, named, rest = one.partition(NAME)
    if not named or WORD not in rest:
        raise ValueError(f"{' '.join(one.split())[:100]!r} does not hold the call's name and arguments")
    between = two[two.find(WORD) + 1 : max(two.find(OTHER), 0)]
    lead = _shared_end(head, between, marks)
    for start, value, end in _values(rest, rest.find(WORD)):
        if value == {KEY: WORD}:
            return _manner("object", head, lead, rest[end:], rest[:start], marks, ahead=r"(?=\{)")
    before, after = rest[: rest.find(KEY)], rest[rest.find(WORD) + len(WORD) :]
    between = rest[rest.find(KEY) + len(KEY) : rest.find(WORD)]
    if KEY in rest and before.strip() in ("(", "{"):
        closing = {"(": ")", "{": "}"}[before.strip()]
        quote = between.strip()[1:].strip()
        tail = after.removeprefix(quote).partition(closing)[2]
        assign = between.strip()[:1]
        ahead = rf"(?=\s*[\w.-]+\s*{re.escape(assign)}|\s*{re.escape(closing)})"
        return _manner("literal", head, lead, tail, before, marks, ahead=ahead, quote=quote, assign=assign, closing=closing)
    if KEY not in rest[: rest.find(WORD)]:
        raise ValueError(f"{' '.join(one.split())[:100]!r} does not hold the argument's name")
    return _paired(head, lead, rest, write, plain, marks)


def _paired(head: str, lead: str, rest: str, write: Callable[[Sequence[Call]], str], plain: str, marks: re.Pattern[str]) -> Manner:
    """Each argument has marks of its own."""

    def parts(arguments: dict[str, Any], *at: str) -> list[str]:
        text = _inside(write([(NAME, arguments)]), plain, marks).partition(NAME)[2]
        places = [text.find(word) for word in at]
        ends = [place + len(word) for place, word in zip(places, at, strict=True)]
        return [text[end:place] for end, place in zip([0, *ends], [*places, len(text)], strict=True)]

    first, middle, between, _, tail = parts({KEY: WORD, NEXT: MORE}, KEY, WORD, NEXT, MORE)
    opening = _shared_end(first, between, marks)
    ending = between.removesuffix(opening)
    middle_of_number = parts({KEY: NUMBER}, KEY, str(NUMBER))[1]
    quote = '"' if middle.endswith('"') and ending.startswith('"') and not middle_of_number.endswith('"') else ""
    middle, ending = middle.removesuffix(quote), ending.removeprefix(quote)
    tail = tail.removeprefix(quote).removeprefix(ending)
    written = _tight(middle)
    if middle != middle_of_number:  # it tells the value's type
        same = "".join(_common(_tokens(middle, marks), _tokens(middle_of_number, marks)))
        written = rf"{_tight(same)}[^<>\n]{{0,60}}?{_tight(_shared_end(middle, middle_of_number, marks))}"
    pair = re.compile(rf"\s*{_loose(opening)}(?P<key>[^<>\"'\n/][^<>\"'\n]{{0,199}}?){written}")
    until = re.match(rf"[\s\S]*?(?:{marks.pattern})|[\s\S]*", tail)
    goes_on = [_loose(text) for text in (opening, until.group() if until else "") if text.strip()]
    stop = re.compile(rf"{_tight(ending)}(?=\s*(?:{'|'.join(goes_on)}))" if goes_on else rf"{_tight(ending)}")
    before = first.removesuffix(opening)
    ahead = rf"(?=\s*(?:{'|'.join(goes_on)}))"
    return _manner("pairs", head, lead, tail, before, marks, ahead=ahead, quote=quote, pair=pair, stop=stop)


def _manner(
    shape: Literal["json", "object", "literal", "pairs"],
    head: str,
    lead: str,
    tail: str,
    between: str,
    marks: re.Pattern[str],
    *,
    ahead: str,
    **fields: Any,
) -> Manner:
    """Puts the patterns together.

    Args:
        head: all that stands before the first call, of which ``lead`` opens each.
        between: what stands between the name and the arguments.
        ahead: a pattern of how arguments begin.
    """
    lead = lead if lead.strip() else head
    outer = head.removesuffix(lead)
    prefix = ""
    if lead.endswith("functions.") and marks.search(lead):  # Kimi K2 may leave it out
        lead, prefix = lead.removesuffix("functions."), r"(?:functions\.)?"
    start = _loose(lead)
    middle = rf"\s*{_loose(between)}" if between.strip() or "\n" not in between else r"[ \t]*\n\s*"
    if found := [match.group() for match in marks.finditer(between)]:
        middle = rf"(?:{middle}|[^\n{{]{{0,120}}?{re.escape(found[-1])}\s*)"
    name = rf"{prefix}(?P<name>{WORDS}){middle}" if shape != "json" else ""
    if shape == "literal":
        name = rf"[\s,;]*\[?\s*{name}"
    marked = re.search(rf"{marks.pattern}|<\w|\w=\w", lead)
    if not marked:
        start += f"(?={name.replace('(?P<name>', '(?:')}{ahead})" if name else ahead
    weak = not marked and not re.search(r"\w", lead)
    if weak:
        start = rf"(?:\A(?:\s|{marks.pattern})*?|(?:{marks.pattern.removesuffix(f'|{TAG}')})\s*){start}"
    elif marked:
        opened = list(marks.finditer(lead))
        first = lead[: opened[-1].start()] if len(opened) > 1 else ""
        start = _loose(lead[len(first) :])
        sections = [_loose(text) for text in (outer, first) if marks.search(text)]
        start = "|".join(["".join(f"(?:{section})?" for section in sections) + start, *sections])
    elif outer.strip():
        start = rf"(?:{_loose(outer)})?{start}"
    pieces = [piece for part in tail.split() for piece in re.split(f"({marks.pattern})", part) if piece]
    last = next((piece for piece in reversed(pieces) if marks.fullmatch(piece)), "")
    return Manner(
        shape,
        start=re.compile(start),
        weak=weak,
        close=re.compile("".join(rf"(?:\s*{_loose(piece, '')})?" for piece in pieces)),
        last=last,
        name=re.compile(name),
        **fields,
    )


def _inside(text: str, plain: str, marks: re.Pattern[str]) -> str:
    """What a reply's rendering has of its own, without what every reply has before and after it."""
    start = len("".join(_common(_tokens(text, marks), _tokens(plain, marks))))
    return text[start:].removesuffix(_shared_end(text[start:], plain[start:], marks))


def _shared_end(one: str, two: str, marks: re.Pattern[str]) -> str:
    """The tokens that both end with."""
    return "".join(_common(_tokens(one, marks)[::-1], _tokens(two, marks)[::-1])[::-1])


def _common(tokens: Sequence[str], others: Sequence[str]) -> list[str]:
    """The tokens that both begin with."""
    return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, others, strict=False))]


def _tokens(text: str, marks: re.Pattern[str]) -> list[str]:
    return re.findall(rf"{marks.pattern}|\w+|[\s\S]", text)


def _loose(text: str, after: str = r"\s*") -> str:
    """A pattern of the text in which blanks may be any, and the id too."""
    words = r"\s*".join(re.escape(word).replace(ID, r"[\w.:-]*") for word in text.replace("><", "> <").split())
    return words + after if words else ""


def _tight(text: str) -> str:
    """A pattern of the text whose line breaks at either end may be missing, but are no part of a value."""
    return "".join((r"\n?" if text.startswith("\n") else "", _loose(text, ""), r"\n?" if text.endswith("\n") and text.strip() else ""))


# --- arguments: JSON, Python's literals, and text whose type a tool's schema knows. Nothing is evaluated.

MAX_DEPTH = 32
"""Nesting of a tool call's arguments."""
CLOSING = {"[": "]", "(": ")", "{": "}"}
CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
NUMERAL = re.compile(r"[+-]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
KEYS = r"[\w.$-]+(?: [\w.$-]+){0,15}"
"""A key without quotes."""
TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
}


TOKEN = (
    r"(?P<quote>\"\"\"|'''|\"|')(?P<body>(?:\\[\s\S]|(?!(?P=quote))[^\\])*+)(?P=quote)"
    rf"|(?P<key>{KEYS})(?=\s*:)|(?P<opening>[\[({{])|(?:,\s*)?(?P<closing>[\])}}])|(?P<sign>[,:])|(?P<bare>[^\s,\[\](){{}}:=\"'<>]+)"
)
"""Of a literal; a comma before a closing bracket is none."""


def decode(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value at a place, and where it ends. Raises ValueError, of a key twice and of a number that is not finite, too."""
    return STRICT.raw_decode(text, re.compile(r"\s*").match(text, at).end())  # type: ignore[union-attr] # blanks may be none


def check(value: Any, depth: int = MAX_DEPTH) -> None:
    """Raises ValueError for arguments nested too deeply, or with half a surrogate pair, which no encoder takes."""
    if depth == 0:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        value.encode()
    for entry in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        check(entry, depth - 1)


def coerce(text: str, schema: Mapping[str, Any], key: str, *, quoted: bool = False) -> Any:
    """The value of a text of which only the tool's schema may know the type; the text itself where it is of none of the types.

    >>> coerce("[1, 'a']", {"properties": {"x": {"type": "array"}}}, "x"), coerce("7", {"properties": {"x": {"type": "string"}}}, "x")
    ([1, 'a'], '7')

    Args:
        schema: of the tool's arguments, of which ``key`` is one.
        quoted: strings are quoted, so that a text that is no value is one by mistake.
    """
    types = types_of(schema, key)
    if types == {"string"} and not quoted:
        return text
    stripped = text.strip()
    try:
        try:
            value, end = decode(stripped)
        except (ValueError, RecursionError):
            value, end = Literals(stripped).value()
    except ValueError:
        value, end = text, len(stripped)
    value = value if end == len(stripped) else text
    if isinstance(value, float) and value.is_integer() and "integer" in types and "number" not in types:
        value = int(value)
    if not types or quoted or _fits(value, types):
        return value if quoted or not isinstance(value, str) else text
    return text


def types_of(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """The JSON types that a schema allows for one argument; none where it does not say."""
    properties = schema.get("properties")
    return frozenset(_types(properties.get(key), schema, 8) if isinstance(properties, Mapping) else ())


def _types(schema: Any, root: Mapping[str, Any], depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or depth == 0:
        return set()
    if isinstance(ref := schema.get("$ref"), str):
        found: Any = root
        for part in ref.removeprefix("#/").split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        return _types(found, root, depth - 1)
    declared = schema.get("type")
    types = {declared} if isinstance(declared, str) else set(declared) if isinstance(declared, list) else set()
    values = [*(schema.get("enum") or ()), *([schema["const"]] if "const" in schema else [])]
    if not types:
        types = {name for value in values for name, kinds in TYPES.items() if type(value) in kinds}
    for choice in (*schema.get("anyOf", ()), *schema.get("oneOf", ()), *schema.get("allOf", ())):
        types |= _types(choice, root, depth - 1)
    return types | ({"null"} if schema.get("nullable") else set())


def _fits(value: Any, types: frozenset[str]) -> bool:
    return any(type(value) in TYPES.get(name, ()) for name in types)


class Literals:
    """Reads values as JSON and Python write them, and strings between marks of a template's own.

    Args:
        quote: such a mark.
        assign: what stands between an argument's name and its value.
    """

    def __init__(self, text: str, quote: str = "", assign: str = "=") -> None:
        self._text = text
        self._key = re.compile(rf"\s*([\"']?)({KEYS})\1\s*{re.escape(assign)}(?!=)")
        mark = re.escape(quote)
        own = rf"{mark}(?P<plain>[\s\S]*?){mark}|" if quote and quote not in "\"'" else ""
        self._token = re.compile(rf"\s*(?:{own}{TOKEN})")

    def arguments(self, at: int, closing: str, schema: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Arguments up to the closing bracket, those without a name as the schema orders them, and where that ends. Raises ValueError."""
        found: dict[str, Any] = {}
        order = list(schema.get("properties") or ())
        end = re.compile(rf"\s*{re.escape(closing)}")
        while not (ended := end.match(self._text, at)):
            named = self._key.match(self._text, at)
            if named is None and len(found) >= len(order):
                raise ValueError("an argument without a name")
            key, start = (named[2], named.end()) if named else (order[len(found)], at)
            if key in found:
                raise ValueError("a key stands twice")
            found[key], at = self._argument(start, closing, schema, key)
            if comma := re.compile(r"\s*,").match(self._text, at):
                at = comma.end()
            elif not end.match(self._text, at):
                raise ValueError(f"{self._text[at : at + 20]!r} after a value")
        return found, ended.end()

    def _argument(self, at: int, closing: str, schema: Mapping[str, Any], key: str) -> tuple[Any, int]:
        """A value; where none is, the text up to the next comma, for templates that write strings without quotes."""
        types = types_of(schema, key)
        with suppress(ValueError):
            value, end = self.value(at)
            if re.compile(rf"\s*(?:,|{re.escape(closing)})").match(self._text, end):
                bare = not isinstance(value, str) and bool(types) and not _fits(value, types)
                return (coerce(self._text[at:end].strip(), schema, key) if bare else value), end
        depth = 0
        for bracket in re.compile(r"[\[\](){},]").finditer(self._text, at):
            if depth == 0 and bracket.group() in (",", closing):
                text = self._text[at : bracket.start()].strip()
                if (not text and "string" not in types) or text[:1] in ('"', "'", "[", "{"):
                    break
                return coerce(text, schema, key), bracket.start()
            depth += (bracket.group() in "[({") - (bracket.group() in "])}")
        raise ValueError(f"the value of {key!r} cannot be read")

    def value(self, at: int = 0) -> tuple[Any, int]:
        """The value at a place, and where it ends. Raises ValueError."""
        written: list[str] = []  # as JSON
        closings: list[str] = []
        while closings or not written:
            token = self._token.match(self._text, at)
            kind = str(token.lastgroup) if token else ""
            closed = closings.pop() if kind == "closing" and closings else ""
            if (
                token is None
                or len(closings) >= MAX_DEPTH
                or (kind == "closing" and token[kind] != closed)
                or (kind == "key" and not closings)
            ):
                raise ValueError(f"{self._text[at : at + 20]!r} is no value")
            if kind == "opening":
                closings.append(CLOSING[token[kind]])
            written.append(_as_json(kind, token[kind]))
            at = token.end()
        return STRICT.decode(" ".join(written)), at


def _as_json(kind: str, text: str) -> str:
    """A token of a literal as JSON writes it. Raises ValueError for a string with half a surrogate pair, and for a bare word."""
    match kind:
        case "opening" | "closing":
            return text.replace("(", "[").replace(")", "]")
        case "sign":
            return text
        case "key" | "plain":
            return json.dumps(text)
        case "body":
            text = re.sub(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[\s\S])", _unescaped, text)
            return json.dumps(text.encode("utf-16", "surrogatepass").decode("utf-16"))
    if text.lower() in CONSTANTS:
        return json.dumps(CONSTANTS[text.lower()])
    if not NUMERAL.fullmatch(text):
        raise ValueError(f"{text[:20]!r} is no value")
    return json.dumps(int(text) if re.fullmatch(r"[+-]?[\d_]+", text) else number(text))


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    return chr(int(code[1:], 16)) if len(code) > 1 else ESCAPES.get(code, code if code in "\\\"'/" else match.group())
