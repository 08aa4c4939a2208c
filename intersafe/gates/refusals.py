"""The gates of refusal VQA: rules on a finished sample, and near-duplicate questions of a group."""

from intersafe.checks.messages import fold, is_blank
from intersafe.checks.refusals import answer_problem, question_problem
from intersafe.exclusions import excluded_together
from intersafe.gates.dedup import TextIndex, signature_of
from intersafe.recipe.gates import DuplicateSettings
from intersafe.records import Reason, RefusalSample

_LEAST_DESCRIPTION = 12
"""Characters: a shorter folded description occurs in honest questions by chance."""


def check_refusal(sample: RefusalSample) -> Reason | None:
    """The reason of the first rule that rejects the sample, the hard exclusion before all others; or None."""
    descriptions = [origin.description for origin in sample.origins]
    asked = [sample.seed.query, sample.question, *descriptions]
    if excluded_together(asked):
        return Reason("excluded", "question")
    if excluded_together([*asked, sample.answer]):
        return Reason("excluded", "answer")
    if problem := question_problem(sample.question):
        return problem
    question = f" {fold(sample.question)} "
    if any(len(d) >= _LEAST_DESCRIPTION and f" {d} " in question for d in map(fold, descriptions)):
        return Reason("leaked_image_description")
    if sample.answered_by == "model":
        return answer_problem(sample.question, sample.answer)
    return Reason("empty_message", "answer") if is_blank(sample.answer) else None


class DuplicateQuestions:
    """The accepted questions of each group, searchable for a near-duplicate."""

    def __init__(self, settings: DuplicateSettings) -> None:
        self._settings = settings
        self._groups: dict[str, TextIndex] = {}

    def check(self, sample: RefusalSample) -> Reason | None:
        """`near_duplicate` with the id of the most similar accepted sample of the group, or None."""
        index = self._groups.get(sample.group)
        found = index.nearest(signature_of([sample.question], self._settings)) if index else None
        return Reason("near_duplicate", found[0]) if found else None

    def add(self, sample: RefusalSample) -> None:
        """Remembers an accepted sample."""
        index = self._groups.setdefault(sample.group, TextIndex(self._settings))
        index.add(sample.id, signature_of([sample.question], self._settings))
