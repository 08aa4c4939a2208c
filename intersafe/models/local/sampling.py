"""Sampling for `transformers.generate` row by row: each with its own seed, temperature, schema and token limit.

`generate` runs greedily; the randomness is added here. The largest of logits / temperature + Gumbel noise is a draw
from the softmax (Gumbel-max), so that a row needs no random state but its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Row:
    """How one conversation of a batch is answered."""

    prompt: int
    """Tokens of its prompt, without padding."""
    most: int
    """Most new tokens."""
    temperature: float
    top_p: float
    top_k: int
    """0: all."""
    repetition_penalty: float
    generator: Any
    """torch.Generator on the CPU."""
    matcher: Any = None
    """llguidance's matcher of a JSON schema."""
    is_ended: bool = False


class Rows:
    """A logits processor: (batch, tokens) ids and (batch, vocabulary) logits to logits whose largest is the draw."""

    def __init__(self, torch: Any, rows: Sequence[Row], width: int, vocabulary: int, end: int) -> None:
        """`width`: tokens of the prompts, padding included; `end`: the token that ends an answer."""
        self._torch, self._rows, self._width, self._end = torch, rows, width, end
        if any(row.matcher for row in rows):
            import llguidance.torch as masks  # type: ignore[import-not-found]

            self._masks = masks
            self._mask = masks.allocate_token_bitmask(1, vocabulary)

    def __call__(self, ids: Any, logits: Any) -> Any:
        """The logits of every row, masked by its schema and with its noise."""
        logits = logits.float()
        for index, row in enumerate(self._rows):
            if not row.is_ended:
                logits[index] = self._of(row, ids[index], logits[index])
        return logits

    def _of(self, row: Row, ids: Any, logits: Any) -> Any:
        torch = self._torch
        if row.matcher:
            logits = self._within_schema(row, ids, logits)
        if row.repetition_penalty != 1.0:
            seen = ids[self._width - row.prompt :].unique()
            score = logits[seen]
            logits[seen] = torch.where(score > 0, score / row.repetition_penalty, score * row.repetition_penalty)
        if row.temperature < 1e-5:
            return logits
        logits = _within_top(torch, logits / row.temperature, row.top_p, row.top_k)
        noise = torch.empty(logits.shape).exponential_(generator=row.generator).log().to(logits.device)
        return logits - noise

    def _within_schema(self, row: Row, ids: Any, logits: Any) -> Any:
        if len(ids) > self._width:
            row.matcher.consume_token(int(ids[-1]))
        if row.matcher.is_stopped():  # the JSON is closed
            row.is_ended = True
            closed = self._torch.full_like(logits, -self._torch.inf)
            closed[self._end] = 0.0
            return closed
        self._masks.fill_next_token_bitmask(row.matcher, self._mask, 0)
        shown = logits[None, :]
        self._masks.apply_token_bitmask_inplace(shown, self._mask.to(logits.device))
        return shown[0]


def _within_top(torch: Any, logits: Any, top_p: float, top_k: int) -> Any:
    """The logits with all but the likeliest `top_k`, and all beyond the probability `top_p`, at minus infinity."""
    if 0 < top_k < len(logits):
        least = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1.0:
        ordered, tokens = logits.sort(descending=True)
        share = ordered.softmax(dim=-1)
        beyond = share.cumsum(dim=-1) - share >= top_p
        logits = logits.index_fill(0, tokens[beyond], -torch.inf)
    return logits


class Stops:
    """A stopping criterion: a row ends at its own limit of tokens, independent of the others of the batch."""

    def __init__(self, torch: Any, rows: Sequence[Row], width: int) -> None:
        self._torch, self._rows, self._width = torch, rows, width

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        """One bool for each row: True ends it."""
        used = ids.shape[1] - self._width
        return self._torch.tensor([used >= row.most for row in self._rows], device=ids.device, dtype=self._torch.bool)
