"""What a trainer's node takes beside MODEL and dataset: decoder, vision network, perceptual distance.

Each is checked before the first step, with what to connect instead. A method whose node takes something else has a
class of its own here, or in its node's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ...distill_core.data.dataset import LatentDataset
from ...distill_core.diffusion.schedules import same_level
from ...distill_core.digests import weights_digest
from ...distill_core.methods.base import Distance
from ...distill_core.methods.components import Components, VisionConfig
from ...distill_core.methods.config import MethodConfig
from ...distill_core.training.loop_config import TrainConfig
from .decoder import Decoder, autoencoder_of
from .vision import vision_network


@dataclass(frozen=True)
class Parts:
    """What every method may take.

    perceptual: the distance of the pairs term, of Load E-LatentLPIPS; None for the method's ``regression``.
    memory_hints: what the node's widgets can change to save memory.
    """

    perceptual: Any = None
    memory_hints: tuple[str, ...] = ()

    def identities(self) -> dict[str, Any]:
        """Digests of what takes part in the run; empty where nothing does. Raises ValueError for what cannot serve."""
        return {} if self.perceptual is None else {"perceptual": self.perceptual.identity()}

    def vision_config(self) -> VisionConfig:
        return VisionConfig()

    def components(self, backend, config: TrainConfig, checkpointing: bool) -> Components:
        """The backend with these parts, copied so that gradients can pass. Raises ValueError."""
        return Components(backend)

    def distance(self, channels: int) -> Distance | None:
        """The perceptual distance. Raises ValueError for one of another latent space."""
        if self.perceptual is not None and self.perceptual.channels != channels:
            raise ValueError(
                f"perceptual is for latents of {self.perceptual.channels} channels, this model's have {channels}: "
                "choose E-LatentLPIPS weights of this model's autoencoder, or disconnect it"
            )
        return self.perceptual

    def hints(self) -> Sequence[str]:
        """What about these parts takes less memory."""
        return self.memory_hints


@dataclass(frozen=True)
class VisionParts(Parts):
    """A VAE to decode with and a vision network to judge the images by (ADD).

    clip_vision: of Load CLIP Vision; None for the encoder of a tiny VAE.  size: side of its input, 0 for its usual one.
    """

    vae: Any = None
    clip_vision: Any = None
    size: int = 0

    def identities(self) -> dict[str, Any]:
        vae = weights_digest(autoencoder_of(self.vae).state_dict())
        network = weights_digest(self.clip_vision.get_sd()) if self.clip_vision else "encoder"
        return {**super().identities(), "vae": vae, "vision_network": network}

    def vision_config(self) -> VisionConfig:
        return VisionConfig(size=self.size)

    def components(self, backend, config: TrainConfig, checkpointing: bool) -> Components:
        decoder, device = Decoder(self.vae, backend, checkpointing), next(backend.network.parameters()).device
        if self.clip_vision is not None:
            mixed = config.precision != "float32" and comfy.model_management.should_use_bf16(device)
            dtype = torch.bfloat16 if mixed else torch.float32
            return Components(backend, decoder, vision=vision_network(self.clip_vision, self.size, device, dtype))
        if decoder.encoder is None:
            raise ValueError(
                "ADD's discriminator has nothing to see with: connect clip_vision (Load CLIP Vision with a DINOv2), or "
                "as vae a tiny one (TAESD), whose own encoder can serve"
            )
        return Components(backend, decoder, decoder.encoder)

    def hints(self) -> Sequence[str]:
        large = not hasattr(autoencoder_of(self.vae), "taesd_encoder")
        return [*super().hints(), *(["connect a tiny VAE (TAESD) instead of the large one"] if large else [])]


def check_dataset_pairs(method: MethodConfig, dataset: LatentDataset, process) -> None:
    """Raises ValueError, in the nodes' words, for a dataset without pairs at a level that the student is trained at."""
    if not method.weight("pairs"):
        return
    levels, stored = method.levels(process), dataset.state_sigmas
    if not any(same_level(s, level) for level in levels for s in stored):
        kept = f"keeps pairs at {[round(s, 4) for s in stored]}" if stored else "keeps no pairs"
        raise ValueError(
            f"the dataset {dataset.folder.name} {kept}, and this student learns from pairs at "
            f"{[round(level, 4) for level in levels]}: make it with Teacher Latents and pairs_for_steps = {len(levels)}"
        )
