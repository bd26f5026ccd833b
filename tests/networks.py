"""Tiny real networks of the three families, with conditioning that fits all of them."""

from __future__ import annotations

import torch

from distill_core.models.denoiser import Cond

LATENT = (4, 6, 8)  # channels, height, width: not square on purpose
TOKENS, CONTEXT_DIM, POOLED_DIM = 5, 32, 16

SD3 = dict(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=CONTEXT_DIM,
    caption_projection_dim=64,
    pooled_projection_dim=POOLED_DIM,
    pos_embed_max_size=8,
)
FLUX = dict(
    patch_size=1,
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=CONTEXT_DIM,
    pooled_projection_dim=POOLED_DIM,
    guidance_embeds=False,
    axes_dims_rope=(8, 12, 12),
)
UNET = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=CONTEXT_DIM,
    attention_head_dim=8,
    norm_num_groups=8,
)
CONFIGS = {
    "sd3": ("SD3Transformer2DModel", SD3),
    "flux": ("FluxTransformer2DModel", FLUX),
    "unet": ("UNet2DConditionModel", UNET),
}


def build_network(family: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A tiny network; layers that diffusers leaves at 0 get random values, so that no gradient is trivially 0."""
    import diffusers

    class_name, config = CONFIGS[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = getattr(diffusers, class_name)(**{**config, **changes})
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return network


def build_cond(batch: int, seed: int = 0, guidance: bool = False) -> Cond:
    g = torch.Generator().manual_seed(1000 + seed)
    return Cond(
        torch.randn(batch, TOKENS, CONTEXT_DIM, generator=g),
        torch.randn(batch, POOLED_DIM, generator=g),
        1 + torch.rand(batch, generator=g) if guidance else None,
    )


def randomise_path(path, seed: int = 0, size: float = 0.2):
    """Give both matrices of a path values that depend only on the seed, so that it changes the output."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for down, up in zip(path.down, path.up, strict=True):
            down.copy_(torch.randn(down.shape, generator=g) / down.shape[1] ** 0.5)
            up.copy_(size * torch.randn(up.shape, generator=g))
    return path


METRIC_WIDTHS = (6, 8, 8, 10, 12)


def build_trunk_state(channels: int, widths: tuple[int, ...] = METRIC_WIDTHS, seed: int = 0):
    """State of a `TrainableTrunk` with normalisations that change something, and heads, some weights 0."""
    from distill_core.perceptual.trunk import TrainableTrunk, TrunkConfig

    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = TrainableTrunk(TrunkConfig(channels, widths)).state_dict()
    for name, value in state.items():
        if name.startswith("norms") and value.ndim:
            drawn = torch.randn(value.shape, generator=g)
            state[name] = 0.5 + drawn.abs() if name.endswith(("running_var", ".weight")) else 0.3 * drawn
        if name.startswith("convs") and name.endswith("bias"):
            state[name] = 0.3 * torch.randn(value.shape, generator=g)
    heads = [torch.randn(width, generator=g).clamp(min=0) for width in widths]
    return state, heads


def build_metric(channels: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0, **options):
    """A small E-LatentLPIPS with random weights."""
    from distill_core.perceptual.metric import ELatentLPIPS
    from distill_core.perceptual.trunk import FrozenTrunk, TrunkConfig

    state, heads = build_trunk_state(channels, seed=seed)
    return ELatentLPIPS(FrozenTrunk(TrunkConfig(channels, METRIC_WIDTHS), state, dtype), heads, **options)
