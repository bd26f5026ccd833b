"""What the projection of the text in front of the blocks costs: ``python tests/benchmarks/text_projection_flops.py``.

Networks of diffusers at full size on torch's meta device, one item at 1024 px, counted by torch's flop counter. A LADD
step projects its text three times (the student, the features of fake and of real latents) where once would do; with
gradient checkpointing the blocks are computed again and the projection is not. A step counts as that many forwards of
the whole network (the command ``plan``); few are assumed here, so the share is rather too high.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

FORWARDS = 5.0  # of the whole network in a LADD step with gradient checkpointing
PROJECTIONS, NEEDED = 3, 1


def sd35_medium() -> tuple[nn.Module, dict]:
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        in_channels=16,
        out_channels=16,
        pos_embed_max_size=384,
        sample_size=128,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )
    inputs = dict(
        hidden_states=torch.randn(1, 16, 128, 128),
        timestep=torch.ones(1),
        encoder_hidden_states=torch.randn(1, 333, 4096),
        pooled_projections=torch.randn(1, 2048),
    )
    return network, inputs


def flux() -> tuple[nn.Module, dict]:
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(guidance_embeds=True)
    inputs = dict(
        hidden_states=torch.randn(1, 4096, 64),
        timestep=torch.ones(1),
        encoder_hidden_states=torch.randn(1, 512, 4096),
        pooled_projections=torch.randn(1, 768),
        guidance=torch.ones(1),
        img_ids=torch.zeros(4096, 3),
        txt_ids=torch.zeros(512, 3),
    )
    return network, inputs


def sdxl() -> tuple[nn.Module, dict]:
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    added = {"text_embeds": torch.randn(1, 1280), "time_ids": torch.randn(1, 6)}
    inputs = dict(
        sample=torch.randn(1, 4, 128, 128),
        timestep=torch.ones(1),
        encoder_hidden_states=torch.randn(1, 77, 2048),
        added_cond_kwargs=added,
    )
    return network, inputs


# What a network makes of its text without looking at the image: layers, by the end of the name. A UNet projects it
# inside its blocks only, to keys and values, by layers that the student's LoRA changes: the teacher's two could be one.
NETWORKS = {
    "SD 3.5 medium": (sd35_medium, ("context_embedder", "time_text_embed.text_embedder")),
    "FLUX.1 dev": (flux, ("context_embedder", "time_text_embed.text_embedder")),
    "SDXL": (sdxl, ("add_embedding", "attn2.to_k", "attn2.to_v")),
}


def shares(name: str) -> tuple[float, float, float]:
    """TFLOP of a forward, its part in the text's projection, and the part of a step's that repeating it costs."""
    make, layers = NETWORKS[name]
    with torch.device("meta"), torch.no_grad():
        network, inputs = make()
        with FlopCounterMode(display=False) as counter:
            network(**inputs)
        counts = counter.get_flop_counts()
        text = sum(sum(found.values()) for name, found in counts.items() if name.endswith(layers))
    whole = counter.get_total_flops()
    return whole / 1e12, text / whole, (PROJECTIONS - NEEDED) * text / (FORWARDS * whole)


def main() -> None:
    print("| network | TFLOP of a forward | text's projection, of it | repeated, of a step |\n|---|---|---|---|")
    for name in NETWORKS:
        whole, part, repeated = shares(name)
        print(f"| {name} | {whole:.2f} | {part:.4%} | {repeated:.4%} |")


if __name__ == "__main__":
    main()
