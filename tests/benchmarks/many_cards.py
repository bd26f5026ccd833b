"""Tables on paper: SDXL, SD 3.5 medium and FLUX.1 dev on 1 to 64 cards, by the command ``plan --cards``.

    python tests/benchmarks/many_cards.py [NAME ...]

Writes the configs of diffusers' own pipelines into a temporary folder; no weights are read. LADD at 1024 px, bfloat16,
gradient checkpointing, four items on each card; all weights shared out, and a LoRA of rank 64 data parallel.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from distill_core.cli.main import main  # noqa: E402

SDXL = dict(
    _class_name="UNet2DConditionModel",
    sample_size=128,
    in_channels=4,
    out_channels=4,
    block_out_channels=[320, 640, 1280],
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    transformer_layers_per_block=[1, 2, 10],
    attention_head_dim=[5, 10, 20],
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    use_linear_projection=True,
    layers_per_block=2,
)
SD35_MEDIUM = dict(
    _class_name="SD3Transformer2DModel",
    sample_size=128,
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    joint_attention_dim=4096,
    caption_projection_dim=1536,
    pooled_projection_dim=2048,
    pos_embed_max_size=384,
    dual_attention_layers=list(range(13)),
    qk_norm="rms_norm",
)
FLUX = dict(
    _class_name="FluxTransformer2DModel",
    patch_size=1,
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
)
MODELS = {  # the network's config, its folder and latent channels
    "SDXL": (SDXL, "unet", 4),
    "SD 3.5 medium": (SD35_MEDIUM, "transformer", 16),
    "FLUX.1 dev": (FLUX, "transformer", 16),
}
RUN = """
[model]
path = {folder}
dtype = "bfloat16"
gradient_checkpointing = true
lora_rank = {rank}
[cache]
sizes = [[128, 128]]
[train]
batch_size = 4
shard = {shard}
"""


def write(folder: Path, network: dict, part: str, channels: int) -> None:
    content = {
        "model_index.json": {"_class_name": "DiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]},
        f"{part}/config.json": network,
        "vae/config.json": {"latent_channels": channels},
    }
    for name, values in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values))


if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write(folder, *MODELS[name])
            for rank, shard in ((0, "true"), (64, "false")):
                config = folder / "run.toml"
                config.write_text(RUN.format(folder=json.dumps(str(folder)), rank=rank, shard=shard))
                print(f"\n{name}, {f'LoRA of rank {rank}' if rank else 'all weights'}: ", end="", flush=True)
                main(["plan", str(config), "--cards", "1", "2", "8", "64"])
