import asyncio
import json
from pathlib import Path

import pytest

from aipo_graph.errors import TaskError, ToolError
from aipo_graph.tasks.grading import equal, last_box, leaks
from aipo_graph.tasks.rewards import math
from aipo_graph.tools import sandbox

# (answer, gold) that say the same: numbers, fractions, radicals, intervals, tuples, sets, units, percent, choices, plus-minus, algebra.
SAME = [
    ("1/2", r"\frac12"),
    ("0.5", r"\frac{1}{2}"),
    (r"\dfrac{3}{4}", "3/4"),
    ("½", "0.5"),
    ("1½", r"\frac{3}{2}"),
    (r"1\frac{1}{2}", "1.5"),
    (r"-\frac{2}{3}", r"\frac{-2}{3}"),
    ("3.14159", "3.14"),
    ("5.0", "5"),
    ("1,234", "1234"),
    ("$18", "18"),
    (r"\$18.00", "18"),
    ("18 dollars", "18"),
    ("5 m", "5 meters"),
    ("5 cm", "5"),
    ("5", r"5\text{ cm}"),
    ("50%", "50"),
    ("50", r"50\%"),
    ("0.5", r"50\%"),
    (r"50\%", r"\frac12"),
    ("B", "B"),
    ("(B)", "B"),
    (r"\text{(B)}", "B"),
    ("B. Paris", "B"),
    ("b", "B"),
    (r"\sqrt{8}", r"2\sqrt2"),
    ("2*sqrt(2)", r"2\sqrt2"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("√2", r"\sqrt{2}"),
    ("[1,2]", "[1,2]"),
    ("[1, 2)", "[1,2)"),
    (r"(-\infty, 3]", r"(-\infty,3]"),
    (r"(\frac12, 3)", "(0.5, 3)"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1, 2", "2, 1"),
    ("1 and 2", "1, 2"),
    ("x=1 or x=2", "1,2"),
    (r"\pm 2", "2,-2"),
    (r"1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("y=2x+1", "y = 1+2x"),
    ("2x+1", "y=2x+1"),
    ("2x+2=0", "x+1=0"),
    ("x²-1", "(x-1)(x+1)"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{\pi}{2}", r"\pi/2"),
    (r"90^\circ", "90"),
    (r"\text{Monday}", "monday"),
    (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}1\\ \frac{2}{4}\end{pmatrix}", r"\begin{pmatrix}1\\0.5\end{pmatrix}"),
    (r"1.2\times10^{5}", "120000"),
    ("1.2e5", "120000"),
    ("x<3", "3>x"),
    ("1<x<2", "1 < x < 2"),
    (r"\frac{x+1}{2}", r"\frac12x+\frac12"),
    ("0.5x", r"\frac{x}{2}"),
    ("3i", "3i"),
    ("2+3i", "3i+2"),
    (r"\log_2 8", "3"),
    (r"\sin(\pi/6)", "1/2"),
    ("2^{10}", "1024"),
    (r"\frac{1}{3}+\frac16", "1/2"),
    ("3!", "6"),
    (r"\binom{5}{2}", "10"),
    ("f(x)=x+1", "x+1"),
    (r"x \in (1,2)", "(1,2)"),
    ("12 square cm", "12 cm^2"),
    ("(5)", "5"),
    ("{5}", "5"),
    ("007", "7"),
    ("-0", "0"),
    ("**42**", "42"),
    (r"2\pi r", r"2\pi r"),
    ("(3,4)", "3,4"),
    (r"\frac{a}{b}", "a/b"),
    ("3:45", "3:45"),
    ("10^{-1}", "0.1"),
    ("1/2 cm", "0.5 cm"),
    (r"2 \frac{1}{3}", "7/3"),
    ("x=2,y=3", "x=2, y=3"),
    ("(2,3)", "x=2,y=3"),
    (r"50\%", "50"),
    ("2/3 cup", "2/3"),
    (r"\left(\frac12,\,3\right]", "(0.5,3]"),
    ("12.5%", "12.5"),
    ("12{,}000", "12000"),
    (r"\sqrt{-1}", "i"),
    ("(1+i)^2", "2i"),
    ("5 kilometers", "5 km"),
    ("b)", "B"),
    ("yes", "Yes"),
    ("+5", "5"),
    ("0", "0.0"),
    ("60 miles per hour", "60 mph"),
    ("2516", "2516_8"),  # the question names the base
]
# Pairs that differ, known traps of graders among them: chains, hedges, tiny constants, units, equations without real solutions, anagrams.
DIFFERENT = [
    ("0.333", "1/3"),
    ("3.1", "3.14"),
    ("2.52", "2.5"),
    ("4.9999", "5"),
    ("5 m", "5 km"),
    ("0.5%", "0.5"),
    ("A or B", "B"),
    ("C", "B"),
    ("1.41", r"\sqrt{2}"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("1=2=5", "5"),
    ("5 or 6", "5"),
    ("5, 6", "5"),
    ("x=1", "y=1"),
    ("x^2+1=0", "x^2+2=0"),
    ("x^2", "x^3"),
    ("10^{-16}", r"2\cdot 10^{-16}"),
    ("e^{-50}", "e^{-60}"),
    ("evil", "live"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("x<3", r"x\le 3"),
    ("5x", "5"),
    ("10^{20}+1", "10^{20}"),
    (r"11\sqrt{2}", r"11\sqrt{3}"),
    ("7/0", "7"),
    ("5 hours", "5 minutes"),
    ("(0.5,3)", "(0.5,3]"),
    ("1e-16", "2e-16"),
    ("10^{-20}", "10^{-30}"),
    ("5 km/h", "5 km"),
    ("B, C", "B"),
    ("K", "B"),
    ("Tuesday", "Monday"),
    ("-5", "5"),
    ("1/0", "1"),
    ("", "1"),
    (" ", "1"),
    ("x", "5"),
    ("5", "x+y=5"),
    ("1<x>2", r"(1,\infty)"),
    ("x<3<5", r"(-\infty,3)"),
    ("x<3, x>5", r"(-\infty,3)"),
    (r"\mathbb{R}", r"(0,\infty)"),
    (r"5 \approx 6", "5"),
    ("10", "1010_2"),
    ("B_8", "8_8"),
    (r"0.\overline{9}8", "1"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "[1,2]"),
    ("a=1, a=2", "a=1, b=2"),
    ("2+2 = 5 = 4", "4"),
    ("-8 y^{2}", "-8x^2"),
]
BOMBS = [
    "9^{9^{9^9}}",
    "((9^{99})^{99})^{99}",
    r"\Gamma(10^{10})",
    "100000!",
    "((9!)!)!",
    r"\binom{10^{9}}{10^{8}}",
    "(" * 3000 + "1" + ")" * 3000,
    "{" * 100_000 + "}" * 100_000,
    r"\frac{1}{" * 200 + "1" + "}" * 200,
    "(((x+1)^{99}+y)^{99}+z)^{99}",
    "(a+b+c+d+f+g)^{999}",
    "-" * 500 + "1",
    "x" * 500,
    "9" * 100_000,
    "1e999999999",
    "10^{9999999}",
    r"\sqrt{" * 11 + "2" + "}" * 11,
    "|" * 500,
    "1," * 250 + "1",
    "(1," * 11 + "1" + ")" * 11,
]


CASES = [json.loads(line) for line in (Path(__file__).parent / "data" / "grading_cases.jsonl").read_text(encoding="utf-8").splitlines()]
"""Of each gold answer what says the same and what does not: thousands, conditions, constants, units, dressing, words, hostile texts."""


@pytest.fixture(scope="module")
def workers():
    with sandbox.Workers(2) as pool:
        yield pool


@pytest.mark.parametrize(("answer", "gold"), SAME)
async def test_answers_that_say_the_same(answer, gold, workers):
    assert await equal(answer, gold, workers)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
async def test_answers_that_differ(answer, gold, workers):
    assert not await equal(answer, gold, workers)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["gold"][:30])
async def test_what_says_a_gold_answer_and_what_does_not(case, workers):
    answers = [*case["same"], *case["different"]]
    verdicts = await asyncio.gather(*(equal(answer, case["gold"], workers) for answer in answers))
    wrong = [answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict != (answer in case["same"])]
    assert wrong == []


@pytest.mark.parametrize(
    ("answer", "gold", "digits", "verdict"),
    [
        ("0.2857", r"\frac{2}{7}", 0, False),
        ("0.2857", r"\frac{2}{7}", 4, True),
        ("0.286", r"\frac{2}{7}", 4, False),
        ("0.2858", r"\frac{2}{7}", 4, False),
        ("1.4142", r"\sqrt{2}", 4, True),
        ("4.9999", "5", 4, False),
        ("0.50001", "1/2", 4, False),
    ],
)
async def test_a_rounded_decimal_stands_for_an_exact_gold_where_the_task_says_so(answer, gold, digits, verdict, workers):
    assert await equal(answer, gold, workers, rounded_digits=digits) is verdict


async def test_a_gold_of_a_list_of_one_is_read(workers):
    assert await equal("70", '["70"]', workers)
    assert await equal("70", "['70']", workers)
    assert not await equal("7", '["70"]', workers)


def test_the_tables_agree_with_what_they_are_said_to_hold():
    assert len(SAME) + len(DIFFERENT) >= 100
    assert sum(len(case["same"]) + len(case["different"]) for case in CASES) >= 3757
    assert not set(SAME) & set(DIFFERENT)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{\}", None),
        (r"boxed{3} \boxed", None),
        ("", None),
        (r"\boxed{}", ""),
        ("\\boxed{" * 100_000, None),
        ("\\boxed{1}" * 100_000, "1"),
        ("\\boxed" + " " * 1_000_000, None),
        ("\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}", None),  # longer than any answer
    ],
)
def test_the_last_box(text, box):
    assert last_box(text) == box


async def test_only_the_last_box_counts():
    assert (await math("5", r"\boxed{6}, no, \boxed{5}"))["reward"] == 1
    for reply in (r"\boxed{5} or \boxed{6}", r"\boxed{5} or \boxed{6", "the answer is 5", r"\boxed{5 \text{ or } 6}"):
        assert (await math("5", reply))["reward"] == 0


async def test_bombs_are_wrong_and_honest_verdicts_beside_them_are_as_without_them(workers):
    honest = [*SAME[::6], *DIFFERENT[::6]]
    alone = [await equal(*pair, workers) for pair in honest]
    bombs = [(bomb, gold) for bomb, gold in zip(BOMBS, ["1", "x^2+1", r"\frac{\sqrt{2}}{3}"] * len(BOMBS), strict=False)]
    verdicts = await asyncio.gather(*(equal(*pair, workers) for pair in [*bombs, *honest]))
    assert not any(verdicts[: len(bombs)])
    assert verdicts[len(bombs) :] == alone


async def test_code_in_an_answer_never_runs(tmp_path, workers):
    canary = tmp_path / "canary"
    call = f"__import__('os').system('touch {canary}')"
    for code in (call, f'f"{{{call}}}"', f"sin.eval.__globals__['__builtins__']['eval'](\"{call}\")", rf"\text{{{call}}}", f"'{call}'"):
        for gold in ("1", r"\sqrt{2}", "x^2"):
            assert not await equal(rf"\boxed{{{code}}}", gold, workers)
    assert not canary.exists()


@pytest.mark.parametrize("gold", ["", "  ", r"\boxed{ }"])
async def test_an_empty_gold_answer_is_the_data_sets_fault(gold, workers):
    with pytest.raises(TaskError, match="gold answer is empty"):
        await equal("1", gold, workers)


async def test_a_grader_that_cannot_run_gives_no_score_but_where_it_is_needed(monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with sandbox.Workers(1) as broken:
        with pytest.raises(TaskError, match="did not start") as caught:
            await equal("x^2", r"x \cdot x", broken)
        assert isinstance(caught.value.__cause__, ToolError)
        assert await equal("4", "04", broken)


async def test_a_gold_answer_may_be_boxed(workers):
    assert await equal("7", r"$\boxed{7}$", workers)


@pytest.mark.parametrize(
    ("reply", "gold", "known", "leaked"),
    [
        ("The answer is 42.", "42", "", True),
        ("42", "42", "", True),
        (r"so \boxed{42}", "42", "", True),
        ("40 + 2 = 42", "42", "", True),
        ("40 + 2 = 42", "42", "is it 42?", False),
        ("40 + 2 = 42", "42", "is it 420?", True),
        ("step 3: divide", "3", "", False),
        ("2 + 1 = 3", "3", "", True),
        ("is 3 * 4 right", "3", "", False),
        ("6180", "6180", "", True),
        ("state 6180, go on", "6180", "", True),
        ("66180 or 6180.5 or x6180 or 6180a", "6180", "", False),
        ("it costs 1,250.00 crowns", "1250", "", True),
        (r"that is \frac{3}{4} of it", "0.75", "", True),
        ("use x + 1 here", "x+1", "", True),
        ("use xx+1 here", "x+1", "", False),
        ("it was MONDAY", "Monday", "", True),
        ("The answer is B", "B", "", True),
        ("(B)", "B", "", True),
        ("Book B has it", "B", "", False),
        ("no", "6180", "", False),
        ("", "5", "", False),
        (r"it costs 1\,250 crowns", "1250", "", True),
        ("it costs 1{,}250 crowns", "1250", "", True),
        ("1,250,000 crowns", "1250", "", False),
        ("that is .75 of it", "0.75", "", True),
        ("that is 0.755 of it", "0.75", "", False),
        ("it falls to -5 then", "-5", "", False),
        ("x = -5", "-5", "", True),
        ("x = 5", "-5", "", False),
        ("The answer is -1250.", "-1250", "", True),
        ("So x equals −1250", "-1250", "", True),
        ("The answer is -1250.", "1250", "", False),
        ("the answer is $-\\frac{1}{2}$", "-1/2", "", True),
        ("it is n - 1250 then", "-1250", "", False),
        ("it is n - 1250 then", "1250", "", True),
        ("x = -125 here", "-125", "", True),
        ("8-125 is less", "-125", "", False),
        ("8 - 125 is less", "125", "", True),
        ("this 3 and axis 3", "3", "", False),
        ("= 3 + 4", "3", "", False),
        (r"\text{the point }\left(1,2\right)", "(1,2)", "", True),
        ("f(1,2)", "(1,2)", "", False),
        (r"it is \dfrac{x}{2} then", r"\frac{x}{2}", "", True),
        ("anything", "$", "", False),
        ("", "\u200b", "", False),
    ],
)
def test_a_reply_that_states_the_gold_answer_is_found(reply, gold, known, leaked):
    assert leaks(reply, gold, known) is leaked


@pytest.mark.parametrize(
    "text",
    ["1" * 10**6, "1 " * 10**5, r"\boxed{" * 10**4, " " * 10**6, "is " * 10**5, "1/" * 10**5, "1,111" * 10**4, "½" * 10**4, "{" * 10**6],
)
def test_leaks_reads_long_replies(text):
    assert not leaks(text, "42", "")
    assert leaks(f"{text} = 42", "42", "")
