"""Trains `tests/fixtures/tiny_cast` from `tests/fixtures/tiny_vlm`: the victim that it was, and all other parts too.

One-off, in the environment of `build_vlm.py` with intersafe in it besides:

    python -m tests.support.tiny_models.build_cast tests/fixtures/tiny_cast

`training_roles.py` tells what each part says. A share of what it learns is the old victim's dialogues, so that it does
not forget; nothing is scrambled in the prompts of the other parts, where a single digit decides. The weights are saved
every ninety steps. `--measure 0` trains only, `--steps 0` measures the saved weights. The fixture came out of three
rounds, half an hour of one busy core, each continuing the one before with `--start`:

    --steps 360 --rate 2e-3 --seed 0                (planner, painter and the rarer prompts asked less often than now)
    --steps 330 --rate 1.5e-3 --seed 1
    --steps 260 --rate 1.5e-3 --seed 2 --old 0.55   (fewer gardens for judge/dialogue, as now)

The settings moved between rounds, so these commands do not give the same bytes again.
"""

import argparse
import copy
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found]
from tokenizers import Tokenizer  # type: ignore[import-not-found]
from transformers import (  # type: ignore[import-not-found]
    Qwen2_5_VLForConditionalGeneration,
    get_cosine_schedule_with_warmup,
)

from tests.support.paths import REPOSITORY
from tests.support.tiny_models.build_vlm import IGNORED, SIZES, Encoder, measure, reply_of, save_weights
from tests.support.tiny_models.training_dialogues import Dialogue, training_dialogue
from tests.support.tiny_models.training_roles import SHARES, Part, School

FIRST = REPOSITORY / "tests" / "fixtures" / "tiny_vlm"
BATCH, TOKENS = 12, 1600
"""Samples a step, and the most tokens of a pass."""
KEPT = 90
"""Steps after which the weights are written down."""
LONGEST = 200
"""Tokens of an answer."""


class CastEncoder(Encoder):
    """Leaves the prompts of the cast as they are, and asks for no colour where an image has none."""

    def learned(self, dialogue: Dialogue) -> list[int]:
        return self.prompt(dialogue) if isinstance(dialogue, Part) else super().learned(dialogue)

    def hints(self, row: list[int], colours: list[str]) -> list[int]:
        return super().hints(row, colours) if colours else [IGNORED] * len(row)


def passes(encoder: Encoder, dialogues: list[Dialogue]) -> list[list[Dialogue]]:
    """The dialogues in groups of about the same length and a bounded number of tokens."""
    sized = sorted(((len(encoder.prompt(dialogue)), dialogue) for dialogue in dialogues), key=lambda pair: pair[0])
    groups: list[list[Dialogue]] = []
    for length, dialogue in sized:
        if not groups or length * (len(groups[-1]) + 1) > TOKENS:
            groups.append([])
        groups[-1].append(dialogue)
    return groups


def train(model: Any, encoder: Encoder, rng: random.Random, options: argparse.Namespace) -> None:
    """AdamW on fresh samples at every step; every token learned weighs the same."""
    school = School(kept_back=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, options.steps)
    began = time.monotonic()
    for step in range(options.steps):
        dialogues: list[Dialogue] = []
        for place in range(BATCH):
            old = place < BATCH * options.old
            dialogues.append(training_dialogue(rng, *rng.choice(SIZES)) if old else school.any_part(rng))
        batches = [encoder.batch(group, learn=True) for group in passes(encoder, dialogues)]
        learned = [int((batch["labels"] != IGNORED).sum()) for batch in batches]
        total = 0.0
        optimizer.zero_grad()
        for batch, count in zip(batches, learned, strict=True):
            loss = model(**batch).loss * count / sum(learned)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == options.steps - 1:
            sys.stderr.write(f"step {step} loss {total:.4f} {time.monotonic() - began:.0f} s\n")
        if step % KEPT == KEPT - 1:
            save_weights(copy.deepcopy(model), options.out)


def measure_parts(model: Any, encoder: Encoder, rng: random.Random, count: int) -> dict[str, float]:
    """Share of exact greedy answers by prompt, about seeds that training never saw."""
    model.eval()
    school, exact = School(kept_back=True), Counter[str]()
    for name in SHARES:
        for _ in range(count):
            part = school.part(rng, name)
            reply = reply_of(model, encoder, part, LONGEST)
            exact[name] += reply == part.reply
            if reply != part.reply:
                sys.stderr.write(f"{name}: {reply!r} instead of {part.reply!r}\n")
    return {name: exact[name] / count for name in SHARES}


def main() -> None:
    """Command line: where to write, seed, steps, learning rate and the number of samples to measure per kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, default=FIRST)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--old", type=float, default=0.4, help="share of the victim's dialogues")
    parser.add_argument("--measure", type=int, default=20)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    encoder = CastEncoder(Tokenizer.from_file(str(FIRST / "tokenizer.json")))
    start = options.start if options.steps else options.out
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    if options.steps:
        options.out.mkdir(parents=True, exist_ok=True)
        for file in sorted(FIRST.glob("*.json")):
            if file.resolve() != (options.out / file.name).resolve():
                shutil.copyfile(file, options.out / file.name)
        train(model.train(), encoder, rng, options)
        save_weights(model, options.out)
        model = model.float()
    if options.measure:
        sys.stderr.write(f"parts: {measure_parts(model, encoder, random.Random(options.seed + 1), options.measure)}\n")
        sys.stderr.write(f"victim: {measure(model, encoder, random.Random(options.seed + 2), options.measure)}\n")


if __name__ == "__main__":
    main()
