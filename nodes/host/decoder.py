"""A VAE of the host as a decoder that a student learns through: latents in model space -> images, with gradients.

The host decodes under inference mode with weights that autograd refuses, clamps, and may tile: this has a copy of the
weights, the network's own decoding, and float32 weights around a run's mixed precision.
"""

from __future__ import annotations

from contextlib import nullcontext

import comfy.sd
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def autoencoder_of(vae) -> nn.Module:
    """The network in a VAE. Raises ValueError when there is none, or it is not one for single images."""
    network = getattr(vae, "first_stage_model", None)
    if network is None:
        raise ValueError(
            "the pictures need a VAE, and this one is empty (a checkpoint without a VAE): connect Load VAE; for ADD "
            "preferably with a tiny VAE (TAESD)"
        )
    if vae.latent_dim != 2 or vae.output_channels != 3:
        raise ValueError(
            "this VAE is for videos or sound, not for single images: connect an image VAE for this model's latents; "
            "of the trainers, LADD Trainer needs none"
        )
    return network


class Decoder:
    """Called with latents [B, C, H, W] in model space; returns images [B, 3, H', W'] in about [-1, 1], float32.

    backend: the `ComfyBackend` whose latents are decoded, on its device.
    checkpointing: decode the images of a large autoencoder one at a time, and each again in the backward pass, so that
    the activations of one image are held and not those of the batch.
    Raises ValueError for a VAE of other latents, or one that cannot be copied.
    """

    def __init__(self, vae, backend, checkpointing: bool = True) -> None:
        original = autoencoder_of(vae)
        if vae.latent_channels != backend.channels:
            raise ValueError(
                f"the VAE decodes latents of {vae.latent_channels} channels, this model's have {backend.channels}: "
                "connect the model's own VAE, or the tiny VAE made for it"
            )
        state = {name: value.detach().clone() for name, value in original.state_dict().items()}
        metadata = {"tae_latent_channels": vae.latent_channels}  # all that the weights of a tiny one do not tell
        copied = comfy.sd.VAE(sd=state, metadata=metadata, dtype=torch.float32).first_stage_model
        if type(copied) is not type(original):
            raise ValueError("this VAE cannot be copied for training: load it with Load VAE or Load Checkpoint")
        device = next(backend.network.parameters()).device
        self.network = copied.to(device, torch.float32).eval().requires_grad_(False)
        self.backend, self.tiny = backend, hasattr(copied, "taesd_encoder")
        if self.tiny:
            cut_padding(self.network)
        self.checkpointing = checkpointing and not self.tiny
        # What the host makes of the network's output, an image in [0, 1], without its clamp, which has no gradient.
        low, high = vae.process_output(torch.tensor([0.25, 0.75])).tolist()
        self.slope, self.offset = 2 * (high - low), low - (high - low) / 2

    @property
    def encoder(self) -> nn.Module | None:
        """The encoder of a tiny autoencoder, in the form that `vision.encoder_vision` takes; None for a large one."""
        return TinyEncoder(self.network.taesd_encoder) if self.tiny else None

    def __call__(self, latents: Tensor) -> Tensor:
        if not (self.checkpointing and latents.requires_grad and torch.is_grad_enabled()):
            return self._decode(latents)
        around = self.backend.switch.around_recompute
        contexts = lambda: (nullcontext(), around())  # noqa: E731
        rows = latents.split(1)
        return torch.cat([checkpoint(self._decode, row, use_reentrant=False, context_fn=contexts) for row in rows])

    def _decode(self, latents: Tensor) -> Tensor:
        unscaled = self.backend.latents_out(latents)
        unscaled = unscaled[:, :, 0] if unscaled.ndim == 5 else unscaled  # the one frame of a video model
        output = self.network.decode(unscaled.contiguous(memory_format=torch.channels_last))
        return 2 * (self.slope * output.float() + self.offset) - 1


def cut_padding(network: nn.Module, width: int = 64) -> None:
    """Remove the channels of a tiny autoencoder that are exactly 0; the host wants ``width`` channels in every file.

    That of the mini model uses 24 of them: the images are the same, several times faster.
    """
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    inner = [conv.weight for conv in convs if conv.out_channels == width]
    used = max(int(weight.flatten(1).any(1).nonzero().max()) + 1 if weight.any() else 1 for weight in inner)
    for conv in convs if used < width else ():
        rows = slice(used if conv.out_channels == width else None)
        columns = slice(used if conv.in_channels == width else None)
        conv.weight = nn.Parameter(conv.weight[rows, columns].clone(), requires_grad=False)
        if conv.bias is not None:
            conv.bias = nn.Parameter(conv.bias[rows].clone(), requires_grad=False)


class TinyEncoder(nn.Module):
    """TAESD's encoder for images in [-1, 1]; ``layers`` are its own."""

    def __init__(self, encoder: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.Sequential(*encoder)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images + 1) / 2)
