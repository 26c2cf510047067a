"""The operator task: problems, helpers' functions, rule book, worked solutions."""

import random
from itertools import islice, pairwise, permutations

import pytest

from aipo_graph.config import Config, TaskSection
from aipo_graph.errors import ConfigError, TaskError
from aipo_graph.load import data
from aipo_graph.tasks import operators
from aipo_graph.tasks.operators import BELIEFS, HELDOUT_TRIPLES, KNOWN, MISBELIEVED, NOVEL, RULES, Operators
from aipo_graph.tools.retrieval import Corpus
from examples.operators.solutions import Habits, Piece, numbered, solution

TASK = Operators(seed=0, easy_share=0.25)


def triple(question: str) -> str:
    return "".join(sorted(question[5:8]))


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_training_never_meets_a_heldout_triple() -> None:
    heldout = {triple(p.question) for kind in ("hard", "easy") for p in TASK.heldout(256, kind)}
    train = {triple(p.question) for p in map(TASK.train, range(3000))}
    assert len(train) > 100
    assert not train & heldout
    assert heldout <= {"".join(sorted(t)) for triples in HELDOUT_TRIPLES.values() for t in triples}


def test_problems_depend_on_seed_and_index_only() -> None:
    again = operators.build(Config())
    assert [again.train(i) for i in (5, 0, 7)] == [TASK.train(i) for i in (5, 0, 7)]
    assert Operators(seed=1, easy_share=0.25).train(0) != TASK.train(0)
    assert Operators(seed=1, easy_share=0.0).heldout(20) == TASK.heldout(300)[:20]
    assert [p.id for p in TASK.heldout(2)] == ["heldout-hard-0", "heldout-hard-1"]


def test_kinds() -> None:
    problems = [TASK.train(i) for i in range(2000)]
    for problem in problems + TASK.heldout(256) + TASK.heldout(256, "easy"):
        known = sum(letter in KNOWN for letter in problem.question[5:8])
        assert (problem.question[0], known) == ("@", 3) if problem.kind == "easy" else known <= 1
    assert 0.2 < sum(p.kind == "easy" for p in problems) / len(problems) < 0.3
    with pytest.raises(TaskError, match="'medium'.*hard, easy and long"):
        TASK.heldout(3, "medium")


def test_long_problems_have_a_fourth_operator_after_three_heldout_ones() -> None:
    problems = TASK.heldout(64, "long")
    assert {len(set(p.question[5:-1])) for p in problems} == {4}
    assert {triple(p.question) for p in problems} <= {"".join(sorted(t)) for t in HELDOUT_TRIPLES["hard"]}
    assert all(p.answer == TASK.solve(p.question) for p in problems)


def test_options_of_the_task() -> None:
    easy = operators.build(Config(task=TaskSection(options={"easy_share": 1})))
    assert {easy.train(index).kind for index in range(50)} == {"easy"}
    with pytest.raises(ConfigError, match=r"task.options.easy = 1: the task has no such option; options of operators: easy_share"):
        operators.build(Config(task=TaskSection(options={"easy": 1})))
    with pytest.raises(ConfigError, match=r"task.options.easy_share = 2: "):
        operators.build(Config(task=TaskSection(options={"easy_share": 2})))


def test_the_order_matters_where_the_marker_changes_it() -> None:
    for problem in TASK.heldout(256):
        marker, state, letters = problem.question[0], problem.question[1:5], problem.question[5:8]
        assert problem.answer == operators.evaluate(state, operators.order(marker, letters))
        assert marker == "@" or problem.answer != operators.evaluate(state, letters)
    assert len({operators.evaluate("1234", "".join(p)) for p in permutations("EFJ")}) > 3


def test_beliefs_are_wrong_in_every_character() -> None:
    assert sorted(RULES) == sorted(KNOWN + NOVEL + MISBELIEVED)
    assert sorted(BELIEFS) == sorted(MISBELIEVED)
    assert all(a != b for letter in MISBELIEVED for a, b in zip(RULES[letter], BELIEFS[letter], strict=True))


async def test_score_wants_exactly_the_four_digits_of_the_last_box() -> None:
    problem = next(p for p in TASK.heldout(256) if p.answer.startswith("0"))
    box = "\\boxed{%s}"
    for answer, reward in ((problem.answer, 1.0), (problem.answer.lstrip("0"), 0.0), ("", 0.0), (problem.answer + ".0", 0.0)):
        assert await TASK.reward(problem.answer, "x" + box % answer) == reward
    assert await TASK.reward(problem.answer, box % problem.answer + box % "1111") == 0.0
    assert await TASK.reward(problem.answer, problem.answer) == 0.0


@pytest.mark.parametrize("habits", [Habits(), Habits(slip=0.4)])
async def test_a_worked_solution_is_right(habits: Habits) -> None:
    for problem in [*TASK.heldout(20), *TASK.heldout(20, "easy")]:
        written = text(solution(problem, habits=habits, rng=random.Random(problem.id)))
        assert await TASK.reward(problem.answer, written) == 1.0, written
        assert ("no</feedback>" in written) <= (habits.slip > 0)


async def test_a_slip_that_nobody_finds_makes_a_solution_wrong() -> None:
    habits = Habits(slip=1.0, lenient=True)
    rewards = [await TASK.reward(p.answer, text(solution(p, habits=habits, rng=random.Random(p.id)))) for p in TASK.heldout(20)]
    assert sum(rewards) == 0


def test_what_helpers_said_in_a_solution_is_what_they_say() -> None:
    problem = TASK.heldout(1)[0]
    pieces = solution(problem, habits=Habits(slip=0.5), rng=random.Random(1))
    helpers = {"reasoning": operators.plan, "verify": operators.check, "knowledge": RULES.__getitem__}
    for asked, said in pairwise(pieces):
        if said.helper:
            query = asked.text.split(f"<{said.helper}>")[1].split("</")[0]
            assert helpers[said.helper](query) == said.text
    assert {p.helper for p in pieces} == {"", "reasoning", "verify", "knowledge"}


def test_rule_book_is_found_by_letter() -> None:
    corpus = Corpus.read(data("operators_rules.jsonl"))
    written = [{"id": letter, "text": f"operator {letter} {rule}", "reply": rule} for letter, rule in RULES.items()]
    assert [{"id": d.id, "text": d.text, **d.fields} for d in corpus.documents] == written
    assert {letter: corpus.search(letter)[0].fields["reply"] for letter in RULES} == dict(RULES)


@pytest.mark.parametrize(("query", "reply"), [("@1I2E3B", "1I2E3B"), ("%1I2E3B", "3B2E1I"), ("&1I2E3B", "2E3B1I"), ("&1I", "1I")])
def test_plan(query: str, reply: str) -> None:
    assert operators.plan(query) == reply


def test_plan_and_markers_agree() -> None:
    for marker in operators.MARKERS:
        assert "".join(operators.plan(marker + numbered("KEL"))[1::2]) == operators.order(marker, "KEL")


HOSTILE = [
    "",
    "IEB",
    "1I2E3B",
    "%1i2e3b",
    "% 1I2E",
    "%1I2E3B\n",
    "@0A",
    "@1Z",
    "@" + "1A" * 10,
    "%",
    "%ieb",
    "% IEB",
    "%IEB\n",
    "@" + "A" * 13,
    "@Z",
    "%6475IEB?",
    "__import__('os')",
    "9" * 100_000,
    "٣٤٥٦+1111=4567",
    "\x00",
]


@pytest.mark.parametrize("query", HOSTILE)
def test_what_is_no_request_gets_no_plan_and_no_yes(query: str) -> None:
    assert operators.plan(query) == operators.UNKNOWN
    assert operators.check(query) == "no"


@pytest.mark.parametrize(
    ("claim", "verdict"),
    [
        ("8813+6475=4288", "yes"),
        ("8813-6475=2448", "yes"),
        ("8813-6475=2338", "no"),
        ("0000-0001=0009", "yes"),
        ("8813+6475=14288", "no"),
        ("8813+6475=4288;", "no"),
        ("8813*6475=4288", "no"),
        ("8813+6475=", "no"),
        ("٨813+6475=4288", "no"),
    ],
)
def test_check(claim: str, verdict: str) -> None:
    assert operators.check(claim) == verdict


def test_problems_vary() -> None:
    questions = [p.question for p in islice(map(TASK.train, range(10_000)), 500)]
    assert len(set(questions)) > 495
    assert {q[0] for q in questions} == set(operators.MARKERS)


@pytest.mark.parametrize("given", [{"data": "own.jsonl"}, {"heldout": "own.jsonl"}, {"columns": {"question": "own.jsonl"}}])
def test_problems_of_ones_own_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"task.name = operators: it makes its own problems; leave out .*own\.jsonl"):
        operators.build(Config.model_validate({"task": given}))
