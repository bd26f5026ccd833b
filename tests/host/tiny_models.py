"""Tiny networks of the host's own classes with random weights, saved as files that its own loaders accept.

Runs inside the host's Python. Widths of texts are far from the real ones: SD3 and Flux files say theirs.
"""

from __future__ import annotations

from pathlib import Path

import comfy.ldm.flux.model
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ldm.wan.model
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import torch
from safetensors.torch import save_file

OPS = {"operations": comfy.ops.disable_weight_init, "dtype": torch.float32, "device": "cpu"}
CONTEXT = {"sd3": 64, "flux-schnell": 64, "flux": 64, "flux2": 64, "wan": 4096, "sd15": 768}  # width of text tokens
CONTEXT |= {"lumina": 64, "qwen-image": 64, "sdxl": 64}
CONTEXT |= {"sd15 inpainting": 768, "sd15 editing": 768, "flux fill": 64, "flux control": 64}
FLUX = dict(
    image_model="flux",
    in_channels=16,
    out_channels=16,
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=128,
    mlp_ratio=4.0,
    num_heads=1,
    depth=1,
    depth_single_blocks=2,
    axes_dim=[16, 56, 56],
    theta=10000,
    patch_size=2,
    qkv_bias=True,
    guidance_embed=False,
    txt_ids_dims=[],
)
FLUX2 = dict(
    FLUX,
    image_model="flux2",
    in_channels=128,
    out_channels=128,
    vec_in_dim=None,
    mlp_ratio=3.0,
    axes_dim=[32, 32, 32, 32],
    theta=2000,
    patch_size=1,
    qkv_bias=False,
    ops_bias=False,
    global_modulation=True,
    mlp_silu_act=True,
    txt_ids_dims=[3],
    default_ref_method="index",
    ref_index_scale=10.0,
)


def sd3() -> torch.nn.Module:
    return comfy.ldm.modules.diffusionmodules.mmdit.MMDiT(
        input_size=None,
        patch_size=2,
        in_channels=16,
        depth=2,
        adm_in_channels=64,
        num_patches=256,
        pos_embed_max_size=16,
        pos_embed_scaling_factor=None,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
        **OPS,
    )


def wan() -> torch.nn.Module:
    return comfy.ldm.wan.model.WanModel(
        model_type="t2v", dim=128, ffn_dim=256, num_heads=1, num_layers=1, in_dim=16, out_dim=16, **OPS
    )


def sd15(channels: int = 4) -> torch.nn.Module:
    return comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        image_size=32,
        in_channels=channels,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1],
        channel_mult=[1],
        transformer_depth=[1],
        transformer_depth_output=[1, 1],
        transformer_depth_middle=0,
        context_dim=768,
        num_heads=8,
        use_spatial_transformer=True,
        use_linear_in_transformer=False,
        legacy=False,
        **OPS,
    )


BUILDERS = {
    "sd3": sd3,
    "flux-schnell": lambda: comfy.ldm.flux.model.Flux(**FLUX, **OPS),
    "flux": lambda: comfy.ldm.flux.model.Flux(**{**FLUX, "guidance_embed": True}, **OPS),
    "flux2": lambda: comfy.ldm.flux.model.Flux(**FLUX2, **OPS),
    "wan": wan,
    "sd15": sd15,
}


# Networks that take more of every picture than its latent, by what they are for.
WITH_ITEMS = {
    "sd15 inpainting": lambda: sd15(9),
    "sd15 editing": lambda: sd15(8),
    "flux fill": lambda: comfy.ldm.flux.model.Flux(**{**FLUX, "guidance_embed": True, "in_channels": 96}, **OPS),
    "flux control": lambda: comfy.ldm.flux.model.Flux(**{**FLUX, "guidance_embed": True, "in_channels": 32}, **OPS),
}


# Families whose files the host only recognises at their real size of billions of weights: the host's class of the model
# and its network's settings, from which `model` makes one without a file.
CONFIGS = {
    "lumina": (
        comfy.supported_models.ZImage,
        dict(
            image_model="lumina2",
            patch_size=2,
            in_channels=16,
            dim=256,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            multiple_of=32,
            ffn_dim_multiplier=8 / 3,
            qk_norm=True,
            cap_feat_dim=64,
            axes_dims=[32, 48, 48],
            axes_lens=[64, 64, 64],
            rope_theta=256.0,
            z_image_modulation=True,
            time_scale=1000.0,
            pad_tokens_multiple=32,
        ),
    ),
    "qwen-image": (
        comfy.supported_models.QwenImage,
        dict(
            image_model="qwen_image",
            in_channels=64,
            num_layers=2,
            attention_head_dim=128,
            num_attention_heads=1,
            joint_attention_dim=64,
        ),
    ),
    "sdxl": (
        comfy.supported_models.SDXL,
        dict(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=64,
            num_res_blocks=[1, 1],
            channel_mult=[1, 2],
            transformer_depth=[0, 1],
            transformer_depth_output=[0, 0, 1, 1],
            transformer_depth_middle=1,
            context_dim=64,
            use_spatial_transformer=True,
            use_linear_in_transformer=True,
            legacy=False,
            adm_in_channels=64 + 6 * 256,
            num_classes="sequential",
            use_temporal_attention=False,
        ),
    ),
}


def model(family: str):
    """A MODEL of one of `CONFIGS` with random weights, as a loader that the host cannot ask again would give it."""
    config_class, settings = CONFIGS[family]
    config = config_class({**settings, "dtype": torch.float32})
    inner = config.get_model({}, device="cpu")
    inner.diffusion_model.load_state_dict(random_state(inner.diffusion_model))
    return comfy.model_patcher.ModelPatcher(inner, torch.device("cpu"), torch.device("cpu"))


def deep_sd3(blocks: int, width: int):
    """A MODEL of SD3's type of any depth and width, which files of that type tie together."""
    config = comfy.supported_models.SD3(
        dict(
            input_size=None,
            patch_size=2,
            in_channels=16,
            depth=width // 64,
            num_blocks=blocks,
            adm_in_channels=64,
            num_patches=64**2,
            pos_embed_max_size=64,
            pos_embed_scaling_factor=None,
            dtype=torch.float32,
            context_embedder_config={
                "target": "torch.nn.Linear",
                "params": {"in_features": 256, "out_features": width},
            },
        )
    )
    inner = config.get_model({}, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for value in inner.diffusion_model.state_dict().values():  # in place: its memory is measured
        value.normal_(generator=generator).mul_((0.5 / max(1, value[0].numel())) ** 0.5)
    return comfy.model_patcher.ModelPatcher(inner, torch.device("cpu"), torch.device("cpu"))


def random_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a size at which no layer is silent, the same for the same network."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator)
        * (0.5 / max(1, value[0].numel() if value.ndim else 1)) ** 0.5
        for name, value in network.state_dict().items()
    }


def write(family: str, folder: Path) -> str:
    """Write folder/FAMILY.safetensors, the same for the same family, and return its path."""
    state = random_state((BUILDERS | WITH_ITEMS)[family]())
    path = folder / f"{family}.safetensors"
    save_file(state, path)
    return str(path)


def conditioning(family: str, seed: int = 1) -> list:
    """A CONDITIONING of 5 tokens that fits the tiny file."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, 5, CONTEXT[family], generator=generator)
    return [[context, {"pooled_output": torch.randn(1, 64, generator=generator)}]]


def empty_latent(family: str, batch: int = 1) -> torch.Tensor:
    """Zeros in the layout of the family, 8 x 8 tokens or so; one frame for Wan."""
    shapes = {
        **dict.fromkeys(("sd15", "sd15 inpainting", "sd15 editing"), (4, 8, 8)),
        "sdxl": (4, 8, 8),
        "flux2": (128, 4, 4),
        "wan": (16, 1, 8, 8),
        "qwen-image": (16, 1, 8, 8),
    }
    return torch.zeros(batch, *shapes.get(family, (16, 8, 8)))
