"""Values that a model wrote: JSON, Python's literals, and text whose type a tool's schema knows. Nothing is evaluated."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 32
"""Nesting of a tool call's arguments."""
CONSTANTS = {"true": True, "false": False, "null": None, "none": None}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
NUMBER = re.compile(r"[+-]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
WORDS = r"[\w.$-]+(?: [\w.$-]+)*"
"""A key without quotes."""
BARE = re.compile(r"[^\s,\[\](){}:=\"'<>]+")
TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
}


def decode(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value at a place, and where it ends. Raises ValueError, of a key twice and of a number that is not finite, too."""
    return DECODER.raw_decode(text, re.compile(r"\s*").match(text, at).end())  # type: ignore[union-attr] # blanks may be none


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no JSON number")
    return number


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_number, parse_float=_number)


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
    value: Any = text
    try:
        value, end = decode(stripped)
        value = value if end == len(stripped) else text
    except (ValueError, RecursionError):
        try:
            value, end = Literals(stripped).value(0, MAX_DEPTH)
            value = value if end == len(stripped) else text
        except ValueError:
            value = text
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
        self._quotes = sorted({'"""', "'''", '"', "'", quote} - {""}, key=len, reverse=True)
        self._key = re.compile(rf"\s*([\"']?)({WORDS})\1\s*{re.escape(assign)}(?!=)")

    def arguments(self, at: int, closing: str, schema: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Arguments up to the closing bracket, those without a name as the schema orders them, and where that ends. Raises ValueError."""
        found: dict[str, Any] = {}
        order = list(schema.get("properties") or ())
        at = self._blank(at)
        while not self._text.startswith(closing, at):
            named = self._key.match(self._text, at)
            if named is None and len(found) >= len(order):
                raise ValueError("an argument without a name")
            key, start = (named[2], named.end()) if named else (order[len(found)], at)
            if key in found:
                raise ValueError("a key stands twice")
            found[key], at = self._argument(start, closing, schema, key)
            at = self._comma(at, closing)
        return found, at + len(closing)

    def _argument(self, at: int, closing: str, schema: Mapping[str, Any], key: str) -> tuple[Any, int]:
        """A value; where none is, the text up to the next comma, for templates that write strings without quotes."""
        types = types_of(schema, key)
        try:
            value, end = self.value(at, MAX_DEPTH)
            after = self._blank(end)
            if self._text.startswith((",", closing), after):
                bare = not isinstance(value, str) and bool(types) and not _fits(value, types)
                return (coerce(self._text[at:end].strip(), schema, key) if bare else value), end
        except ValueError:
            pass
        depth = 0
        for bracket in re.compile(r"[\[\](){},]").finditer(self._text, at):
            if depth == 0 and bracket.group() in (",", closing):
                text = self._text[at : bracket.start()].strip()
                if (not text and "string" not in types) or text[:1] in ('"', "'", "[", "{"):
                    break
                return coerce(text, schema, key), bracket.start()
            depth += (bracket.group() in "[({") - (bracket.group() in "])}")
        raise ValueError(f"the value of {key!r} cannot be read")

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        """The value at a place, and where it ends. Raises ValueError."""
        if depth == 0:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        at = self._blank(at)
        for quote in self._quotes:
            if self._text.startswith(quote, at):
                return self._string(at + len(quote), quote)
        match self._text[at : at + 1]:
            case "[":
                return self._list(at + 1, "]", depth)
            case "(":
                return self._list(at + 1, ")", depth)
            case "{":
                return self._dict(at + 1, depth)
        word = BARE.match(self._text, at)
        if word and word.group().lower() in CONSTANTS:
            return CONSTANTS[word.group().lower()], word.end()
        if word and NUMBER.fullmatch(word.group()):
            digits = word.group()
            return int(digits) if re.fullmatch(r"[+-]?[\d_]+", digits) else _number(digits), word.end()
        raise ValueError(f"{self._text[at : at + 20]!r} is no value")

    def _string(self, at: int, quote: str) -> tuple[str, int]:
        if quote[0] not in "\"'":
            end = self._text.find(quote, at)
            if end < 0:
                raise ValueError("a string without end")
            return self._text[at:end], end + len(quote)
        ending = re.compile(rf"[^\\{quote[0]}]*(?:(?:\\[\s\S]|(?!{quote}){quote[0]})[^\\{quote[0]}]*)*{quote}").match(self._text, at)
        if ending is None:
            raise ValueError("a string without end")
        text = self._text[at : ending.end() - len(quote)]
        text = re.sub(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[\s\S])", _unescaped, text)
        return text.encode("utf-16", "surrogatepass").decode("utf-16"), ending.end()

    def _list(self, at: int, closing: str, depth: int) -> tuple[list[Any], int]:
        found: list[Any] = []
        at = self._blank(at)
        while not self._text.startswith(closing, at):
            value, at = self.value(at, depth - 1)
            found.append(value)
            at = self._comma(at, closing)
        return found, at + 1

    def _dict(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        at = self._blank(at)
        while not self._text.startswith("}", at):
            word = re.compile(rf"{WORDS}(?=\s*:)").match(self._text, at)
            key, at = (word.group(), word.end()) if word else self.value(at, depth - 1)
            at = self._blank(at)
            if not isinstance(key, str) or not self._text.startswith(":", at) or key in found:
                raise ValueError("not an object")
            found[key], at = self.value(at + 1, depth - 1)
            at = self._comma(at, "}")
        return found, at + 1

    def _blank(self, at: int) -> int:
        return re.compile(r"\s*").match(self._text, at).end()  # type: ignore[union-attr] # blanks may be none

    def _comma(self, at: int, closing: str) -> int:
        """The place of what comes after a value. Raises ValueError where that is neither another one nor the end."""
        at = self._blank(at)
        if self._text.startswith(",", at):
            return self._blank(at + 1)
        if not self._text.startswith(closing, at):
            raise ValueError(f"{self._text[at : at + 20]!r} after a value")
        return at


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    return chr(int(code[1:], 16)) if len(code) > 1 else ESCAPES.get(code, code if code in "\\\"'/" else match.group())
