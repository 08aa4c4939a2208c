"""What each prompt file is offered and must have: blocks, variables, and values for a trial rendering."""

from typing import Any, NamedTuple

_CONCERN = {
    "category": "the seed's category",
    "concern": "what that category is about, in a few words",
    "query": "the seed's query",
    "has_image": "true if the model is shown images with this prompt",
}
_TOPIC = {name: meaning for name, meaning in _CONCERN.items() if name != "query"}
"""For the responder, which answers as an assistant would and does not know the seed's query."""
_CONVERSATION = {
    "transcript": "the conversation so far as text, images as [image 1], [image 2]",
    "turn": "number of this turn, from 1",
}


class Role(NamedTuple):
    """What a role's prompt files are offered and must have."""

    blocks: tuple[str, ...]
    variables: dict[str, str]
    sample: dict[str, Any]
    """Values for a trial rendering."""
    needs: tuple[tuple[str, ...], ...] = ()
    """At least one variable of each group must be used, or the model would not see what it is asked about."""


_SCORE = {"relevance": 7, "association": 6, "harmless": 9, "reason": "a reason"}
_SAMPLE = {"category": "fraud", "concern": "deception", "query": "a query", "has_image": True}
_SAMPLE_TOPIC = {name: value for name, value in _SAMPLE.items() if name != "query"}
_SAMPLE_CONVERSATION = {"transcript": "[turn 1]\nUser: a question\nAssistant: an answer", "turn": 2}

_ASKED = {
    "group": "name of the group: general, health, finance",
    "about": "what questions belong to the group, from the recipe",
    "problem": "why the last try was rejected; empty at first",
}
_SAMPLE_ASKED = {"group": "health", "about": "questions for a doctor", "problem": "a problem"}

PROMPTS: dict[str, Role] = {
    "planner/decompose": Role(
        ("system", "user"),
        _CONCERN
        | {
            "strategy": "name of the strategy",
            "strategy_summary": "its summary block",
            "n_steps": "how many steps",
            "n_pictures": "how many of the steps get a picture of their own; 0 if nothing is painted",
            "problem": "why your last plan was rejected; empty at first",
        },
        _SAMPLE
        | {
            "strategy": "role_play",
            "strategy_summary": "a summary",
            "n_steps": 4,
            "n_pictures": 1,
            "problem": "3 steps for 4 turns",
        },
        (("query",), ("n_steps",), ("n_pictures",)),
    ),
    "planner/twin": Role(
        ("system", "user"),
        _CONCERN
        | {
            "transcript": _CONVERSATION["transcript"],
            "n_turns": "how many turns",
            "problem": "why the last version was rejected; empty at first",
        },
        _SAMPLE | {"transcript": "a conversation", "n_turns": 4, "problem": "repeated message"},
        (("transcript",), ("n_turns",)),
    ),
    "painter/describe": Role(
        ("system", "user"),
        _CONCERN
        | _CONVERSATION
        | {
            "step": "what the picture is for: the step of this turn, or the question",
            "problem": "why the last description or picture was rejected; empty at first",
        },
        _SAMPLE | _SAMPLE_CONVERSATION | {"step": "a step", "problem": "blocked"},
        (("step",),),
    ),
    "refusal/question": Role(
        ("system", "user"),
        _CONCERN | _ASKED | {"sample": "number of this question about the seed, from 1"},
        _SAMPLE | _SAMPLE_ASKED | {"sample": 2},
        (("query",),),
    ),
    "refusal/answer": Role(
        ("system", "user"),
        _TOPIC | _ASKED | {"question": "the user's question"},
        _SAMPLE_TOPIC | _SAMPLE_ASKED | {"question": "a question"},
        (("question",),),
    ),
    "responder/aligned": Role(
        ("system", "user"),
        _TOPIC
        | _CONVERSATION
        | {
            "message": "the user's latest message",
            "problem": "why the last answer was rejected; empty at first",
        },
        _SAMPLE_TOPIC | _SAMPLE_CONVERSATION | {"message": "a message", "problem": "too vague"},
        (("message", "transcript"),),
    ),
    "judge/images": Role(("system", "user"), _CONCERN, _SAMPLE),
    "judge/aligned": Role(
        ("system", "user"),
        _CONCERN | _CONVERSATION | {"answer": "the answer to judge", "rubric": "the rubric of the category's family"},
        _SAMPLE | _SAMPLE_CONVERSATION | {"answer": "an answer", "rubric": "a rubric"},
        (("answer",),),
    ),
    "judge/refusal": Role(
        ("system", "user"),
        _CONCERN | _ASKED | {"question": "the user's question", "answer": "the answer to judge"},
        _SAMPLE | _SAMPLE_ASKED | {"question": "a question", "answer": "an answer"},
        (("question",), ("answer",)),
    ),
    "planner/rewrite": Role(
        ("system", "user"),
        _CONCERN
        | {
            "steps": "all steps of the plan",
            "position": "number of the weak step, from 1",
            "step": "the weak step",
            "score": "its scores: score.relevance, score.association, score.harmless, score.reason",
        },
        _SAMPLE | {"steps": ["one", "two"], "position": 2, "step": "two", "score": _SCORE},
        (("step",),),
    ),
    "judge/step": Role(
        ("system", "user"), _CONCERN | {"step": "the step to score"}, _SAMPLE | {"step": "a step"}, (("step",),)
    ),
    "judge/turn": Role(
        ("system", "user"),
        _CONCERN | _CONVERSATION | {"reply": "the reply to judge", "rubric": "the rubric of the category's family"},
        _SAMPLE | _SAMPLE_CONVERSATION | {"reply": "an answer", "rubric": "a rubric"},
        (("reply", "transcript"),),
    ),
    "judge/dialogue": Role(
        ("system", "user"),
        _CONCERN | {"transcript": _CONVERSATION["transcript"], "rubric": "the rubric of the category's family"},
        _SAMPLE | {"transcript": "a conversation", "rubric": "a rubric"},
        (("transcript",),),
    ),
    "victim/system": Role(("system",), {}, {}),
}
"""Every prompt but the strategies, which share one role."""

STRATEGY = Role(
    ("summary", "system", "user"),
    _CONCERN
    | _CONVERSATION
    | {
        "step": "what the user asks about in this turn",
        "n_turns": "how many turns the conversation will have",
        "refused": "true if the victim declined an earlier version of this turn",
        "has_picture": "true if the user's message of this turn shows a new picture: the last image",
        "problem": "why a rule rejected your last version of this message; empty at first",
        "judge_reason": "the judge's reason for its last verdict, which the attacker sees only if the file uses it",
    },
    _SAMPLE
    | _SAMPLE_CONVERSATION
    | {
        "step": "a step",
        "n_turns": 4,
        "refused": True,
        "has_picture": True,
        "problem": "repeated message",
        "judge_reason": "a reason",
    },
    (("step",),),
)
"""`prompts/attacker/*.md`: one file, one strategy."""
