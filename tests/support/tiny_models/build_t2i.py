"""Tiny text-to-image pipelines with random weights, put together offline in seconds: they draw noise, but honestly.

    python tests/support/tiny_models/build_t2i.py FAMILY OUT        FAMILY: qwen_image or stable_diffusion

The prompt, the seed, the steps, the guidance and the negative prompt each change the noise as they change a picture of
the real model, and nothing else does. The text encoder of `qwen_image` is the tiny vision-language model of
`tests/fixtures`.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found]
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel  # type: ignore[import-not-found]
from transformers import (  # type: ignore[import-not-found]
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2_5_VLForConditionalGeneration,
)

FIXTURE = Path(__file__).parents[2] / "fixtures" / "tiny_vlm"


def qwen_image() -> Any:
    """Qwen-Image: flow matching over the latents of a video autoencoder, guided by a vision-language model."""
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(FIXTURE, dtype=torch.float32)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=encoder.config.text_config.hidden_size,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return QwenImagePipeline(
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=AutoTokenizer.from_pretrained(FIXTURE),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def stable_diffusion() -> Any:
    """Stable Diffusion 1: a U-Net over the latents of an image autoencoder, guided by CLIP's text tower."""
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    text = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModel(text),
        tokenizer=_byte_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _byte_tokenizer() -> Any:
    """CLIP's tokenizer with the 256 bytes for a vocabulary."""
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "!", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    with tempfile.TemporaryDirectory() as folder:
        paths = {"vocab": Path(folder, "vocab.json"), "merges": Path(folder, "merges.txt")}
        paths["vocab"].write_text(json.dumps(vocabulary))
        paths["merges"].write_text("#version: 0.2\n")
        return CLIPTokenizer(
            **{name: str(path) for name, path in paths.items()},
            model_max_length=77,
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            pad_token="!",
        )


FAMILIES: dict[str, Callable[[], Any]] = {"qwen_image": qwen_image, "stable_diffusion": stable_diffusion}


def build(family: str, out: Path) -> Path:
    """Writes the pipeline to a folder, the same weights each time, and gives the folder back."""
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(out)
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="A tiny text-to-image pipeline with random weights.")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    build(options.family, options.out)


if __name__ == "__main__":
    main()
