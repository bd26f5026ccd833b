"""Plans of models at full size with ComfyUI's own networks, as a table: no weights, no GPU, about 20 s each.

Runs in ComfyUI's Python:  python tests/benchmarks/plan_full_size.py FOLDER [NAME ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

WANTED = sys.argv[2:]  # entering the host takes the arguments
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "host"))
from launch import enter_host  # noqa: E402

enter_host()

import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from pack.distill_core.methods.diffusion2gan import Diffusion2GANConfig  # noqa: E402
from pack.distill_core.methods.ladd import LADDConfig  # noqa: E402
from pack.distill_core.methods.tune import TuneConfig  # noqa: E402
from pack.distill_core.models.denoiser import Cond  # noqa: E402
from pack.distill_core.training.loop_config import TrainConfig  # noqa: E402
from pack.distill_core.training.plan import GIB, Shapes  # noqa: E402
from pack.distill_core.training.run import RunConfig, StudentConfig  # noqa: E402
from pack.nodes.host.parts import Parts  # noqa: E402
from pack.nodes.host.plan import plan_of  # noqa: E402

UNET = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    use_spatial_transformer=True,
    legacy=False,
    use_temporal_attention=False,
)
SD15 = UNET | dict(
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    transformer_depth_middle=1,
    context_dim=768,
    num_heads=8,
    use_linear_in_transformer=False,
    adm_in_channels=None,
)
SDXL = UNET | dict(
    num_res_blocks=[2, 2, 2],
    channel_mult=[1, 2, 4],
    transformer_depth=[0, 0, 2, 2, 10, 10],
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    transformer_depth_middle=10,
    context_dim=2048,
    num_head_channels=64,
    use_linear_in_transformer=True,
    adm_in_channels=2816,
    num_classes="sequential",
)
SD35M = dict(
    input_size=None,
    patch_size=2,
    in_channels=16,
    depth=24,
    num_blocks=24,
    adm_in_channels=2048,
    num_patches=384**2,
    pos_embed_max_size=384,
    pos_embed_scaling_factor=None,
    qk_norm="rms",
    x_block_self_attn_layers=list(range(13)),
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
)
FLUX = tiny_models.FLUX | dict(
    vec_in_dim=768, context_in_dim=4096, hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38
)
FLUX |= {"guidance_embed": True}
ZIMAGE = tiny_models.CONFIGS["lumina"][1] | dict(
    dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30, cap_feat_dim=2560, multiple_of=256
)
ZIMAGE |= dict(axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512])
QWEN = tiny_models.CONFIGS["qwen-image"][1] | dict(num_layers=60, num_attention_heads=24, joint_attention_dim=3584)
MODELS = {  # class of the host, settings of its network, latent at 1024 px (SD 1.5: 512), width of text, tokens, pooled
    "sd15": (comfy.supported_models.SD15, SD15, (4, 64, 64), 768, 77, 0),
    "sdxl": (comfy.supported_models.SDXL, SDXL, (4, 128, 128), 2048, 77, 1280),
    "sd35m": (comfy.supported_models.SD3, SD35M, (16, 128, 128), 4096, 154, 2048),
    "sdxl 512": (comfy.supported_models.SDXL, SDXL, (4, 64, 64), 2048, 77, 1280),
    "schnell": (comfy.supported_models.FluxSchnell, FLUX | {"guidance_embed": False}, (16, 128, 128), 4096, 256, 768),
    "flux": (comfy.supported_models.Flux, FLUX, (16, 128, 128), 4096, 256, 768),
    "zimage": (comfy.supported_models.ZImage, ZIMAGE, (16, 128, 128), 2560, 128, 0),
    "qwen": (comfy.supported_models.QwenImage, QWEN, (16, 128, 128), 3584, 128, 0),
}
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
D2GAN = Diffusion2GANConfig(critic="lora")
ROWS = {  # name: model, method, batch, format of the base, rank
    "sd15": ("sd15", LADDConfig(), 2, BF16, 64),
    "sd15 fp16": ("sd15", LADDConfig(), 2, FP16, 64),
    "sd15 d2gan": ("sd15", D2GAN, 2, BF16, 64),
    "sd15 d2gan 8": ("sd15", D2GAN, 8, BF16, 64),
    "sdxl": ("sdxl", LADDConfig(), 2, BF16, 64),
    "sdxl 4": ("sdxl", LADDConfig(), 4, BF16, 64),
    "sdxl fp16": ("sdxl", LADDConfig(), 2, FP16, 64),
    "sdxl fp8": ("sdxl", LADDConfig(), 2, FP8, 64),
    "sd35m": ("sd35m", LADDConfig(), 2, BF16, 64),
    "sd35m 4": ("sd35m", LADDConfig(), 4, BF16, 64),
    "flux fp8 16": ("flux", LADDConfig(), 2, FP8, 16),
    "flux": ("flux", LADDConfig(), 2, BF16, 64),
    "zimage": ("zimage", LADDConfig(), 2, BF16, 16),
    "sdxl turbo tune": ("sdxl 512", TuneConfig(), 4, FP16, 32),
    "schnell fp8 tune": ("schnell", TuneConfig(), 2, FP8, 16),
    "zimage fp8 tune": ("zimage", TuneConfig(), 2, FP8, 16),
    "zimage tune": ("zimage", TuneConfig(), 2, BF16, 16),
    "qwen fp8": ("qwen", LADDConfig(), 2, FP8, 16),
}


def unloaded(name: str, dtype: torch.dtype):
    """A MODEL of that size whose weights are on the meta device, as of an NVIDIA card."""
    kind, settings, *_ = MODELS[name]
    config = kind({**settings, "dtype": dtype})
    config.manual_cast_dtype = BF16 if dtype == FP8 else None
    with torch.device("meta"):
        inner = config.get_model({}, device=torch.device("meta"))
    inner.model_sampling = comfy.model_base.model_sampling(config, inner.model_type)
    patcher = comfy.model_patcher.ModelPatcher(inner, torch.device("cuda"), torch.device("cpu"))
    return patcher


def plan_row(row: str):
    name, method, batch, dtype, rank = ROWS[row]
    *_, latent, width, tokens, pooled = MODELS[name]
    train, student = TrainConfig(batch_size=batch, precision="bfloat16"), StudentConfig(rank)
    config = RunConfig(method, train, student, {"base": "", "dataset": ""})
    model = unloaded(name, dtype)
    guidance = torch.full((1,), 3.5) if name == "flux" else None
    cond = Cond(torch.zeros(1, tokens, width), torch.zeros(1, pooled) if pooled else None, guidance)
    stored = method.weight("pairs") or method.weight("keep")  # of a tuning: a batch of what is kept, the larger one
    levels = (14.6146,) if stored else ()
    request = SimpleNamespace(model=model, train=train, student=student, parts=Parts(), checkpointing=True)
    return plan_of(request, config, Shapes(latent, cond, levels))


if __name__ == "__main__":
    print(
        "| model | base | rank | batch | peak GiB (GB) | between steps | CPU s |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for row in WANTED or ROWS:
        started = time.process_time()
        plan = plan_row(row)
        name, _, batch, dtype, rank = ROWS[row]
        spent = time.process_time() - started
        size = f"{plan.peak / GIB:.1f} ({plan.peak / 1e9:.2f})"
        base = str(dtype).removeprefix("torch.")
        print(f"| {row} | {base} | {rank} | {batch} | {size} | {plan.steady / GIB:.1f} | {spent:.0f} |", flush=True)
