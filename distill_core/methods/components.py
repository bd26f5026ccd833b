"""What methods are built from: a model's components, the sizes of the networks they add, and the vision network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import Batch
from ..discriminators.latent import LatentDiscriminator
from ..errors import opening
from ..models.backends.diffusers_folders import only_variant
from ..models.denoiser import Cond, Denoiser
from ..models.teachers import Teacher, to_train
from ..models.vision import VisionNetwork, efficientnet_vision, encoder_vision, transformers_vision
from ..settings import Checked, setting
from .base import Distance

ENCODER, EFFICIENTNET = "encoder", "efficientnet"


@dataclass(frozen=True)
class DiscriminatorConfig(Checked):
    """Size of each discriminator head on feature maps (LADD, Diffusion2GAN, DMD2)."""

    width: int = setting(64, "Channels of each discriminator head, a multiple of 8.", low=8, high=4096)
    blocks: int = setting(2, "Residual blocks of each discriminator head.", low=0, high=64)
    kernel: int = setting(
        3, "Side of the convolution kernels in the discriminator heads, an odd number.", low=1, high=31
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 8:
            raise ValueError(f"width must be a multiple of 8 (the groups of its normalisation), not {self.width}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be an odd number, so that it has a middle, not {self.kernel}")


@dataclass(frozen=True)
class VisionConfig(Checked):
    """The frozen vision network that ADD's discriminator reads, and what decodes images for it."""

    network: str = setting(
        ENCODER,
        "The folder of a DINOv2 in transformers' format, \"encoder\" for the encoder of the model's tiny autoencoder, "
        'or "efficientnet" for an ImageNet network that comes as a package (the extra "metrics").',
    )
    size: int = setting(
        0,
        'Side in pixels of the square images it sees. 0: 224, or the images\' own size with network = "encoder".',
        low=0,
        high=4096,
    )
    blocks: int = setting(
        4, "At how many of its blocks a DINOv2 is read, one discriminator head for each.", low=1, high=100
    )
    decoder: str = setting(
        "",
        "The folder of a diffusers AutoencoderTiny (TAESD) that decodes in place of the model's own autoencoder, at a "
        "fraction of the cost. Empty: the model's own.",
    )


@dataclass(frozen=True)
class Components:
    """A model as the methods need it.

    backend: `models.backends.diffusers.DiffusersBackend` or one like it.  decode: latents -> images in [-1, 1] with
    gradients, or None.  encoder: that of a tiny autoencoder, or None.  encode: a prompt -> its conditioning (one row),
    or None.  vision: an open vision network, in place of the one that `VisionConfig` names.  teacher: another one than
    the model itself.
    """

    backend: Any
    decode: Callable[[Tensor], Tensor] | None = None
    encoder: Any = None
    encode: Callable[[str], Cond] | None = None
    vision: VisionNetwork | None = None
    teacher: Teacher | None = None

    @property
    def teacher_view(self) -> Denoiser:
        """What teaches: the model itself with no LoRA on, or another."""
        return self.teacher.view if self.teacher else Denoiser(self.backend)

    @property
    def backends(self) -> list[Any]:
        """The frozen networks: the model's and, where there is one, that of another teacher."""
        other = self.teacher.view.backend if self.teacher else self.backend
        return [self.backend] if other is self.backend else [self.backend, other]

    @property
    def device(self) -> torch.device:
        """Where the model is, and so what is opened beside it."""
        return next(self.backend.network.parameters()).device

    def trainable_view(self, rank: int, targets: Sequence[str] = ()) -> Denoiser:
        """A LoRA on the shared backbone or, with rank 0, a trainable copy of it."""
        if rank:
            return Denoiser(self.backend, self.backend.new_lora(rank, targets or None))
        return Denoiser(self.backend.trainable_copy(), base=self.backend)

    def trainable_teacher(self, rank: int, targets: Sequence[str] = ()) -> Denoiser:
        """A view like `trainable_view`, of a network that begins as the teacher."""
        teacher = self.teacher_view
        own = targets if teacher.backend is self.backend else ()  # another network has other names
        return to_train(teacher, replace(self, backend=teacher.backend).trainable_view(rank, own))


@dataclass(frozen=True)
class Ingredients:
    """All that `MethodConfig.build` may use.

    student, teacher: views of the model.  example: a batch of real latents whose shapes the discriminator must fit.
    uncond, guidance: of the teacher.  distance: of the pairs and consistency terms, None for ``config.regression``.
    taps: blocks that heads read, empty for the method's own choice.
    """

    components: Components
    student: Denoiser
    teacher: Denoiser
    example: Batch
    uncond: Any = None
    guidance: float = 1.0
    distance: Distance | None = None
    taps: tuple[str, ...] = ()
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)

    def shared(self) -> dict[str, Any]:
        """The arguments of `StudentMethod` that are the same for every method."""
        return {"uncond": self.uncond, "guidance": self.guidance, "distance": self.distance}

    def head_size(self) -> dict[str, int]:
        return asdict(self.discriminator)

    def latent_heads(self) -> tuple[list[str], LatentDiscriminator]:
        """The teacher's blocks that LADD's heads read, and the heads."""
        taps, told = list(self.taps) or self.teacher.backend.default_taps(), self.student.strengths is not None
        size = self.head_size()
        return taps, LatentDiscriminator.for_teacher(self.teacher, taps, self.example, strengths=told, **size)


def tiny_decoder(folder: str | Path, device: torch.device | str = "cpu") -> Components:
    """Decoder and encoder of the diffusers ``AutoencoderTiny`` in a folder. Raises ValueError when there is none."""
    from diffusers import AutoencoderTiny

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"[vision] decoder: {folder} is not the folder of a diffusers AutoencoderTiny (TAESD)")
    with opening(folder, "an AutoencoderTiny"):
        tiny = AutoencoderTiny.from_pretrained(folder, local_files_only=True, variant=only_variant([Path(folder)]))
    tiny = tiny.eval().requires_grad_(False).to(device)
    return Components(None, lambda latents: tiny.decode(latents).sample, tiny.encoder)


def with_tiny_decoder(components: Components, folder: str) -> Components:
    """The components with the tiny autoencoder of ``folder`` instead of the model's own; an empty name changes none."""
    if not folder:
        return components
    tiny = tiny_decoder(folder, components.device)
    return replace(components, decode=tiny.decode, encoder=tiny.encoder)


def open_vision(config: VisionConfig, components: Components) -> VisionNetwork:
    """The vision network of ``components``, or that which ``config`` names. Raises ValueError when it is not there."""
    if components.vision is not None:
        return components.vision
    if config.network != ENCODER:
        carried = config.network == EFFICIENTNET
        size = config.size or 224
        opened = efficientnet_vision(size) if carried else transformers_vision(config.network, config.blocks, size)
        opened.network.to(components.device)
        return opened
    if components.encoder is None:
        raise ValueError(
            'ADD needs a frozen vision network: set [vision] network to the folder of a DINOv2 or to "efficientnet", '
            "or [vision] decoder to the folder of a tiny autoencoder (TAESD), whose encoder can serve"
        )
    return encoder_vision(components.encoder, (config.size, config.size) if config.size else None)
