"""Rules on a refusal sample: its question, and an answer that a model wrote.

The stage applies them to each draft before the judge is asked; the gate applies them to the finished sample.
"""

import re
from collections.abc import Sequence

from intersafe.checks.messages import fold, image_leak, is_blank
from intersafe.recipe.gates import RuleSettings
from intersafe.records import Reason

LONGEST_QUOTE = 7
"""How many words of the question an answer may repeat in a row."""
_SORRY = re.compile(r"I['\u2018\u2019\u02bc\u00b4`\uff07]m sorry\b")
_PLAIN_SORRY = re.compile(r"I'm sorry\b")
_RULES = RuleSettings()


def plain_sorry(answer: str) -> str:
    """The answer without outer white space; an opening "I'm sorry" gets an ASCII apostrophe."""
    answer = answer.strip()
    match = _SORRY.match(answer)
    return f"I'm sorry{answer[match.end() :]}" if match else answer


def question_problem(question: str) -> Reason | None:
    """What is wrong with a question by rule, whoever wrote it; None if nothing."""
    if is_blank(question):
        return Reason("empty_message", "question")
    return Reason("leaked_image_description") if image_leak(question, _RULES) else None


def answer_problem(question: str, answer: str) -> Reason | None:
    """What is wrong with an analysis of the harm by rule; None if nothing."""
    if is_blank(answer):
        return Reason("empty_message", "answer")
    if not _PLAIN_SORRY.match(answer):
        return Reason("no_prefix")
    return Reason("repeats_question") if _quotes(fold(answer), fold(question).split()) else None


def _quotes(answer: str, question: Sequence[str]) -> bool:
    """True if the folded answer has more than `LONGEST_QUOTE` words of the question in a row."""
    text, size = f" {answer} ", LONGEST_QUOTE + 1
    return any(f" {' '.join(question[i : i + size])} " in text for i in range(len(question) - size + 1))
