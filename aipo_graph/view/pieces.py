"""Token ids to the pieces of text that they stand for."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer

from aipo_graph.errors import ConfigError
from aipo_graph.load import model

CUT = "\ufffd"
"""What a decoder writes for bytes that are not, or not yet, a character."""
LONGEST = 64
"""Tokens that may pass before a character is whole."""
FILE = "tokenizer.json"


class Pieces:
    """Splits the text of segments at their tokens. Raises ConfigError for a file that is no tokenizer."""

    def __init__(self, file: Path) -> None:
        try:
            # Not from_file: that one raises bare Exception. No class that a run's folder names is looked up, and no hub is asked.
            self._tokenizer = Tokenizer.from_buffer(file.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: no tokenizer that loads ({error})") from error
        self._known: dict[int, str] = {}

    def split(self, token_ids: Sequence[int], text: str) -> list[str] | None:
        """One piece per token, together ``text``; None where they do not make it.

        The token that completes a character has it as its piece, those before have "". What decoding puts before the text (a token for
        its beginning, SentencePiece's first blank) is left out.
        """
        try:
            pieces = [self._known[i] if i in self._known else self._learn(i) for i in token_ids]
        except OverflowError:  # no id of any tokenizer
            return None
        start: int | None = None
        for place, piece in enumerate([*pieces, ""]):
            if CUT in piece:
                start = place if start is None else start
            elif start is not None:
                pieces[start:place] = self._characters(token_ids[start:place])
                start = None
        if not text.endswith(CUT):  # the beginning of a character, which nothing completed
            last = next((place for place in reversed(range(len(pieces))) if pieces[place]), 0)
            pieces[last:] = [piece.rstrip(CUT) for piece in pieces[last:]]
        surplus = sum(map(len, pieces)) - len(text)
        for place, piece in enumerate(pieces):
            if surplus <= 0:
                break
            pieces[place] = piece[surplus:]
            surplus -= len(piece)
        return pieces if "".join(pieces) == text else None

    def _learn(self, token_id: int) -> str:
        """Its text after another token: SentencePiece decoders drop the blank before the first."""
        once, twice = self._decode([token_id]), self._decode([token_id, token_id])
        self._known[token_id] = CUT if CUT in once else twice[len(once) :]
        return self._known[token_id]

    def _characters(self, token_ids: Sequence[int]) -> list[str]:
        """Pieces of tokens none of which is made of whole characters."""
        pieces, start, given = [], 0, ""
        for end in range(1, len(token_ids) + 1):
            text = self._decode(token_ids[start:end])
            whole = text if end == len(token_ids) or end - start == LONGEST else text.rstrip(CUT)
            pieces.append(whole[len(given) :])
            start, given = (end, "") if whole == text else (start, whole)
        return pieces

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def open_pieces(folder: Path, settings: Mapping[str, str]) -> Pieces:
    """By the tokenizer of a run's exported policy, else that of the model that it started from, where that is on this machine.

    Raises ConfigError where there is none.
    """
    name = settings.get("policy.model", "")
    if (folder / "policy" / FILE).is_file():
        return Pieces(folder / "policy" / FILE)
    path = Path(model(name)) / FILE if name else None
    if path and not path.is_file():
        try:
            cached = try_to_load_from_cache(name, FILE)
        except ValueError:  # no name that a hub would have
            cached = None
        path = Path(cached) if isinstance(cached, str) else None
    if path is None:
        raise ConfigError(f"neither {folder / 'policy'} nor policy.model = {name!r} has a {FILE} on this machine")
    return Pieces(path)
