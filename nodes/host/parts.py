"""What ADD and Diffusion2GAN need beside the MODEL, from what is connected to their nodes: decoder, vision network,
perceptual distance, pairs. Each is checked before the first step, with what to connect instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management
import torch

from ...distill_core.data.dataset import LatentDataset, check_pairs
from ...distill_core.methods.add import ADDConfig
from ...distill_core.methods.base import Distance, MethodConfig
from ...distill_core.methods.components import Components, VisionConfig
from ...distill_core.methods.diffusion2gan import Diffusion2GANConfig
from ...distill_core.models.denoiser import Denoiser, Guided
from .decoder import Decoder, autoencoder_of
from .identity import weights_identity
from .vision import vision_network

if TYPE_CHECKING:
    from .training import Request

# How far a path run again may end from the stored latent. Noise in bfloat16 and a half-precision network cost some
# percent at high guidance; another solver or noise gives about 1, and whether the teacher is the same a hash tells.
PATH_TOLERANCE = 0.25


def parts_of(request: Request, backend) -> Components:
    """The backend with what the method needs beside it, copied so that gradients can pass. Raises ValueError."""
    if not isinstance(request.method, ADDConfig):
        return Components(backend)
    decoder, device = Decoder(request.vae, backend, request.checkpointing), next(backend.network.parameters()).device
    if request.clip_vision is not None:
        mixed = request.train.precision != "float32" and comfy.model_management.should_use_bf16(device)
        dtype = torch.bfloat16 if mixed else torch.float32
        vision = vision_network(request.clip_vision, request.vision_size, device, dtype)
        return Components(backend, decoder, vision=vision)
    if decoder.encoder is None:
        raise ValueError(
            "ADD's discriminator has nothing to see with: connect clip_vision (Load CLIP Vision with a DINOv2), or as "
            "vae a tiny one (TAESD), whose own encoder can serve"
        )
    return Components(backend, decoder, decoder.encoder)


def vision_config(request: Request) -> VisionConfig:
    return VisionConfig(size=request.vision_size)


def distance_of(request: Request, backend) -> Distance | None:
    """The connected perceptual distance. Raises ValueError for one of another latent space."""
    metric = request.perceptual
    if metric is not None and metric.channels != backend.channels:
        raise ValueError(
            f"perceptual is for latents of {metric.channels} channels, this model's have {backend.channels}: choose "
            "E-LatentLPIPS weights of this model's autoencoder, or disconnect it"
        )
    return metric


def check_dataset_pairs(method: MethodConfig, dataset: LatentDataset, backend) -> None:
    """Whether the dataset's pairs are what the method learns from; Diffusion2GAN's are tried by running one again.

    Raises ValueError for none, none at a trained level, or ones that the teacher does not make.
    """
    if not method.weight("pairs"):
        return
    levels, stored = method.levels(backend.process), dataset.state_sigmas
    shared = [level for level in levels if any(abs(s - level) <= 1e-4 * s for s in stored)]
    if not shared:
        kept = f"keeps pairs at {[round(s, 4) for s in stored]}" if stored else "keeps no pairs"
        raise ValueError(
            f"the dataset {dataset.folder.name} {kept}, and this student learns from pairs at "
            f"{[round(level, 4) for level in levels]}: make it with Teacher Latents and pairs_for_steps = {len(levels)}"
        )
    if isinstance(method, Diffusion2GANConfig):
        uncond = dataset.uncond().to(next(backend.network.parameters()).device)
        check_pairs(dataset, Guided(Denoiser(backend), uncond, dataset.manifest()["guidance"]), PATH_TOLERANCE)


def extra_identities(request: Request) -> dict:
    """Which decoder, vision network and metric decide the run; empty where none does. Raises ValueError."""
    found: dict = {}
    if isinstance(request.method, ADDConfig):
        seen = request.clip_vision
        found["vae"] = weights_identity(autoencoder_of(request.vae).state_dict())
        found["vision"] = [weights_identity(seen.get_sd()) if seen else "encoder", request.vision_size]
        found["guidance"] = request.guidance
    if request.perceptual is not None:
        metric = request.perceptual
        tensors = dict([*metric.named_parameters(), *metric.named_buffers()])
        found["perceptual"] = [weights_identity(tensors), metric.preset, metric.draws, metric.l1]
    return found


def memory_advice(request: Request) -> list[str]:
    """What about these parts takes less memory."""
    method = request.method
    if isinstance(method, ADDConfig) and not hasattr(autoencoder_of(request.vae), "taesd_encoder"):
        return ["connect a tiny VAE (TAESD) instead of the large one"]
    if isinstance(method, Diffusion2GANConfig) and method.critic == "copy":
        return ["set critic to lora"]
    return []
