"""The work of the command line from Python: make a small run, extend it, read it.   python examples/notebook.py"""

import tempfile
from collections import Counter
from pathlib import Path

import intersafe
from intersafe.storage.bundled import bundled


def main() -> None:
    """Generates twenty dialogues with the scripted models, then ten more, and prints some of the result."""
    folder = Path(tempfile.mkdtemp(prefix="intersafe-"))
    recipe = intersafe.override(intersafe.load_recipe(bundled("pipelines/demo.yaml")), seed=7)
    intersafe.generate_dialogues(recipe, run=folder / "run", n=20)
    run = intersafe.generate_dialogues(recipe, run=folder / "run", n=30)  # resumes; the first twenty do not change

    safety = Counter(turn.verdict.safety for dialogue in run.dialogues() for turn in dialogue.turns)
    print(f"{run.path}: {run.funnel().accepted} dialogues, {run.funnel().mean_turns:.2f} turns each, {dict(safety)}")

    dialogue = next(dialogue for dialogue in run.dialogues() if dialogue.images)
    picture = run.image(dialogue.images[0])
    print(f"dialogue {dialogue.id} about {dialogue.seed.category} shows an image of {len(picture):,} bytes")
    for message in dialogue.messages:
        print(f"  {message.role:<9} {message.text}")


if __name__ == "__main__":
    main()
