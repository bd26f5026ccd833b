"""A node pack for the tests' server: a CLIP small enough to need no file, and texts of random numbers."""

import hashlib
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.sd1_clip
import torch


class TinyClip:
    """A text encoder of one layer with the mini model's width of 64 and random weights."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def make(self) -> tuple:
        config = json.loads((Path(comfy.sd1_clip.__file__).parent / "sd1_clip_config.json").read_text())
        config |= {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
        kind = partial(comfy.sd1_clip.SD1ClipModel, clip_model=comfy.sd1_clip.SDClipModel)
        target = SimpleNamespace(
            params={"textmodel_json_config": config}, clip=kind, tokenizer=comfy.sd1_clip.SD1Tokenizer
        )
        clip = comfy.sd.CLIP(target, disable_dynamic=True)
        generator = torch.Generator().manual_seed(0)
        for value in clip.cond_stage_model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        return (clip,)


class RandomConditioning:
    """Prompts of random numbers in the shapes that a network takes."""

    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_IS_LIST = (True,)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        number = ("INT", {"default": 0, "max": 2**31})
        return {"required": {name: number for name in ("width", "tokens", "pooled", "count", "seed")}}

    def make(self, width: int, tokens: int, pooled: int, count: int, seed: int) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        options = [
            {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {} for _ in range(count)
        ]
        return ([[[torch.randn(1, tokens, width, generator=generator), option]] for option in options],)


class RandomText:
    """What stands for a text encoder: each text is random numbers of its own, in the shapes that a network takes."""

    def __init__(self, width: int, tokens: int, pooled: int) -> None:
        self.width, self.tokens, self.pooled = width, tokens, pooled

    def tokenize(self, text: str, **options) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **options) -> list:
        seed = int.from_bytes(hashlib.sha256(tokens.encode()).digest()[:4])
        generator = torch.Generator().manual_seed(seed)
        context = torch.randn(1, self.tokens, self.width, generator=generator)
        return [[context, {"pooled_output": torch.randn(1, self.pooled, generator=generator)} if self.pooled else {}]]


class RandomClip:
    """A CLIP of a given width without a file, for models at full size."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        number = ("INT", {"default": 0, "max": 2**31})
        return {"required": {name: number for name in ("width", "tokens", "pooled")}}

    def make(self, width: int, tokens: int, pooled: int) -> tuple:
        return (RandomText(width, tokens, pooled),)


class GivenNoise:
    """A LATENT as the noise of core's samplers."""

    RETURN_TYPES = ("NOISE",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"latent": ("LATENT",)}}

    def make(self, latent: dict) -> tuple:
        return (SimpleNamespace(seed=0, generate_noise=lambda start: latent["samples"].clone()),)


NODE_CLASS_MAPPINGS = {
    "TestGivenNoise": GivenNoise,
    "TestTinyClip": TinyClip,
    "TestRandomConditioning": RandomConditioning,
    "TestRandomClip": RandomClip,
}
