"""BM25 search over a JSONL corpus: the Knowledge agent's tool.

The library is bm25s: its Lucene weighting is positive for every word, while rank-bm25's Okapi gives a word that stands in one of
two documents the weight 0, so that a small rule book is not found.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bm25s

from aipo_graph.errors import TaskError
from aipo_graph.load import records

LONGEST_QUERY = 1000
_WORD = re.compile(r"[^\W_]+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Document:
    """One entry of a corpus; ``fields`` holds the record's other fields."""

    id: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


class Corpus:
    """Documents and their index.

    Words are compared without regard to case, and none is too short or too common to count. A word of the query that is a
    document's id, case and all, finds that document: ``B`` finds the entry ``B``, and not every text with a ``b`` in it.

    >>> corpus = Corpus([Document("A", "adds 12"), Document("B", "takes a half")])
    >>> [document.id for document in corpus.search("rule of B?")], corpus.search("unheard of")
    (['B'], [])
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        self.documents = tuple(documents)
        if not self.documents:
            raise TaskError("a corpus without documents: give it at least one")
        self._index = bm25s.BM25(method="lucene")
        self._index.index([[_id(d.id), *_words(d.text)] for d in self.documents], show_progress=False)
        self._vocabulary = frozenset(self._index.vocab_dict)

    @classmethod
    def read(cls, path: str | Path) -> "Corpus":
        """The corpus of a JSONL file of ``{"id": ..., "text": ...}``, other fields kept.

        Raises TaskError, naming file and line, on a malformed line, a missing field or an id that stands twice; and on an empty file.
        """
        documents: dict[str, Document] = {}
        for where, record in records(path, "id", "text"):
            name, text = record.pop("id"), record.pop("text")
            if name in documents:
                raise TaskError(f"{where}: the id {name!r} stands twice; ids must differ")
            documents[name] = Document(name, text, record)
        return cls(documents.values())

    def search(self, query: str, k: int = 1) -> list[Document]:
        """Up to ``k`` documents that share a word with the first 1000 characters of the query, best first, ties in corpus order."""
        query = query[:LONGEST_QUERY]
        names = {query.strip(), *_WORD.findall(query), *(word.strip(".,;:!?()[]\"'") for word in query.split())}
        tokens = [token for token in (*sorted(map(_id, names)), *_words(query)) if token in self._vocabulary]
        if not tokens:
            return []
        scores = self._index.get_scores(tokens).tolist()
        ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return [self.documents[i] for i in ranked[:k] if scores[i] > 0]


def _id(name: str) -> str:
    return f"id {name}"  # the space keeps it apart from every word


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
