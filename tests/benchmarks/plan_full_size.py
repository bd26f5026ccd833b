"""Plans of models at full size with ComfyUI's own networks, as a table: no weights, no GPU, about 20 s each.

Runs in ComfyUI's Python:  python tests/benchmarks/plan_full_size.py FOLDER [NAME ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

WANTED = sys.argv[2:]  # entering the host takes the arguments
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "host"), str(TESTS / "full_size")]
from launch import enter_host  # noqa: E402

enter_host()

import comfy.model_patcher  # noqa: E402
import torch  # noqa: E402
from full_networks import NETWORKS  # noqa: E402
from full_shapes import SHAPES  # noqa: E402
from pack.distill_core.methods.diffusion2gan import Diffusion2GANConfig  # noqa: E402
from pack.distill_core.methods.dmd2 import DMD2Config  # noqa: E402
from pack.distill_core.methods.ladd import LADDConfig  # noqa: E402
from pack.distill_core.methods.tune import TuneConfig  # noqa: E402
from pack.distill_core.models.denoiser import Cond  # noqa: E402
from pack.distill_core.training.loop_config import TrainConfig  # noqa: E402
from pack.distill_core.training.plan import GIB, Shapes  # noqa: E402
from pack.distill_core.training.run import RunConfig, StudentConfig  # noqa: E402
from pack.nodes.host.parts import Parts  # noqa: E402
from pack.nodes.host.plan import plan_of  # noqa: E402

BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
D2GAN = Diffusion2GANConfig(critic="lora")
ROWS = {  # name: model, method, batch, format of the base, rank
    "sd15": ("sd15", LADDConfig(), 2, BF16, 64),
    "sd15 fp16": ("sd15", LADDConfig(), 2, FP16, 64),
    "sd15 fill": ("sd15", LADDConfig(terms={"adversarial": 1.0, "distillation": 2.5}), 4, FP16, 64),
    "sd15 d2gan": ("sd15", D2GAN, 2, BF16, 64),
    "sd15 d2gan 8": ("sd15", D2GAN, 8, BF16, 64),
    "sdxl": ("sdxl", LADDConfig(), 2, BF16, 64),
    "sdxl 4": ("sdxl", LADDConfig(), 4, BF16, 64),
    "sdxl fp16": ("sdxl", LADDConfig(), 2, FP16, 64),
    "sdxl dmd2": ("sdxl", DMD2Config(), 2, BF16, 64),
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
    inner, config = NETWORKS[name].on_meta(dtype)
    inner.model_sampling = comfy.model_base.model_sampling(config, inner.model_type)
    patcher = comfy.model_patcher.ModelPatcher(inner, torch.device("cuda"), torch.device("cpu"))
    return patcher


def plan_row(row: str):
    name, method, batch, dtype, rank = ROWS[row]
    latent, width, tokens, pooled = SHAPES[name]
    train, student = TrainConfig(batch_size=batch, precision="bfloat16"), StudentConfig(rank)
    config = RunConfig(method, train, student, {"base": "", "dataset": ""})
    model = unloaded(name, dtype)
    guidance = torch.full((1,), 3.5) if name == "flux" else None
    cond = Cond(torch.zeros(1, tokens, width), torch.zeros(1, pooled) if pooled else None, guidance)
    stored = method.weight("pairs") or method.weight("keep")  # of a tuning: a batch of what is kept, the larger one
    levels = (14.6146,) if stored else ()
    request = SimpleNamespace(
        model=model, train=train, student=student, parts=Parts(), checkpointing=True, other_teacher=None
    )
    return plan_of(request, config, Shapes(latent, cond, levels, guidance=5.0))


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
