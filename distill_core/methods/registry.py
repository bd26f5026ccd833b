"""From settings to a method: student, teacher and discriminator on one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..discriminators.latent import LatentDiscriminator
from ..discriminators.network import NetworkDiscriminator
from ..discriminators.pixel import PixelDiscriminator, text_embedding
from ..models.denoiser import Denoiser
from ..models.vision import VisionNetwork, efficientnet_vision, encoder_vision, image_embedding, transformers_vision
from ..settings import setting
from .add import ADD, ADDConfig
from .base import Distance, MethodConfig, StudentMethod
from .diffusion2gan import Diffusion2GAN, Diffusion2GANConfig
from .ladd import LADD, LADDConfig

METHODS = {"ladd": LADDConfig, "add": ADDConfig, "diffusion2gan": Diffusion2GANConfig}
TITLES = {"ladd": "LADD", "add": "ADD", "diffusion2gan": "Diffusion2GAN"}
ENCODER, EFFICIENTNET = "encoder", "efficientnet"


def name_of(config: MethodConfig) -> str:
    """The method that ``config`` is of, as `METHODS` calls it."""
    return next(name for name, kind in METHODS.items() if isinstance(config, kind))


def title_of(config: MethodConfig) -> str:
    """The method with the terms that are not its own: "LADD + pairs", "ADD"."""
    name = name_of(config)
    own = {"adversarial", *METHODS[name]().terms}
    return " + ".join([TITLES[name], *(term for term, weight in config.terms.items() if weight and term not in own)])


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Size of each discriminator head on feature maps (LADD, Diffusion2GAN)."""

    width: int = setting(64, "Channels of each discriminator head.")
    blocks: int = setting(2, "Residual blocks of each discriminator head.")
    kernel: int = setting(3, "Side of the convolution kernels in the discriminator heads, an odd number.")


@dataclass(frozen=True)
class VisionConfig:
    """The frozen vision network that ADD's discriminator reads, and what decodes images for it."""

    network: str = setting(
        ENCODER,
        "The folder of a DINOv2 in transformers' format, \"encoder\" for the encoder of the model's tiny autoencoder, "
        'or "efficientnet" for an ImageNet network that comes as a package (the extra "metrics").',
    )
    size: int = setting(
        0, 'Side in pixels of the square images it sees. 0: 224, or the images\' own size with network = "encoder".'
    )
    blocks: int = setting(4, "At how many of its blocks a DINOv2 is read, one discriminator head for each.")
    decoder: str = setting(
        "",
        "The folder of a diffusers AutoencoderTiny (TAESD) that decodes in place of the model's own autoencoder, at a "
        "fraction of the cost. Empty: the model's own.",
    )


@dataclass(frozen=True)
class Components:
    """A model as the methods need it.

    backend: `backends.diffusers.DiffusersBackend` or one like it.  decode: latents -> images in [-1, 1] with gradients,
    or None.  encoder: that of a tiny autoencoder, or None.  vision: an open vision network, in place of the one that
    `VisionConfig` names.
    """

    backend: object
    decode: Callable[[Tensor], Tensor] | None = None
    encoder: object = None
    vision: VisionNetwork | None = None


def tiny_decoder(folder: str | Path) -> Components:
    """Decoder and encoder of the diffusers ``AutoencoderTiny`` in a folder. Raises ValueError when there is none."""
    from diffusers import AutoencoderTiny

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"[vision] decoder: {folder} is not the folder of a diffusers AutoencoderTiny (TAESD)")
    tiny = AutoencoderTiny.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
    return Components(None, lambda latents: tiny.decode(latents).sample, tiny.encoder)


def open_vision(config: VisionConfig, parts: Components) -> VisionNetwork:
    """The vision network of ``parts``, or that which ``config`` names. Raises ValueError when it is not there."""
    if parts.vision is not None:
        return parts.vision
    if config.network == EFFICIENTNET:
        return efficientnet_vision(config.size or 224)
    if config.network != ENCODER:
        return transformers_vision(config.network, config.blocks, config.size or 224)
    if parts.encoder is None:
        raise ValueError(
            'ADD needs a frozen vision network: set [vision] network to the folder of a DINOv2 or to "efficientnet", '
            "or [vision] decoder to the folder of a tiny autoencoder (TAESD), whose encoder can serve"
        )
    return encoder_vision(parts.encoder, (config.size, config.size) if config.size else None)


def trainable_view(parts: Components, rank: int, targets=None) -> Denoiser:
    """A low-rank path on the shared backbone or, with rank 0, a trainable copy of it."""
    if rank:
        return Denoiser(parts.backend, parts.backend.new_lora(rank, targets or None))
    return Denoiser(parts.backend.trainable_copy())


def new_method(
    config: MethodConfig,
    parts: Components,
    example: Batch,
    rank: int,
    uncond=None,
    guidance: float = 1.0,
    targets=None,
    taps=None,
    heads: DiscriminatorConfig = DiscriminatorConfig(),
    vision: VisionConfig = VisionConfig(),
    distance: Distance | None = None,
) -> StudentMethod:
    """The method that ``config`` is of, with fresh weights from torch's global generator.

    example: a batch whose shapes the discriminator must fit.  rank: of the student, 0 for full fine-tuning.
    taps: blocks that LADD's and Diffusion2GAN's heads read.  Raises ValueError for parts that are missing.
    """
    backend = parts.backend
    student, teacher = trainable_view(parts, rank, targets), Denoiser(backend)
    adversarial, last = config.weight("adversarial") > 0, (config, uncond, guidance, distance)
    if isinstance(config, LADDConfig):
        taps = list(taps or backend.default_taps())
        discriminator = LatentDiscriminator.for_teacher(teacher, taps, example, **asdict(heads))
        return LADD(student, teacher, discriminator, taps, *last)
    if isinstance(config, ADDConfig):
        if vision.decoder:
            tiny = tiny_decoder(vision.decoder)
            parts = replace(parts, decode=tiny.decode, encoder=tiny.encoder)
        network = open_vision(vision, parts) if adversarial else None
        discriminator = pixel_discriminator(config, network, parts, example) if adversarial else None
        return ADD(student, teacher, discriminator, network, parts.decode, *last)
    discriminator = None
    if adversarial:
        critic = trainable_view(parts, config.critic_rank if config.critic == "lora" else 0)
        reads, entries = backend.multi_scale_taps()
        discriminator = NetworkDiscriminator.for_critic(
            critic,
            taps or reads,
            entries,
            example,
            config.multi_scale,
            config.noise_condition,
            config.critic_time,
            **asdict(heads),
        )
    return Diffusion2GAN(student, teacher, discriminator, *last)


def pixel_discriminator(
    config: ADDConfig, vision: VisionNetwork, parts: Components, example: Batch
) -> PixelDiscriminator:
    """Heads that fit the vision network's taps on the example's images."""
    if parts.decode is None:
        raise ValueError("ADD works on decoded images, and this model has no autoencoder")
    with torch.no_grad():
        tokens = vision(parts.decode(example.latents))
    text = text_embedding(example.cond).shape[1] if config.text_condition else 0
    image = image_embedding(tokens).shape[1] if config.image_condition else 0
    return PixelDiscriminator(tokens, text, image).to(example.latents.device)
