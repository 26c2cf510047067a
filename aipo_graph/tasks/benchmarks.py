"""The field's benchmarks: held-out problems alone, from the hub or a local file in the same columns. See docs/evaluate.md.

Columns are those of the data sets' pages; the data itself is read only where a user evaluates on it.
"""

import functools
import random
from collections.abc import Mapping
from dataclasses import replace

from pydantic import NonNegativeInt

from aipo_graph.config import Config, Section, task_options
from aipo_graph.tasks import datasets
from aipo_graph.tasks.datasets import DatasetTask, Layout, open_layout
from aipo_graph.types import derive_seed

BENCHMARKS: Mapping[str, Layout] = {
    "aime2024": Layout(
        heldout="HuggingFaceH4/aime_2024:train", columns={"question": "problem", "answer": "answer", "id": "id"}, gold=str.strip
    ),
    "aime2025": Layout(heldout="math-ai/aime25:test", columns={"question": "problem", "answer": "answer", "id": "id"}, gold=str.strip),
    "math500": Layout(
        heldout="HuggingFaceH4/MATH-500:test",
        columns={"question": "problem", "answer": "answer", "id": "unique_id", "kind": "level"},
        gold=str.strip,
    ),
    "gpqa_diamond": Layout(
        heldout="Idavidrein/gpqa:gpqa_diamond:train",
        columns={
            "question": "Question",
            "answer": "Correct Answer",
            "wrong1": "Incorrect Answer 1",
            "wrong2": "Incorrect Answer 2",
            "wrong3": "Incorrect Answer 3",
            "id": "Record ID",
            "kind": "High-level domain",
        },
    ),
}
"""task.name -> layout."""


class Options(Section):
    """``task.options`` of gpqa_diamond."""

    shuffle_seed: NonNegativeInt = 0
    """Seed of the order of the choices. The order is a function of it and of the problem, whatever the run's seed."""


def lettered(cells: Mapping[str, str], seed: int) -> tuple[str, str]:
    """The question with its choices under A to D, and the right one's letter; "" where a choice is missing or equals the right one.

    >>> cells = {"question": "1+1?", "answer": "2", "wrong1": "3", "wrong2": "4", "wrong3": "5"}
    >>> lettered(cells, seed=1)
    ('1+1?\\n\\nA) 2\\nB) 4\\nC) 3\\nD) 5\\n\\nAnswer with the letter of the right choice.', 'A')
    """
    question, right = cells["question"], " ".join(cells["answer"].split())
    choices = sorted([right, *(" ".join(cells[name].split()) for name in ("wrong1", "wrong2", "wrong3"))])
    random.Random(derive_seed(seed, question, *choices)).shuffle(choices)
    lines = [f"{letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True)]
    clear = all(choices) and choices.count(right) == 1
    text = "\n".join([question, "", *lines, "", "Answer with the letter of the right choice."])
    return text if question else "", "ABCD"[choices.index(right)] if clear else ""


def build(config: Config) -> DatasetTask:
    """The benchmark that ``task.name`` names; ``task.heldout`` is a local file of it. Raises ConfigError, TaskError."""
    layout, choices = BENCHMARKS[config.task.name], config.task.name == "gpqa_diamond"
    if choices:
        options = task_options(config.task, Options)
        return open_layout(config, replace(layout, compose=functools.partial(lettered, seed=options.shuffle_seed)))
    return open_layout(config, layout, task_options(config.task, datasets.Options).rounded_digits)
