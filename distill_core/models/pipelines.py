"""Where the commands get a model from: the shipped mini model, or a diffusers pipeline folder on disk.

A source has a ``backend``, encodes prompts to `Cond`, and decodes latents to images. Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..diffusion.samplers import SAMPLERS
from ..files import DTYPES
from ..settings import setting
from . import mini
from .backends.diffusers import DiffusersBackend, load_backend
from .denoiser import Cond
from .families import FAMILIES, PIPELINES
from .mini import mini_backend, mini_conditioning


@dataclass(frozen=True)
class ModelConfig:
    """The network to distil, and what the student is on it."""

    path: str = setting(
        "mini", 'The folder of a diffusers pipeline on disk, or "mini" for the shipped model.', decides=False
    )
    dtype: str = setting("float32", 'Number format of the frozen weights: "float32", "float16" or "bfloat16".')
    gradient_checkpointing: bool = setting(
        False, "Compute each block again in the backward pass, which saves memory and costs time.", decides=False
    )
    lora_rank: int = setting(32, "Rank of the student's LoRA. 0: no LoRA; all weights of a second copy are trained.")
    lora_targets: tuple[str, ...] = setting(
        (), "Names of the linear layers that the LoRA changes. Empty: all those in the model's blocks."
    )
    taps: tuple[str, ...] = setting(
        (),
        "Names of the blocks that the discriminator of LADD or Diffusion2GAN reads. Empty: for LADD about six over the "
        "first three quarters of the network, for Diffusion2GAN one for each of its scales.",
    )
    sampler: str = setting(
        "renoise",
        'The sampler the student is meant for, written into its file: "renoise" (LADD\'s), "ancestral", "euler", "tcd" '
        'or "scm".',
    )
    perceptual: str = setting(
        "",
        'A file of E-LatentLPIPS weights (see the command "perceptual"), or "mini" for those of the mini model\'s '
        "latents; it takes the place of the method's regression. Empty: none.",
        decides=False,
    )

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {list(SAMPLERS)}, not {self.sampler!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {list(DTYPES)}, not {self.dtype!r}")


class MiniSource:
    """The shipped model; its prompts are the class names of `mini.CLASS_NAMES`."""

    def __init__(self, config: ModelConfig) -> None:
        self.backend = mini_backend(config.gradient_checkpointing)
        self.channels = mini.LATENT_SHAPE[0]
        autoencoder = mini.load_autoencoder()
        self.encoder, self.decoder = autoencoder.encoder, autoencoder.decoder

    def default_prompts(self) -> list[str]:
        return list(mini.CLASS_NAMES)

    def encode(self, prompts: Sequence[str], negative: str = "") -> tuple[Cond, Cond]:
        """Conditionings of the prompts and the empty one. Raises ValueError for a name that is no class."""
        unknown = sorted(set(prompts) - set(mini.CLASS_NAMES))
        if unknown:
            raise ValueError(f"the mini model knows {', '.join(mini.CLASS_NAMES)}; not {', '.join(unknown)}")
        classes, empty = mini_conditioning()
        return classes[[mini.CLASS_NAMES.index(p) for p in prompts]], empty

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """[B, 16, H, W] -> images [B, 3, 8 H, 8 W], in [-1, 1] but for overshoot."""
        return self.decoder(latents.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B, 16, H, W] -> images [B, 3, 8 H, 8 W] in [-1, 1]."""
        return self.decode_with_gradient(latents).clamp(-1, 1)


class PipelineSource:
    """A diffusers pipeline of one of `families.PIPELINES`, opened from its folder."""

    def __init__(self, config: ModelConfig) -> None:
        from diffusers import DiffusionPipeline

        index_file = Path(config.path) / "model_index.json"
        if not index_file.is_file():
            raise ValueError(f"{config.path} has no model_index.json; give the folder of a whole diffusers pipeline")
        index = json.loads(index_file.read_text())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = DTYPES[config.dtype]
        self.backend: DiffusersBackend = load_backend(config.path, dtype, config.gradient_checkpointing)
        self.backend.network.to(device)
        network_name = self.backend.architecture.lora_prefix  # diffusers names the part and its LoRA keys alike
        # Only text encoders and autoencoder are wanted here; the network is the backend's own copy. A part that the
        # folder was saved without (SD3's T5, a safety checker) must be named again, or diffusers calls it missing.
        absent = [name for name, source in index.items() if isinstance(source, list) and source[0] is None]
        parts = {**dict.fromkeys(["safety_checker", *absent]), network_name: self.backend.network}
        self.pipeline = DiffusionPipeline.from_pretrained(
            config.path, torch_dtype=dtype, local_files_only=True, **parts
        ).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.vae.requires_grad_(False)
        self.channels = self.pipeline.vae.config.latent_channels
        self.encoder = self.pipeline.vae.encoder if type(self.pipeline.vae).__name__ == "AutoencoderTiny" else None

    def default_prompts(self) -> list[str]:
        raise ValueError("[prompts] prompts must name a text file with one prompt a line")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], negative: str = "") -> tuple[Cond, Cond]:
        """Conditionings [N, ...] of the prompts and that of the negative prompt (one row)."""
        contexts, pooled = zip(*(self._encode_one(prompt) for prompt in [*prompts, negative]), strict=True)
        present = [row for row in pooled if row is not None]  # all of them or none
        stacked = Cond(torch.cat(contexts).float(), torch.cat(present).float() if present else None)
        return stacked[:-1], stacked[-1:]

    def _encode_one(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        kind = type(self.pipeline).__name__
        if kind not in PIPELINES:
            known = ", ".join(family.title for family in FAMILIES.values() if family.pipeline)
            raise ValueError(f"prompts of a {kind} cannot be encoded; known: {known}")
        encoding = PIPELINES[kind]
        found = self.pipeline.encode_prompt(prompt, device=self.pipeline.device, **encoding.options)
        return found[0], None if encoding.pooled is None else found[encoding.pooled]

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Model latents -> images [B, 3, H, W], in [-1, 1] but for overshoot, undoing the autoencoder's scale and
        shift."""
        vae = self.pipeline.vae
        raw = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
        return vae.decode(raw.to(vae.dtype)).sample.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Model latents -> images [B, 3, H, W] in [-1, 1]."""
        return self.decode_with_gradient(latents).clamp(-1, 1)


def open_source(config: ModelConfig) -> MiniSource | PipelineSource:
    """The model that ``config.path`` names. Raises ValueError for a folder that is not there."""
    if config.path == "mini":
        return MiniSource(config)
    if not Path(config.path).is_dir():
        raise ValueError(f'[model] path: {config.path} is not a folder; give a diffusers pipeline folder or "mini"')
    return PipelineSource(config)


def read_prompts(path: str, source: MiniSource | PipelineSource) -> list[str]:
    """The non-empty lines of a prompt file, or the source's own. Raises ValueError for an empty or missing file."""
    if not path:
        return source.default_prompts()
    if not Path(path).is_file():
        raise ValueError(f"[prompts] prompts: there is no file {path}")
    prompts = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"[prompts] prompts: {path} has no prompt in it")
    return prompts
