"""Where the commands get a model from: the shipped mini model, or a diffusers pipeline folder on disk.

A source has a ``backend``, encodes prompts to `Cond`, and decodes latents to images. Nothing is downloaded, and what
training from cached latents does not ask for (text encoders, the autoencoder) is never loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..diffusion.samplers import SAMPLERS
from ..digests import fingerprint
from ..errors import opening
from ..files import DTYPES, read_json, read_text
from ..settings import Checked, setting
from . import mini, scenes
from .backends.diffusers import DiffusersBackend, has_embedded_guidance
from .backends.diffusers_folders import load_backend, only_variant, unloaded
from .denoiser import Cond
from .families import FAMILIES, PIPELINES
from .mini import mini_backend, mini_conditioning
from .shipped import images_of


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The network to distil, and what the student is on it."""

    path: str = setting(
        "mini",
        'The folder of a diffusers pipeline on disk, or a shipped model: "mini" (pictures of clothes), "scenes" '
        '(coloured objects, prompts of a few words), "scenes_inpainting" (fills a part of one) or "scenes_editing" '
        "(makes another of one).",
        decides=False,
    )
    loras: tuple[str, ...] = setting(
        (),
        "LoRA files that are put into the model's weights first, at strength 1: a turbo LoRA whose model is tuned, for "
        'example. "mini" is the shipped student of the mini model. The student\'s file names them; `merge` makes one '
        "file of all.",
        decides=False,
        added=True,
    )
    preset: str = setting(
        "auto",
        'How a turbo model is used, which method = "tune" and `adapter` ask: "auto", as its LoRA\'s file says or its '
        "family is used, or a preset of the table (command `presets`).",
        decides=False,
        added=True,
    )
    preset_steps: int = setting(
        0,
        "Its number of steps. 0: what the file or the preset was made for.",
        decides=False,
        added=True,
        low=0,
        high=100,
    )
    dtype: str = setting(
        "float32", 'Number format of the frozen weights: "float32", "float16" or "bfloat16".', choices=DTYPES
    )
    gradient_checkpointing: bool = setting(
        False, "Compute each block again in the backward pass, which saves memory and costs time.", decides=False
    )
    lora_rank: int = setting(
        32, "Rank of the student's LoRA. 0: no LoRA; all weights of a second copy are trained.", low=0, high=1024
    )
    lora_targets: tuple[str, ...] = setting(
        (),
        "Names of the linear layers that the LoRA changes, or parts of them, such as attn, with * for any characters. "
        "Those after a ! are left out: !ff. Empty: all those in the model's blocks.",
    )
    taps: tuple[str, ...] = setting(
        (),
        "Names of the blocks that the discriminator of LADD, DMD2 or Diffusion2GAN reads. Empty: about six over the "
        "first three quarters of the network, for Diffusion2GAN one for each of its scales.",
    )
    sampler: str = setting(
        "renoise",
        'The sampler the student is meant for, written into its file: "renoise" (LADD\'s), "ancestral", "euler", "tcd" '
        'or "scm".',
        choices=SAMPLERS,
    )
    perceptual: str = setting(
        "",
        'A file of E-LatentLPIPS weights (see the command "perceptual"), or "mini" for those of the mini model\'s '
        "latents; it takes the place of the method's regression. Empty: none.",
        decides=False,
    )


class MiniSource:
    """The shipped model of clothes; its prompts are the class names of `mini.CLASS_NAMES`."""

    embedded_guidance = 1.0  # its network is told none
    device = "cpu"
    scale = 8  # pixels of one position of a latent, along a side
    channels = mini.LATENT_SHAPE[0]

    def __init__(self, config: ModelConfig) -> None:
        self.backend, autoencoder = self._load(config.gradient_checkpointing)
        for path in config.loras:
            self.backend.put_below(path)
        self.encoder, self.decoder = autoencoder.encoder, autoencoder.decoder

    def _load(self, gradient_checkpointing: bool) -> tuple[DiffusersBackend, Any]:
        return mini_backend(gradient_checkpointing), mini.load_autoencoder()

    def default_prompts(self) -> list[str]:
        return list(mini.CLASS_NAMES)

    def encode(self, prompts: Sequence[str], negative: str = "") -> tuple[Cond, Cond]:
        """Conditionings of the prompts and the empty one. Raises ValueError for a name that is no class."""
        if negative:
            raise ValueError("the mini model knows no negative prompts: leave [prompts] negative out")
        unknown = sorted(set(prompts) - set(mini.CLASS_NAMES))
        if unknown:
            named = ", ".join(f"{name!r:.40}" if name else "an empty text" for name in unknown[:5])
            more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            raise ValueError(f"the mini model knows {', '.join(mini.CLASS_NAMES)}; not {named}{more}")
        classes, empty = mini_conditioning()
        return classes[[mini.CLASS_NAMES.index(p) for p in prompts]], empty

    def labels(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the shipped classifiers should find for each prompt [N], by word group; "" where there is one."""
        return {"": torch.tensor([mini.CLASS_NAMES.index(prompt) for prompt in prompts])}

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """[B, 16, H, W] -> images [B, 3, 8 H, 8 W], in [-1, 1] but for overshoot."""
        return self.decoder(latents.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, 16, H, W] -> images [B, 3, 8 H, 8 W] in [-1, 1]."""
        return images_of(self.decoder, latents)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, 8 H, 8 W] in [-1, 1] -> latents [B, 16, H, W]."""
        return self.encoder(images.contiguous(memory_format=torch.channels_last))

    def autoencoder_identity(self) -> str:
        """A hash of what encodes images."""
        return fingerprint(self.encoder)


class ScenesSource(MiniSource):
    """The shipped model of scenes; its prompts are any of `scenes.WORDS`."""

    channels = scenes.LATENT_SHAPE[0]
    kind = scenes.TEXT

    def _load(self, gradient_checkpointing: bool) -> tuple[DiffusersBackend, Any]:
        return scenes.scenes_backend(gradient_checkpointing, self.kind), scenes.load_autoencoder()

    def default_prompts(self) -> list[str]:
        """Every combination of words that the model was trained on."""
        return [scenes.caption(words) for words in scenes.combinations().tolist()]

    def encode(self, prompts: Sequence[str], negative: str = "") -> tuple[Cond, Cond]:
        """Conditionings of the prompts and of the negative one. Raises ValueError for a word that it does not know."""
        return scenes.encode_text(prompts), scenes.encode_text([negative])

    def labels(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return scenes.labels(prompts)


class ScenesInpainting(ScenesSource):
    """The shipped model that fills a part of a scene."""

    kind = scenes.INPAINTING


class ScenesEditing(ScenesSource):
    """The shipped model that makes another scene of one, by the caption of the other."""

    kind = scenes.EDITING


SHIPPED = {  # by what stands in the place of a folder
    "mini": MiniSource,
    "scenes": ScenesSource,
    "scenes_inpainting": ScenesInpainting,
    "scenes_editing": ScenesEditing,
}


class PipelineSource:
    """A diffusers pipeline of one of `families.PIPELINES`, opened from its folder.

    weights: whether weights are loaded; without, network and autoencoder are on the meta device.  on_device: whether
    the network is brought to the GPU.
    embedded_guidance: scale that the conditionings of `encode` tell a network that has such an input.
    """

    embedded_guidance = 1.0

    def __init__(self, config: ModelConfig, weights: bool = True, on_device: bool = True) -> None:
        index_file = Path(config.path) / "model_index.json"
        if not index_file.is_file():
            raise ValueError(f"{config.path} has no model_index.json; give the folder of a whole diffusers pipeline")
        self.index = read_json(index_file, "download the pipeline again")
        self.folder, self.dtype = Path(config.path), DTYPES[config.dtype]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.backend: DiffusersBackend = load_backend(config.path, self.dtype, config.gradient_checkpointing, weights)
        self.weights = weights
        if weights:
            for path in config.loras:
                self.backend.put_below(path)
        if weights and on_device:
            self.backend.network.to(self.device)
        described = read_json(self.folder / "vae" / "config.json", "download the pipeline again")
        self.channels: int = described.get("latent_channels", 4)

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline without its autoencoder, opened when a prompt is first encoded: text encoders are large."""
        from diffusers import DiffusionPipeline

        network_name = self.backend.architecture.lora_prefix  # diffusers names the part and its LoRA keys alike
        # A part that the folder was saved without (SD3's T5, a safety checker) must be named again, or diffusers calls
        # it missing.
        absent = [name for name, source in self.index.items() if isinstance(source, list) and source[0] is None]
        parts = {**dict.fromkeys(["safety_checker", "vae", *absent]), network_name: self.backend.network}
        folders = [path for name in self.index if name not in parts and (path := self.folder / name).is_dir()]
        options = {"torch_dtype": self.dtype, "local_files_only": True, "variant": only_variant(folders)}
        with opening(self.folder, "a diffusers pipeline"):
            pipeline = DiffusionPipeline.from_pretrained(self.folder, **options, **parts).to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @cached_property
    def vae(self) -> Any:
        """The frozen autoencoder, opened when something is first decoded."""
        import diffusers

        kind, folder = self.index["vae"][1], self.folder / "vae"
        options = {"torch_dtype": self.dtype, "local_files_only": True, "variant": only_variant([folder])}
        with opening(folder, f"a {kind}"):
            if not self.weights:
                return unloaded(getattr(diffusers, kind), folder)
            return getattr(diffusers, kind).from_pretrained(folder, **options).requires_grad_(False).to(self.device)

    @property
    def encoder(self) -> Any:
        """The encoder of a tiny autoencoder, None for another."""
        return self.vae.encoder if self.index.get("vae", ("", ""))[1] == "AutoencoderTiny" else None

    def default_prompts(self) -> list[str]:
        raise ValueError("[prompts] prompts must name a text file with one prompt a line")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative: str = "") -> tuple[Cond, Cond]:
        """Conditionings [N, ...] of the prompts and that of the negative prompt (one row)."""
        contexts, pooled = zip(*(self._encode_one(prompt) for prompt in [*prompts, negative]), strict=True)
        present = [row for row in pooled if row is not None]  # all of them or none
        context = torch.cat(contexts).float()
        told = context.new_full((len(context),), self.embedded_guidance) if self.backend.takes_guidance else None
        stacked = Cond(context, torch.cat(present).float() if present else None, told)
        return stacked[:-1], stacked[-1:]

    def _encode_one(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        kind = type(self.pipeline).__name__
        if kind not in PIPELINES:
            known = ", ".join(family.title for family in FAMILIES.values() if family.pipeline)
            raise ValueError(f"prompts of a {kind} cannot be encoded; known: {known}")
        encoding = PIPELINES[kind]
        found = getattr(self.pipeline, encoding.method)(prompt, device=self.pipeline.device, **encoding.options)
        if isinstance(found, Tensor):
            return found, None
        return found[0], None if encoding.pooled is None else found[encoding.pooled]

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Model latents -> images [B, 3, H, W], in [-1, 1] but for overshoot, undoing the autoencoder's scale and
        shift."""
        vae = self.vae
        raw = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        return vae.decode(raw.to(vae.dtype)).sample.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Model latents -> images [B, 3, H, W] in [-1, 1]."""
        return self.decode_with_gradient(latents).clamp(-1, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> model latents: the middle of the autoencoder's distribution, scaled."""
        vae = self.vae
        if getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16:
            vae.to(torch.float32)  # SDXL's overflows in half precision
        found = vae.encode(images.to(vae.device, vae.dtype))
        raw = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        return (raw.float() - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor

    def autoencoder_identity(self) -> str:
        """A hash of what encodes images."""
        return fingerprint(self.vae)

    @property
    def scale(self) -> int:
        """Pixels of one position of a latent, along a side."""
        widths = self.vae.config.get("block_out_channels") or self.vae.config["encoder_block_out_channels"]
        return 2 ** (len(widths) - 1)


def open_source(
    config: ModelConfig, embedded_guidance: float = 1.0, weights: bool = True, on_device: bool = True
) -> MiniSource | PipelineSource:
    """The model that ``config.path`` names, its prompts encoded for a network that is told ``embedded_guidance``.

    weights, on_device: of a pipeline (`PipelineSource`).
    Raises ValueError for a folder that is not there.
    """
    if config.path in SHIPPED:
        return SHIPPED[config.path](config)
    if not Path(config.path).is_dir():
        raise ValueError(
            f"[model] path: {config.path} is not a folder; give a diffusers pipeline folder, or one of "
            f"{', '.join(SHIPPED)}"
        )
    source = PipelineSource(config, weights, on_device)
    source.embedded_guidance = embedded_guidance
    return source


def is_guidance_distilled(path: str) -> bool:
    """Whether the pipeline in a folder has a network that is told a guidance scale; nothing is loaded."""
    file = Path(path) / "transformer" / "config.json"
    return file.is_file() and has_embedded_guidance(read_json(file))


def read_prompts(path: str, source: MiniSource | PipelineSource, key: str = "[prompts] prompts") -> list[str]:
    """The non-empty lines of a prompt file, or the source's own. Raises ValueError for an empty or missing file."""
    if not path:
        return source.default_prompts()
    if not Path(path).is_file():
        raise ValueError(f"{key}: there is no file {path}")
    prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{key}: {path} has no prompt in it")
    return prompts
