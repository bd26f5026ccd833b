"""How diffusers' networks are called and read: what differs between them is data (`ARCHITECTURES`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ...devices import like
from ...diffusion.process import DiscreteProcess, FlowProcess, NoiseProcess, cumulative_alphas
from ..denoiser import Cond, Limits

Network = Any  # one of diffusers' classes: nn.Module declares none of their attributes


def _call_sd3(network: Network, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    return network(
        hidden_states=x, timestep=timestep, encoder_hidden_states=cond.context, pooled_projections=cond.pooled
    ).sample


def has_embedded_guidance(config: Any) -> bool:
    """Whether a network of this diffusers config is told a guidance scale."""
    return bool(config.get("guidance_embeds", False))


def _call_flux(network: Network, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    """FLUX takes 2x2 patches as tokens, positions as ids and a time in [0, 1]."""
    height, width = x.shape[2] // 2, x.shape[3] // 2
    tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    sides = (torch.arange(side, device=x.device) for side in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    img_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(x.dtype)
    guidance = None if cond.guidance is None else like(cond.guidance, x)
    if has_embedded_guidance(network.config) and guidance is None:  # items stored before there was a setting
        guidance = x.new_ones(len(x))
    out = network(
        hidden_states=tokens,
        timestep=timestep,
        encoder_hidden_states=cond.context,
        pooled_projections=cond.pooled,
        guidance=guidance,
        img_ids=img_ids,
        txt_ids=img_ids.new_zeros(cond.context.shape[1], 3),
    ).sample
    return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=2, q=2)


def _call_unet(network: Network, x: Tensor, timestep: Tensor, cond: Cond) -> Tensor:
    added = None
    if network.config.addition_embed_type == "text_time":
        height, width = 8 * x.shape[2], 8 * x.shape[3]  # SDXL's size conditioning: original, crop, target, in pixels
        sizes = torch.tensor([height, width, 0, 0, height, width])
        time_ids = like(sizes, x).expand(len(x), 6)
        added = {"text_embeds": cond.pooled, "time_ids": time_ids}
    return network(x, timestep, encoder_hidden_states=cond.context, added_cond_kwargs=added).sample


def _transformer_taps(network: Network) -> list[str]:
    """Every block, in the order in which they run."""
    lists = [name for name in ("transformer_blocks", "single_transformer_blocks") if hasattr(network, name)]
    return [f"{name}.{i}" for name in lists for i in range(len(getattr(network, name)))]


def _unet_taps(network: Network) -> list[str]:
    return [*_unet_down(network), *_unet_decoder(network)]


def _unet_down(network: Network) -> list[str]:
    return [f"down_blocks.{i}" for i in range(len(network.down_blocks))]


def _unet_decoder(network: Network) -> list[str]:
    return ["mid_block", *(f"up_blocks.{i}" for i in range(len(network.up_blocks)))]


def _unet_scales(network: Network) -> tuple[list[str], list[str]]:
    """Read at each scale of the decoder, fed at each lower scale of the encoder."""
    return _unet_decoder(network), _unet_down(network)[1:]


def _unet_units(network: Network) -> list[str]:
    """What checkpointing computes again one by one, in running order; a middle block begins with a residual part."""
    names: list[str] = []
    for name in [*_unet_down(network), *_unet_decoder(network)]:
        block = network.get_submodule(name)
        residual = [[f"{name}.resnets.{i}"] for i in range(len(block.resnets))]
        attention = [
            [f"{name}.attentions.{i}.transformer_blocks.{j}" for j in range(len(part.transformer_blocks))]
            for i, part in enumerate(getattr(block, "attentions", None) or ())
        ]
        if len(residual) > len(attention) > 0:
            names += residual.pop(0)
        for one, several in zip_longest(residual, attention):
            names += [*(one or ()), *(several or ())]
    return names


def _sd3_limits(config: Any) -> Limits:
    side = config.pos_embed_max_size and config.pos_embed_max_size * config.patch_size
    return Limits(
        config.in_channels, config.joint_attention_dim, config.pooled_projection_dim, side, patch=config.patch_size
    )


def _flux_limits(config: Any) -> Limits:
    return Limits(config.in_channels // 4, config.joint_attention_dim, config.pooled_projection_dim, patch=2)


def _unet_limits(config: Any) -> Limits:
    width, pooled = config.cross_attention_dim, None
    if config.addition_embed_type == "text_time":  # SDXL: the pooled text and six numbers of sizes in one vector
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return Limits(config.in_channels, width if isinstance(width, int) else None, pooled)


@dataclass(frozen=True)
class Architecture:
    """How to work with one class of network.

    call: the network on (x, timestep, cond).  tap_names: blocks a discriminator can read, in running order.
    lora_under: containers of the layers that get a LoRA.  patch_size: latent pixels a side of a token.
    default_process: where the model's folder has no scheduler.  lora_prefix: of LoRA keys, the pipeline's name for the
    network.  scales: read-outs and entries of a multi-scale discriminator, where the network has scales of its own.
    limits: what a network with this config can take.  units: what is offloaded piece by piece, the taps unless given.
    """

    name: str
    call: Callable[[Network, Tensor, Tensor, Cond], Tensor]
    tap_names: Callable[[Network], list[str]]
    lora_under: tuple[str, ...]
    patch_size: int
    default_process: Callable[[], NoiseProcess]
    lora_prefix: str = "transformer"
    scales: Callable[[Network], tuple[list[str], list[str]]] | None = None
    limits: Callable[[Any], Limits] = lambda config: Limits()
    units: Callable[[Network], list[str]] | None = None


ARCHITECTURES = {  # by diffusers' class of the network
    "SD3Transformer2DModel": Architecture(
        name="sd3",
        call=_call_sd3,
        tap_names=_transformer_taps,
        lora_under=("transformer_blocks",),
        patch_size=2,
        default_process=lambda: FlowProcess(timestep_multiplier=1000.0, shift_alpha=3.0),
        limits=_sd3_limits,
    ),
    "FluxTransformer2DModel": Architecture(
        name="flux",
        call=_call_flux,
        tap_names=_transformer_taps,
        lora_under=("transformer_blocks", "single_transformer_blocks"),
        patch_size=2,
        default_process=lambda: FlowProcess(timestep_multiplier=1.0, shift_alpha=1.0),
        limits=_flux_limits,
    ),
    "UNet2DConditionModel": Architecture(
        name="unet",
        call=_call_unet,
        tap_names=_unet_taps,
        lora_under=("attentions",),
        patch_size=1,
        default_process=lambda: DiscreteProcess(cumulative_alphas(), "eps"),
        lora_prefix="unet",
        scales=_unet_scales,
        limits=_unet_limits,
        units=_unet_units,
    ),
}
