"""Builds and trains `tests/fixtures/tiny_vlm`: a Qwen2.5-VL of 0.8 M parameters.

It behaves as `training_dialogues.py` tells.

One-off, in an environment of its own (Python 3.11; torch first, so that the CPU build is taken; no torchvision):

    pip install torch==2.13.0
    pip install transformers==5.19.0 tokenizers==0.23.3 safetensors==0.8.0 numpy==2.4.6 pillow==13.0.0
    python -m tests.support.tiny_models.build_vlm tests/fixtures/tiny_vlm

What a large model works out by itself, the chat template helps this one with: it puts `<|latest|>` behind the images
and marker words of the latest message, `<|earlier|>` behind the most recent images of the dialogue if they are in an
earlier one, and numbers the reply, `<|turn_n|>`. Takes some ten minutes of one core. The seed fixes the bytes on one
kind of processor; elsewhere floating point may differ in the last place.
"""

import argparse
import json
import math
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jinja2
import torch  # type: ignore[import-not-found]
from PIL import Image
from safetensors.torch import load_file, save_file  # type: ignore[import-not-found]
from tokenizers import (  # type: ignore[import-not-found]
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from transformers import (  # type: ignore[import-not-found]
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    get_cosine_schedule_with_warmup,
)

from tests.support.tiny_models.training_dialogues import (
    FRESH,
    HUES,
    MARKERS,
    MAX_TURNS,
    REFUSAL,
    Dialogue,
    make_dialogue,
    training_dialogue,
    training_text,
    wanted,
)

PATCH, MERGE, VOCAB, HIDDEN, LAYERS, CONTEXT = 14, 2, 1024, 128, 3, 8192
# Most user messages and most words of each: the further training is, the more of these sizes it draws from.
SIZES: tuple[tuple[int, int], ...] = (
    *((1, 10), (2, 10), (3, 12), (1, 60), (3, 20), (7, 8), (4, 25)),
    *((7, 15), (2, 60), (1, 150), (7, 30), (7, 30), (7, 60), (7, 60)),
)
BATCH, SHARE, IGNORED = 16, 8, -100
MIN_PIXELS, MAX_PIXELS = 6 * 28**2, 9 * 28**2  # images of about the same number of tokens are told apart best
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
END, START, STOP, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"
SPECIALS = [END, START, STOP, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", PAD, "<|video_pad|>"]
SPECIALS += ["<|latest|>", "<|earlier|>"] + [f"<|turn_{n}|>" for n in range(1, MAX_TURNS + 1)]
TEMPLATE = """
{%- macro flat(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}{%- for part in content -%}
    {%- if part['type'] == 'image' or part['type'] == 'image_url' -%}<|vision_start|><|image_pad|><|vision_end|>
    {%- elif 'text' in part -%}{{ part['text'] }}{%- endif -%}
  {%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set seen = namespace(turns=0, pictured=-1) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{%- set seen.turns = seen.turns + 1 -%}{%- endif -%}
  {%- if '<|vision_start|>' in flat(message['content']) -%}{%- set seen.pictured = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set text = flat(message['content']) -%}
  {%- if loop.last and message['role'] == 'user' -%}
    {%- for word in ['<|vision_end|>', 'forbidden', 'Forbidden', 'FORBIDDEN'] -%}
      {%- set seen.text = (text if loop.first else seen.text) | replace(word, word ~ '<|latest|>') -%}
    {%- endfor -%}
    {%- set text = seen.text | replace('<|latest|><|vision_start|>', '<|vision_start|>') -%}
  {%- elif loop.index0 == seen.pictured -%}
    {%- set text = text | replace('<|vision_end|>', '<|vision_end|><|earlier|>') -%}
    {%- set text = text | replace('<|earlier|><|vision_start|>', '<|vision_start|>') -%}
  {%- endif -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\n' ~ text ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant<|turn_' ~ [seen.turns, 9] | min ~ '|>\n' }}{%- endif -%}
"""


def train_tokenizer(rng: random.Random) -> Any:
    """Byte-level BPE on text of this script's own making; the specials take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    replies = [wanted(Dialogue(colours=[colour]), now, False, 1) for colour in HUES for now in (True, False)]
    texts = [training_text(rng, 60) for _ in range(3000)] + [*replies, "Sure. This is answer number 1.", REFUSAL] * 300
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(MARKERS),
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # As added tokens the marker words stay whole everywhere, even inside a longer word.
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in MARKERS])
    return tokenizer


def flat_config(tokenizer: Any) -> dict[str, Any]:
    """The `config.json` in the flat layout of the published Qwen2.5-VL checkpoints, which mistralrs demands."""
    token = tokenizer.token_to_id
    vision: dict[str, Any] = {
        "model_type": "qwen2_5_vl",
        "depth": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "in_channels": 3,
        "in_chans": 3,
        "out_hidden_size": HIDDEN,
        "patch_size": PATCH,
        "spatial_patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.08,
    }
    ids = ("vision_start", "vision_end", "video", "image")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": CONTEXT,
        "sliding_window": CONTEXT,
        "use_sliding_window": False,
        "max_window_layers": LAYERS,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "attention_dropout": 0.0,
        "initializer_range": 0.08,
        "use_cache": True,
        "bos_token_id": token(END),
        "eos_token_id": token(STOP),
        **{f"{name}_token_id": token(f"<|{name if 'vision' in name else name + '_pad'}|>") for name in ids},
        "vision_token_id": token("<|vision_pad|>"),
        "vision_config": vision,
    }


def preprocessor_config() -> dict[str, Any]:
    """The `preprocessor_config.json`: 6 to 9 tokens an image, the bounds where old and where new readers look."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "resample": 3,
        "image_mean": MEAN,
        "image_std": STD,
    }


def tokenizer_config(tokenizer: Any) -> dict[str, Any]:
    """The `tokenizer_config.json`, chat template included."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {name: {"content": name, "special": name in SPECIALS, **flags} for name in SPECIALS + MARKERS}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(tokenizer.token_to_id(name)): entry for name, entry in added.items()},
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": STOP,
        "pad_token": END,
        "unk_token": None,
        "model_max_length": CONTEXT,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "chat_template": TEMPLATE,
    }


def write_configs(out: Path, tokenizer: Any) -> None:
    """Everything of the checkpoint but the weights."""
    token = tokenizer.token_to_id
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    files = {
        "config.json": flat_config(tokenizer),
        "preprocessor_config.json": preprocessor_config(),
        "tokenizer_config.json": tokenizer_config(tokenizer),
        "generation_config.json": {"eos_token_id": [token(STOP), token(END)], "pad_token_id": token(END)},
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=1) + "\n")


def grid(image: Image.Image) -> tuple[int, int]:
    """Rows and columns of patches, both even: `smart_resize` of Qwen2-VL with its pixel bounds."""
    unit, sides = PATCH * MERGE, (image.height, image.width)
    rows, columns = (max(1, round(side / unit)) for side in sides)
    pixels = rows * columns * unit**2
    scale = (max(MIN_PIXELS, min(pixels, MAX_PIXELS)) / (image.width * image.height)) ** 0.5
    if pixels > MAX_PIXELS:
        rows, columns = (max(1, math.floor(side * scale / unit)) for side in sides)
    elif pixels < MIN_PIXELS:
        rows, columns = (math.ceil(side * scale / unit) for side in sides)
    return rows * MERGE, columns * MERGE


def patches(image: Image.Image) -> torch.Tensor:
    """The image as (rows * columns, 3 * 2 * 14 * 14) normalised patches in the order of the 2x2 merge."""
    rows, columns = grid(image)
    resized = image.resize((columns * PATCH, rows * PATCH), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).float().div(255)
    pixels = (pixels.view(-1, 3) - torch.tensor(MEAN)) / torch.tensor(STD)
    pixels = pixels.view(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3).permute(0, 3, 1, 4, 6, 2, 5)
    return pixels.unsqueeze(5).expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(rows * columns, -1)


def scrambled(ids: list[int]) -> list[int]:
    """The ids with up to half of the ordinary ones replaced by any others: text beyond all words made up."""
    share = max(0.0, float(torch.rand(())) - 0.5)
    ordinary = range(len(SPECIALS), VOCAB - len(MARKERS))
    draws, others = torch.rand(len(ids)).tolist(), torch.randint(ordinary.start, ordinary.stop, (len(ids),)).tolist()
    rows = zip(ids, draws, others, strict=True)
    return [other if one in ordinary and draw < share else one for one, draw, other in rows]


class Encoder:
    """Dialogues to tensors, with the very template that the checkpoint ships."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.token = tokenizer, tokenizer.token_to_id
        self.template = jinja2.Environment(autoescape=False).from_string(TEMPLATE)

    def prompt(self, dialogue: Dialogue) -> list[int]:
        """Token ids up to the start of the reply, one image token per merged patch."""
        text = self.template.render(messages=dialogue.messages, add_generation_prompt=True)
        text = re.sub(r"<\|turn_\d\|>", f"<|turn_{dialogue.number}|>", text)
        first, *rest = text.split(PAD)
        for image, tail in zip(dialogue.images, rest, strict=True):
            rows, columns = grid(image)
            first += PAD * (rows * columns // MERGE**2) + tail
        return list(self.tokenizer.encode(first).ids)

    def learned(self, dialogue: Dialogue) -> list[int]:
        """The prompt as training shows it."""
        return scrambled(self.prompt(dialogue))

    def hints(self, row: list[int], colours: list[str]) -> list[int]:
        """Labels of the prompt: the end of every image, and the mark behind it, shall tell that image's colour."""
        end, marks = self.token("<|vision_end|>"), [self.token("<|latest|>"), self.token("<|earlier|>")]
        label, remaining = [IGNORED] * len(row), iter(colours)
        for place, one in enumerate(row[:-1]):
            if one == end:
                label[place + 1] = self.tokenizer.encode(f" {next(remaining)}").ids[0]
            elif one in marks and row[place - 1] == end:
                label[place + 1] = label[place]
        return label

    def batch(self, dialogues: list[Dialogue], *, learn: bool) -> dict[str, torch.Tensor]:
        """Model inputs; with `learn` the replies are appended and labelled, all else is masked."""
        rows, labels = [], []
        for dialogue in dialogues:
            row = self.learned(dialogue) if learn else self.prompt(dialogue)
            label = self.hints(row, dialogue.colours) if learn else []
            for text, learned in [*(dialogue.pieces or [(dialogue.reply, True)]), (STOP, True)] if learn else []:
                ids = self.tokenizer.encode(text).ids
                row, label = row + ids, label + (ids if learned else [IGNORED] * len(ids))
            rows.append(torch.tensor(row))
            labels.append(torch.tensor(label))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        lengths = torch.tensor([len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
        inputs["mm_token_type_ids"] = (ids == self.token(PAD)).int()
        images = [image for dialogue in dialogues for image in dialogue.images]
        if images:
            inputs["pixel_values"] = torch.cat([patches(image) for image in images])
            inputs["image_grid_thw"] = torch.tensor([(1, *grid(image)) for image in images])
        if learn:
            inputs["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        return inputs


def train(model: Any, encoder: Encoder, rng: random.Random, steps: int) -> None:
    """AdamW on fresh samples at every step; short dialogues first, then up to 7 turns of 60 words and more."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    began = time.monotonic()
    for step in range(steps):
        reach = 2 + int(1.7 * len(SIZES) * step / steps)
        dialogues = [training_dialogue(rng, *rng.choice(SIZES[:reach])) for _ in range(BATCH)]
        dialogues.sort(key=lambda dialogue: sum(len(message["content"]) for message in dialogue.messages))
        total = 0.0
        optimizer.zero_grad()
        for first in range(0, BATCH, SHARE):  # neighbours in length share a pass: less padding
            loss = model(**encoder.batch(dialogues[first : first + SHARE], learn=True)).loss * SHARE / BATCH
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            sys.stderr.write(f"step {step} loss {total:.3f} {time.monotonic() - began:.0f} s\n")


def reply_of(model: Any, encoder: Encoder, dialogue: Dialogue, most: int) -> str:
    """The greedy reply of at most `most` tokens."""
    inputs = encoder.batch([dialogue], learn=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=most, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return str(encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=True))


def measure(model: Any, encoder: Encoder, rng: random.Random, count: int) -> dict[str, float]:
    """Share of exact greedy replies per kind, on text and pictures that training never saw."""
    model.eval()
    scores = {}
    for kind in "abcd":
        exact = 0
        for _ in range(count):
            turns = rng.randint(2 if kind == "c" else 1, 7)
            dialogue = make_dialogue(rng, FRESH, turns, 60, kind)
            reply = reply_of(model, encoder, dialogue, 30)
            exact += reply == dialogue.reply
            if reply != dialogue.reply:
                sys.stderr.write(f"kind {kind}, turn {turns}: {reply!r} instead of {dialogue.reply!r}\n")
        scores[kind] = exact / count
    return scores


def save_weights(model: Any, out: Path) -> None:
    """Bfloat16 weights under the names of the published layout, which only `save_pretrained` knows."""
    with tempfile.TemporaryDirectory() as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        weights = load_file(Path(folder) / "model.safetensors")
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()}, out / "model.safetensors", {"format": "pt"}
    )


def main() -> None:
    """Command line: where to write, seed, steps and the number of samples to measure per kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--measure", type=int, default=100)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # as fast as two at this size, and the order of sums is fixed
    tokenizer = train_tokenizer(rng)
    encoder = Encoder(tokenizer)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**flat_config(tokenizer))).float()
    train(model.train(), encoder, rng, options.steps)
    scores = measure(model.to(torch.bfloat16).float(), encoder, random.Random(options.seed + 1), options.measure)
    options.out.mkdir(parents=True, exist_ok=True)
    write_configs(options.out, tokenizer)
    save_weights(model, options.out)
    size = sum(path.stat().st_size for path in options.out.iterdir())
    sys.stderr.write(f"exact on fresh samples: {scores}; {size:,} bytes\n")


if __name__ == "__main__":
    main()
